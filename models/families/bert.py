"""The BERT family of transformers: BERT, RoBERTa (also XLM-RoBERTa and CamemBERT), ELECTRA and DistilBERT.

All are post-LayerNorm encoders with absolute positions and differ in the names of their parts only: `ARCHITECTURES` is that
table. A model is recognised by the library module that defines its parts, never by a name in its config: a look-alike that
computes something else (a pre-LayerNorm block, rotary positions, a module the user replaced) must not be taken for BERT.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import ModelError, UsageError
from tpcompile.models.families import heads
from tpcompile.models.families.dense import Dense, SentenceEncoder, alive_tokens, call
from tpcompile.models.families.heads import Head


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where one architecture keeps its parts. Paths are dotted: ``layers`` below the encoder, the others below one layer.

    Attributes:
        name: the library's ``model_type``.
        home: the library module that must define the model and every rewired part.
        encoder: class of the bare encoder.
        classifier: class of the sequence classifier.
        base: attribute of the classifier that holds the encoder.
        logits: the classifier's head: (model, encoder, hidden states ``[B, N, C]``) -> ``[B, L]``.
        layers: the list of layers.
        attention: the self-attention module: has ``scaling``.
        heads: attribute of ``attention`` with the number of heads.
        query: the linear maps ``query``, ``key``, ``value``.
        key: see ``query``.
        value: see ``query``.
        project: output projection of the attention.
        attention_norm: the LayerNorm behind it.
        feed_forward: the MLP's modules, in order.
        feed_forward_norm: the LayerNorm behind it.
        rewired: parts whose own ``forward`` is not called; they must be the library's.
        token_types: it has token types.
        offset_positions: positions count non-pad ids from ``pad_token_id + 1``, so the table holds that many fewer.
    """

    name: str
    home: str
    encoder: str
    classifier: str
    base: str
    logits: Callable[[Any, Any, Tensor], Tensor]
    layers: str = "encoder.layer"
    attention: str = "attention.self"
    heads: str = "num_attention_heads"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    project: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    feed_forward: tuple[str, ...] = ("intermediate", "output.dense")
    feed_forward_norm: str = "output.LayerNorm"
    rewired: tuple[str, ...] = ("attention", "attention.self", "attention.output", "output")
    token_types: bool = True
    offset_positions: bool = False

    @property
    def heads_by_class(self) -> dict[str, Head]:
        """Class of a model with a head -> that head."""
        stem = self.encoder.removesuffix("Model")
        return {
            self.classifier: heads.classifier(self.logits),
            f"{stem}ForTokenClassification": heads.TOKENS,
            f"{stem}ForQuestionAnswering": heads.SPANS,
        }


_HOME = "transformers.models"
_BERT = Architecture(
    "bert", f"{_HOME}.bert.modeling_bert", "BertModel", "BertForSequenceClassification", "bert", heads.classify_pooled
)
_ROBERTA = Architecture(
    "roberta",
    f"{_HOME}.roberta.modeling_roberta",
    "RobertaModel",
    "RobertaForSequenceClassification",
    "roberta",
    heads.classify_all,
    offset_positions=True,
)
ARCHITECTURES: tuple[Architecture, ...] = (
    _BERT,
    _ROBERTA,
    replace(
        _ROBERTA,
        name="xlm-roberta",
        home=f"{_HOME}.xlm_roberta.modeling_xlm_roberta",
        encoder="XLMRobertaModel",
        classifier="XLMRobertaForSequenceClassification",
    ),
    replace(
        _ROBERTA,
        name="camembert",
        home=f"{_HOME}.camembert.modeling_camembert",
        encoder="CamembertModel",
        classifier="CamembertForSequenceClassification",
    ),
    Architecture(
        "electra",
        f"{_HOME}.electra.modeling_electra",
        "ElectraModel",
        "ElectraForSequenceClassification",
        "electra",
        heads.classify_all,
    ),
    Architecture(
        "distilbert",
        f"{_HOME}.distilbert.modeling_distilbert",
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        "distilbert",
        heads.classify_first,
        layers="transformer.layer",
        attention="attention",
        heads="n_heads",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        project="attention.out_lin",
        attention_norm="sa_layer_norm",
        feed_forward=("ffn.lin1", "ffn.activation", "ffn.lin2"),
        feed_forward_norm="output_layer_norm",
        rewired=("attention", "ffn"),
        token_types=False,
    ),
)


@dataclass(frozen=True, slots=True)
class BertBlock:
    """One layer's own modules. Dropout is left out: it is the identity in eval mode, which `parts` demands."""

    heads: int
    scale: float
    query: nn.Module
    key: nn.Module
    value: nn.Module
    project: nn.Module
    attention_norm: nn.Module
    feed_forward_maps: tuple[Callable[[Tensor], Tensor], ...]
    feed_forward_norm: nn.Module

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x: [B, N, C]`` to query, key and value, each ``[B, H, N, D]``."""
        return self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))

    def attention_output(self, context: Tensor, x: Tensor) -> Tensor:
        """``LayerNorm(project(context) + x)``, all ``[B, N, C]``."""
        y: Tensor = self.attention_norm(self.project(context) + x)
        return y

    def feed_forward(self, x: Tensor) -> Tensor:
        """``LayerNorm(mlp(x) + x)``, all ``[B, N, C]``."""
        y = x
        for map_ in self.feed_forward_maps:
            y = map_(y)
        z: Tensor = self.feed_forward_norm(y + x)
        return z

    def _split(self, x: Tensor) -> Tensor:
        """``[B, N, H * D] -> [B, H, N, D]``."""
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class BertParts:
    """A model of the family by its parts; see `tpcompile.models.families.base.Parts`."""

    names: Architecture
    architecture: str
    dense: nn.Module
    encoder: Any
    blocks: tuple[BertBlock, ...]
    outputs: Callable[[Tensor, Tensor], dict[str, Tensor]]
    token_level: bool = False

    @property
    def family(self) -> str:
        """``bert`` for every member of the family."""
        return "bert"

    @property
    def inputs(self) -> tuple[str, ...]:
        """``input_ids``, ``attention_mask``, and ``token_type_ids`` where the architecture has them."""
        return ("input_ids", "attention_mask", "token_type_ids")[: 3 if self.names.token_types else 2]

    @property
    def prefix(self) -> int:
        """The first token is CLS."""
        return 1

    @property
    def cls(self) -> bool:
        """The first token is CLS."""
        return True

    @property
    def max_length(self) -> int:
        """Longest sequence the position table holds."""
        table: int = self.encoder.embeddings.position_embeddings.num_embeddings
        return table - (self.encoder.embeddings.padding_idx + 1 if self.names.offset_positions else 0)

    @property
    def vocabulary(self) -> int:
        """Number of rows of the word embedding."""
        rows: int = self.encoder.embeddings.word_embeddings.num_embeddings
        return rows

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Ids, mask and types, int64 ``[B, N]``, to ``x: [B, N, C]`` and ``alive: bool [B, N]``, the attention mask."""
        input_ids = inputs["input_ids"]
        kwargs = call(input_ids, None, inputs.get("token_type_ids"), self.names.token_types)
        del kwargs["attention_mask"]  # positions count ids, whatever the mask says
        x: Tensor = self.encoder.embeddings(**kwargs)
        # ELECTRA has the projection only where the embedding is narrower than the model.
        x = self.encoder.embeddings_project(x) if hasattr(self.encoder, "embeddings_project") else x
        return x, alive_tokens(input_ids, inputs.get("attention_mask"))

    def head(self, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` (or weights, see `Parts.head`) to the outputs by name."""
        return self.outputs(x, alive)


def parts(model: nn.Module) -> BertParts | None:
    """Name the parts of a BERT-like model; None for a model of another family.

    Args:
        model: a library model, a `Dense` around one, or a `SentenceEncoder`.

    Raises:
        ModelError: a known library module, but a decoder, a part the user replaced, or a head tpcompile does not know.
        UsageError: a bare encoder without pooler and without pooling.
    """
    inner: Any = model.model if isinstance(model, Dense) else model
    if isinstance(model, SentenceEncoder):
        inner = model.encoder
    names = next((row for row in ARCHITECTURES if row.home == type(inner).__module__), None)
    if names is None:
        return None
    architecture = type(inner).__name__
    encoder = getattr(inner, names.base) if architecture in names.heads_by_class else inner
    if type(encoder).__name__ != names.encoder:
        raise ModelError(
            f"{architecture} has no head that tpcompile knows",
            fix=f"pass {', '.join(names.heads_by_class)}, or SentenceEncoder({names.encoder}) with a pooling",
        )
    if getattr(encoder.config, "is_decoder", False):
        raise ModelError(
            f"{architecture} is configured as a decoder", fix="token pruning is for encoders: set is_decoder to false"
        )
    blocks = tuple(_block(layer, names, f"{names.layers}.{i}") for i, layer in enumerate(attrgetter(names.layers)(encoder)))
    if isinstance(model, SentenceEncoder):
        return BertParts(names, architecture, model, encoder, blocks, model.pooling)
    bare_tokens = isinstance(model, Dense) and model.outputs == heads.HIDDEN.outputs
    head = heads.HIDDEN if bare_tokens else _head(inner, encoder, names)
    dense = model if isinstance(model, Dense) else Dense(inner, head.outputs, names.token_types)

    def outputs(x: Tensor, alive: Tensor) -> dict[str, Tensor]:
        return dict(zip(head.outputs, head.compute(inner, encoder, x), strict=True))

    return BertParts(names, architecture, dense, encoder, blocks, outputs, head.token_level)


def _head(model: Any, encoder: Any, names: Architecture) -> Head:
    """The head of a model that has one, or the pooler of a bare encoder."""
    if model is not encoder:
        return names.heads_by_class[type(model).__name__]
    if getattr(encoder, "pooler", None) is None:
        raise UsageError(
            f"{names.encoder} without a pooler has no sentence-level output",
            fix='wrap it: tpcompile.models.SentenceEncoder(model, pooling="mean"), or TokenEncoder(model) for a vector per token',
        )
    return heads.POOLED


def _block(layer: nn.Module, names: Architecture, path: str) -> BertBlock:
    """Read one layer's modules from it by the table."""
    for part, module in _rewired(layer, names):
        if type(module).__module__ != names.home:
            where = f"{path}.{part}".rstrip(".")
            raise ModelError(
                f"{where} is {type(module).__module__}.{type(module).__qualname__}, not the library's own module",
                fix=f"pass the model as transformers builds it ({names.home}); this part's own forward would not be called",
            )

    def at(dotted: str) -> Any:
        return attrgetter(dotted)(layer)

    return BertBlock(
        heads=getattr(at(names.attention), names.heads),
        scale=float(at(names.attention).scaling),
        query=at(names.query),
        key=at(names.key),
        value=at(names.value),
        project=at(names.project),
        attention_norm=at(names.attention_norm),
        feed_forward_maps=tuple(at(part) for part in names.feed_forward),
        feed_forward_norm=at(names.feed_forward_norm),
    )


def _rewired(layer: nn.Module, names: Architecture) -> Iterator[tuple[str, nn.Module]]:
    yield "", layer
    for part in names.rewired:
        yield part, attrgetter(part)(layer)
