"""`Method`: what a pruning method must bring, and `Pruned`: a dense model with a method between its parts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from types import MethodType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Parts, bind
from tpcompile.models.methods.dial import Dial, moving, turned


class Parameters(BaseModel):
    """Base of every method's parameters: unknown names are refused, values are JSON-able.

    Attributes:
        fill: what stands for a dropped token in outputs with one row per token: ``last``: its hidden state when it was dropped,
            ``zero``: zeros. No other output reads it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fill: Literal["last", "zero"] = "last"


class Step(NamedTuple):
    """What one block of a method returns.

    Attributes:
        x: hidden states ``[B, N, C]``, dropped rows included.
        alive: bool ``[B, N]``, the tokens that live on.
        score: ``[B, N]`` the decision came from; None where the block decides nothing.
        base: ``[B, N, C]``, the hidden states that went into ``ops.prune``; None where the block decides nothing.
        weight: float ``[B, N]``, what each row counts in a mean over tokens, 0 where it is dead; None: living rows count alike.
    """

    x: Tensor
    alive: Tensor
    score: Tensor | None = None
    base: Tensor | None = None
    weight: Tensor | None = None


class Method(nn.Module, ABC):
    """The blocks of a model in masked form, with a method's decisions in between.

    Subclasses set ``name`` and ``Parameters`` and fill ``steps`` with one module per block, each returning a `Step`.

    Attributes:
        dials: the parameters that move together to meet a FLOPs ratio; see `Dial`. The more a factor is, the fewer tokens stay.
        decided: of a method without one: what decides instead.
        steps: the blocks, in order.
    """

    name: ClassVar[str]
    Parameters: ClassVar[type[Parameters]]
    dials: ClassVar[tuple[Dial, ...]] = ()
    decided: ClassVar[str] = "it names no parameter that moves the number of its tokens"

    steps: nn.ModuleList

    @abstractmethod
    def __init__(self, parts: Parts, parameters: Any) -> None:
        """Build from a family's parts and validated parameters."""
        super().__init__()

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``; what each returned, in order."""
        steps: list[Step] = []
        for layer in self.steps:
            steps.append(layer(x, alive))
            x, alive = steps[-1].x, steps[-1].alive
        return tuple(steps)


def restored(steps: Sequence[Step], fill: str) -> Tensor:
    """The last block's hidden states with every dropped token brought back, the last site's first.

    Args:
        steps: of all blocks.
        fill: see `Parameters`.

    Returns:
        ``[B, N, C]``.
    """
    y = steps[-1].x
    for step in reversed(steps):
        if step.base is not None:
            y = ops.restore(y, step.alive, step.base if fill == "last" else torch.zeros_like(step.base))
    return y


def _named_after(inputs: Sequence[str]) -> Callable[..., dict[str, Tensor]]:
    """`Pruned.forward` with the inputs as its signature: torch.export matches dynamic shapes with parameters by name."""

    def forward(self: Pruned, *given: Tensor | None, **named: Tensor | None) -> dict[str, Tensor]:
        return Pruned.forward(self, *given, **named)

    own = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    rest = (own.replace(name=name, default=None if i else Parameter.empty) for i, name in enumerate(inputs))
    forward.__signature__ = Signature([own, *rest])  # type: ignore[attr-defined]  # functions take any attribute
    return forward


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened inside a pruned model, block by block.

    Attributes:
        outputs: the model's outputs.
        kept: per block, bool ``[B, N]``: alive after it.
        scores: per block, float32 ``[B, N]``; None where the block decides nothing.
        hidden: the embedding output, then per block its hidden states, ``[B, N, C]``.
        bases: per block, the hidden states at its decision, ``[B, N, C]``; None where the block decides nothing.
    """

    outputs: dict[str, Tensor]
    kept: tuple[Tensor, ...]
    scores: tuple[Tensor | None, ...]
    hidden: tuple[Tensor, ...]
    bases: tuple[Tensor | None, ...]


class Pruned(nn.Module):
    """A dense model and a method, in masked form: shapes stay, dropped tokens are hidden by masks and marked by ``ops.prune``.

    Attributes:
        dense: the model it wraps; same inputs, same output names.
        body: the method's blocks.
        method: the method's name.
        method_parameters: its parameters, JSON-able.
        family: name of the family that named the parts.
        parts: those parts.
        fill: what stands for a dropped token in outputs with one row per token; see `Parameters`.
    """

    def __init__(self, parts: Parts, body: Method, parameters: Parameters) -> None:
        super().__init__()
        self.dense = parts.dense
        self.body = body
        self.method = body.name
        self.method_parameters: dict[str, Any] = parameters.model_dump(mode="json", exclude_none=True)
        self.family = parts.family
        self.parts = parts
        self.fill = parameters.fill
        self.__dict__["forward"] = MethodType(_named_after(parts.inputs), self)
        self.eval()

    def forward(self, *given: Tensor | None, **named: Tensor | None) -> dict[str, Tensor]:
        """The dense model's inputs (``parts.inputs``), by position or by name, to its outputs by name.

        Raises:
            InputError: an input that the model does not take, or its first one missing.
        """
        x, entry = self.parts.embed(bind(self.parts.inputs, given, named))
        steps: tuple[Step, ...] = self.body(x, entry)
        if self.parts.token_level:
            return self.parts.head(restored(steps, self.fill), entry)
        last = steps[-1]
        return self.parts.head(last.x, last.alive if last.weight is None else last.weight)

    @torch.no_grad()
    def tokens(self, *given: Tensor | None, **named: Tensor | None) -> int:
        """Tokens at the first block of all samples together, without padding; inputs as for ``forward``."""
        return int(self.parts.embed(bind(self.parts.inputs, given, named))[1].sum())

    @property
    def moves(self) -> tuple[str, ...]:
        """The parameters that ``turned`` moves.

        Raises:
            UsageError: the method has no dial, or none of its parameters can move from where it stands.
        """
        if not self.body.dials:
            raise UsageError(
                f"method {self.method} cannot be fitted to a FLOPs ratio: {self.body.decided}",
                fix="leave the FLOPs ratio out, or choose a method that has a dial, such as ltp or evit",
            )
        found = moving(self.body.dials, self.method_parameters)
        if not found:
            names = ", ".join(dial.parameter for dial in self.body.dials)
            raise UsageError(
                f"method {self.method} has nothing to move: no value of {names} is given that is not at its end",
                fix="give values that drop some tokens: their proportions stay, a common factor is found",
            )
        return found

    def turned(self, factor: float) -> "Pruned":
        """The same model with the method's dial turned: with a factor below 1 more tokens stay, with one above fewer."""
        checked = self.body.Parameters.model_validate(turned(self.body.dials, self.method_parameters, factor))
        return Pruned(self.parts, type(self.body)(self.parts, checked), checked)

    @torch.no_grad()
    def trace(self, *given: Tensor | None, **named: Tensor | None) -> Trace:
        """Run once, as ``forward``, and return what every block decided. For tests and reports; ``forward`` records nothing."""
        seen: list[tuple[Tensor, tuple[Step, ...]]] = []
        hook = self.body.register_forward_hook(lambda _, args, steps: seen.append((args[0], steps)))
        try:
            outputs = self(*given, **named)
        finally:
            hook.remove()
        embedded, steps = seen[0]
        return Trace(
            outputs=outputs,
            kept=tuple(step.alive for step in steps),
            scores=tuple(step.score for step in steps),
            hidden=(embedded, *(step.x for step in steps)),
            bases=tuple(step.base for step in steps),
        )
