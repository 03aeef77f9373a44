"""What a family gives a method: the named parts of a library's own model, and nothing re-implemented."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from tpcompile.errors import InputError


class Block(Protocol):
    """One transformer block, cut at the places where token pruning works."""

    @property
    def heads(self) -> int:
        """Number of attention heads ``H``."""

    @property
    def scale(self) -> float:
        """Factor of the attention logits, ``1 / sqrt(D)`` as a rule."""

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x: [B, N, C]`` to query, key and value, each ``[B, H, N, D]``; a norm in front of the attention is included."""

    def attention_output(self, context: Tensor, x: Tensor) -> Tensor:
        """Projection and residual, with the norm behind it if there is one: ``context, x: [B, N, C] -> [B, N, C]``."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP with its residual and norm: ``[B, N, C] -> [B, N, C]``."""


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
        """The unpruned model: takes ``inputs``, returns a dict of the outputs that ``head`` gives."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs in forward's order; the first one is required."""

    @property
    def prefix(self) -> int:
        """Number of leading tokens that are no words or patches: CLS, distillation, registers."""

    @property
    def cls(self) -> bool:
        """The first token is a CLS token, which gathers what an output reads."""

    @property
    def token_level(self) -> bool:
        """The outputs have one row per token."""

    def embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Inputs by name to ``x: [B, N, C]``, the first block's input, and ``alive: bool [B, N]``, the tokens that are no padding."""

    def head(self, x: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` to the model's outputs by name.

        A model of texts takes weights in ``alive`` as well, float ``[B, N]``, 0 for dead rows: its mean over tokens is weighted then.
        """


def bind(inputs: Sequence[str], given: Sequence[Tensor | None], named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """A call's arguments by name; None means absent.

    Args:
        inputs: the model's input names in order; the first one is required.
        given: arguments by position.
        named: arguments by name.

    Raises:
        InputError: an input the model does not take, one given twice, or the first one missing.
    """
    takes = f"the model takes {', '.join(inputs)}"
    if len(given) > len(inputs):
        raise InputError(f"{len(given)} inputs given, {takes}", fix="leave out the inputs behind the last of these")
    placed: dict[str, Tensor | None] = dict(zip(inputs, given, strict=False))
    for name, value in named.items():
        if name not in inputs and value is not None:
            raise InputError(f"the model takes no {name}", fix=f"leave {name} out: {takes}")
        if placed.get(name) is not None:
            raise InputError(f"{name} is given twice, by position and by name", fix="give it once")
        placed[name] = value
    bound = {name: value for name, value in placed.items() if value is not None}
    if inputs[0] not in bound:
        raise InputError(f"{inputs[0]} is missing", fix=f"pass {inputs[0]}: {takes}")
    return bound
