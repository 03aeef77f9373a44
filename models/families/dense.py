"""Dense text models with one calling convention: ``(input_ids, attention_mask=None, token_type_ids=None) -> dict[str, Tensor]``."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tpcompile.errors import InputError, UsageError


def alive_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The attention mask as bool ``[B, N]``; all True where none is given.

    Raises:
        InputError: the mask is not ``[B, N]``.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.dim() != 2:
        raise InputError(
            f"attention_mask has {attention_mask.dim()} dims, a mask of real tokens has 2",
            fix="pass int64 [batch, tokens]: 1 for a token, 0 for padding",
        )
    return attention_mask != 0


class Dense(nn.Module):
    """A library model as it is; its output object becomes a dict.

    Attributes:
        model: the library's module.
        outputs: names of the outputs to return, such as ``logits`` or ``pooler_output``.
        token_types: the model takes ``token_type_ids``.
    """

    def __init__(self, model: nn.Module, outputs: tuple[str, ...], token_types: bool) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        self.token_types = token_types
        self.train(model.training)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``token_type_ids``: int64 ``[B, N]``."""
        result = self.model(**call(input_ids, attention_mask, token_type_ids, self.token_types))
        return {name: getattr(result, name) for name in self.outputs}


class TokenEncoder(Dense):
    """A bare encoder of the library whose output is a vector per token, ``{"last_hidden_state": [B, N, C]}``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder, ("last_hidden_state",), has_token_types(encoder))


def has_token_types(encoder: nn.Module) -> bool:
    """Whether an encoder of the library takes ``token_type_ids``."""
    return hasattr(getattr(encoder, "embeddings", None), "token_type_embeddings")


class Pooling(nn.Module):
    """Token vectors to one sentence vector: the mean over the alive tokens, or the first token; L2-normalised on request."""

    MODES: ClassVar[tuple[str, ...]] = ("mean", "cls")

    def __init__(self, mode: str, normalize: bool) -> None:
        super().__init__()
        if mode not in self.MODES:
            raise UsageError(f"unknown pooling {mode!r}", fix=f"use one of {', '.join(self.MODES)}")
        self.mode = mode
        self.normalize = normalize

    def forward(self, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` or weights, float ``[B, N]``, to ``{"sentence_embedding": [B, C]}``."""
        if self.mode == "cls":
            vector = x[:, 0]
        else:
            mask = alive.to(x.dtype).unsqueeze(-1)
            vector = (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return {"sentence_embedding": nn.functional.normalize(vector, p=2.0, dim=-1) if self.normalize else vector}


class SentenceEncoder(nn.Module):
    """A bare encoder of the library with sentence pooling, as sentence-transformers defines it.

    Attributes:
        encoder: the library's encoder (``BertModel``, ``DistilBertModel``, ...).
        pooling: the `Pooling`.
        token_types: the encoder takes ``token_type_ids``.
    """

    def __init__(self, encoder: nn.Module, pooling: str = "mean", normalize: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = Pooling(pooling, normalize)
        self.token_types = has_token_types(encoder)
        self.train(encoder.training)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``token_type_ids``: int64 ``[B, N]`` to ``{"sentence_embedding": [B, C]}``."""
        x = self.encoder(**call(input_ids, attention_mask, token_type_ids, self.token_types)).last_hidden_state
        pooled: dict[str, Tensor] = self.pooling(x, alive_tokens(input_ids, attention_mask))
        return pooled


def call(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, token_types: bool) -> dict[str, Any]:
    """The library's keyword arguments. Absent token types are zeros, as in the library, without its detour through a buffer.

    Raises:
        InputError: ``token_type_ids`` for a model that has none.
    """
    kwargs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if token_types:
        kwargs["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    elif token_type_ids is not None:
        raise InputError("this model takes no token_type_ids", fix="leave token_type_ids out")
    return kwargs
