"""What a family gives a method: the named parts of a library's own model, and nothing re-implemented."""

from typing import Protocol

from torch import Tensor, nn


class Block(Protocol):
    """One transformer block, cut at the places where token pruning works."""

    @property
    def heads(self) -> int:
        """Number of attention heads ``H``."""

    @property
    def scale(self) -> float:
        """Factor of the attention logits, ``1 / sqrt(D)`` as a rule."""

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x: [B, N, C]`` to query, key and value, each ``[B, H, N, D]``."""

    def attention_output(self, context: Tensor, x: Tensor) -> Tensor:
        """Projection, residual and LayerNorm: ``context, x: [B, N, C] -> [B, N, C]``."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP with its residual and LayerNorm: ``[B, N, C] -> [B, N, C]``."""


class Parts(Protocol):
    """A whole model by its parts. ``dense`` is that same model, called as the library calls it."""

    @property
    def family(self) -> str:
        """The family's name, such as ``bert``."""

    @property
    def architecture(self) -> str:
        """The library's class, such as ``BertForSequenceClassification``."""

    @property
    def dense(self) -> nn.Module:
        """The unpruned model: ``(input_ids, attention_mask=None, token_type_ids=None) -> dict`` of the outputs ``head`` gives."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order."""

    @property
    def max_length(self) -> int:
        """Longest sequence the position table holds."""

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """``input_ids: int64 [B, N] -> [B, N, C]``, the first block's input."""

    def head(self, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` to the model's outputs by name."""
