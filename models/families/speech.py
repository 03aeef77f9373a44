"""Speech encoders of transformers: AST (spectrogram patches) and the encoder of Whisper (frames).

Pre-LayerNorm encoders that differ in the names of their parts only: `ARCHITECTURES` is that table. A model is recognised by the library
module that defines it and its layers, never by a name in its config.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import ModelError

_HOME = "transformers.models"
Outputs = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
"""(model, normed ``x: [B, N, C]``, living rows or their weights ``[B, N]``) to the outputs by name."""


def _mean(x: Tensor, alive: Tensor) -> Tensor:
    """``[B, N, C]`` to ``[B, C]``: the mean over living rows, each by its weight."""
    weight = alive.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)


def _ast_pooled(model: Any, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
    return {"pooler_output": (x[:, 0] + x[:, 1]) / 2}


def _ast_logits(model: Any, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
    return {"logits": model.classifier((x[:, 0] + x[:, 1]) / 2)}


def _memory(model: Any, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
    return {"last_hidden_state": x, "memory_mask": alive != 0}


def _whisper_logits(model: Any, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
    return {"logits": model.classifier(_mean(model.projector(x), alive))}


def _ast_embed(encoder: Any, values: Tensor) -> Tensor:
    x: Tensor = encoder.embeddings(values)
    return x


def _whisper_embed(encoder: Any, values: Tensor) -> Tensor:
    x = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(values)))).permute(0, 2, 1)
    places = torch.arange(encoder.embed_positions.num_embeddings, device=x.device)
    y: Tensor = x + encoder.embed_positions(places)
    return y


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where one architecture keeps its parts. Paths are dotted.

    Attributes:
        home: the library module that must define the model and its layers.
        heads: class of a model -> the path of its encoder, empty for the encoder itself, what follows the last norm, and the
            outputs' names.
        layer: class of a layer.
        input: name of the input.
        shape: encoder -> the shape of one input.
        grid: encoder -> patches from low to high frequency, and in time.
        prefix: leading tokens that are no sound.
        embed: (encoder, input) to the first layer's input.
        norm: the last norm, below the encoder; the others below a layer.
        attention: the self-attention module: has ``scaling``.
        heads_path: its number of heads.
        project: the attention's output projection.
        norms: in front of the attention, and of the feed-forward.
        feed_forward: the MLP's modules, in order.
    """

    home: str
    heads: Mapping[str, tuple[str, Outputs, tuple[str, ...]]]
    layer: str
    input: str
    shape: Callable[[Any], tuple[int, int]]
    grid: Callable[[Any], tuple[int, int]]
    prefix: int
    embed: Callable[[Any, Tensor], Tensor]
    norm: str
    attention: str
    heads_path: str
    project: str
    norms: tuple[str, str]
    feed_forward: tuple[str, ...]


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        home=f"{_HOME}.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer",
        heads={
            "ASTModel": ("", _ast_pooled, ("pooler_output",)),
            "ASTForAudioClassification": ("audio_spectrogram_transformer", _ast_logits, ("logits",)),
        },
        layer="ASTLayer",
        input="input_values",
        shape=lambda encoder: (encoder.config.max_length, encoder.config.num_mel_bins),
        grid=lambda encoder: encoder.embeddings.get_shape(encoder.config),
        prefix=2,
        embed=_ast_embed,
        norm="layernorm",
        attention="attention",
        heads_path="attention.num_attention_heads",
        project="attention.o_proj",
        norms=("layernorm_before", "layernorm_after"),
        feed_forward=("mlp",),
    ),
    Architecture(
        home=f"{_HOME}.whisper.modeling_whisper",
        heads={
            "WhisperEncoder": ("", _memory, ("last_hidden_state", "memory_mask")),
            "WhisperForAudioClassification": ("encoder", _whisper_logits, ("logits",)),
        },
        layer="WhisperEncoderLayer",
        input="input_features",
        shape=lambda encoder: (encoder.num_mel_bins, 2 * encoder.max_source_positions),
        grid=lambda encoder: (1, encoder.max_source_positions),
        prefix=0,
        embed=_whisper_embed,
        norm="layer_norm",
        attention="self_attn",
        heads_path="self_attn.num_heads",
        project="self_attn.out_proj",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        feed_forward=("fc1", "activation_fn", "fc2"),
    ),
)


class Sounds(nn.Module):
    """A library model as it is; its output object becomes a dict.

    Attributes:
        model: the library's module.
        names: of the outputs; a memory's mask is all true.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.train(model.training)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """``input_values: [B, T, F]`` of AST, ``input_features: [B, F, T]`` of Whisper, float32."""
        result = self.model(**inputs)
        outputs = {name: result[name] for name in self.names if name != "memory_mask"}
        rows = next(iter(outputs.values()))
        more = {"memory_mask": torch.ones_like(rows.select(-1, 0), dtype=torch.bool)} if "memory_mask" in self.names else {}
        return {**outputs, **more}


@dataclass(frozen=True, slots=True)
class SpeechBlock:
    """One layer's own modules. Dropout is left out: it is the identity in eval mode."""

    names: Architecture
    layer: Any

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        heads: int = attrgetter(self.names.heads_path)(self.layer)
        return heads

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return float(attrgetter(self.names.attention)(self.layer).scaling)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x: [B, N, C]`` to query, key and value, each ``[B, H, N, D]``, behind the layer's first norm."""
        attention = attrgetter(self.names.attention)(self.layer)
        y = getattr(self.layer, self.names.norms[0])(x)
        query, key, value = (
            getattr(attention, f"{name}_proj")(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2) for name in "qkv"
        )
        return query, key, value

    def attention_output(self, context: Tensor, x: Tensor) -> Tensor:
        """``x + project(context)``, all ``[B, N, C]``."""
        y: Tensor = attrgetter(self.names.project)(self.layer)(context) + x
        return y

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + mlp(norm(x))``, all ``[B, N, C]``."""
        y = getattr(self.layer, self.names.norms[1])(x)
        for name in self.names.feed_forward:
            y = getattr(self.layer, name)(y)
        z: Tensor = y + x
        return z


@dataclass(frozen=True, slots=True)
class SpeechParts:
    """A model of the family by its parts; see `tpcompile.models.families.base.Parts`."""

    names: Architecture
    architecture: str
    dense: Sounds
    encoder: Any
    blocks: tuple[SpeechBlock, ...]
    outputs: Outputs
    token_level: bool = False

    @property
    def family(self) -> str:
        """``speech`` for every member of the family."""
        return "speech"

    @property
    def inputs(self) -> tuple[str, ...]:
        """One spectrogram."""
        return (self.names.input,)

    @property
    def prefix(self) -> int:
        """Number of CLS and distillation tokens."""
        return self.names.prefix

    @property
    def cls(self) -> bool:
        """The first token is a CLS token."""
        return self.names.prefix > 0

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from low to high frequency, and in time; frames are patches of all frequencies."""
        return self.names.grid(self.encoder)

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The spectrogram to ``x: [B, N, C]`` and ``alive: bool [B, N]``, all True.

        Raises:
            ModelError: a spectrogram of another size.
        """
        values, wanted = inputs[self.names.input], self.names.shape(self.encoder)
        if tuple(values.shape[1:]) != tuple(wanted):
            raise ModelError(
                f"{self.names.input} is {list(values.shape)}, the model takes [batch, {wanted[0]}, {wanted[1]}]",
                fix="pad or cut the spectrogram, as the model's feature extractor does",
            )
        x = self.names.embed(self.encoder, values)
        return x, torch.ones_like(x.select(2, 0), dtype=torch.bool)

    def head(self, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` (or weights, see `Parts.head`) to the outputs by name."""
        return self.outputs(self.dense.model, getattr(self.encoder, self.names.norm)(x), alive)


def parts(model: nn.Module) -> SpeechParts | None:
    """Name the parts of a speech encoder; None for a model of another family.

    Args:
        model: a library model, or a `Sounds` around one.

    Raises:
        ModelError: a known library module, but a class without a known head, or a layer that the user replaced.
    """
    inner: Any = model.model if isinstance(model, Sounds) else model
    names = next((row for row in ARCHITECTURES if row.home == type(inner).__module__), None)
    if names is None:
        return None
    kind = type(inner).__name__
    if kind not in names.heads:
        raise ModelError(f"tpcompile does not know the head of {kind}", fix=f"pass one of {', '.join(names.heads)}")
    if getattr(inner.config, "use_weighted_layer_sum", False) and names.heads[kind][0]:
        raise ModelError(f"{kind} sums the states of all layers", fix="build it with use_weighted_layer_sum=False")
    path, outputs, given = names.heads[kind]
    encoder = attrgetter(path)(inner) if path else inner
    for number, layer in enumerate(encoder.layers):
        if (type(layer).__module__, type(layer).__name__) != (names.home, names.layer):
            raise ModelError(
                f"layers.{number} is {type(layer).__module__}.{type(layer).__qualname__}, not the library's own module",
                fix=f"pass the model as transformers builds it, with {names.layer}; this layer's own forward would not be called",
            )
    dense = model if isinstance(model, Sounds) else Sounds(inner, given)
    return SpeechParts(names, kind, dense, encoder, tuple(SpeechBlock(names, layer) for layer in encoder.layers), outputs)
