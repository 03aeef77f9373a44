"""`Method`: what a pruning method must bring, and `Pruned`: a dense model with a method between its parts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tpcompile.models.families import Parts, alive_tokens


class Parameters(BaseModel):
    """Base of every method's parameters: unknown names are refused, values are JSON-able."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Step(NamedTuple):
    """What one block of a method returns.

    Attributes:
        x: hidden states ``[B, N, C]``, dropped rows included.
        alive: bool ``[B, N]``, the tokens that live on.
        score: ``[B, N]`` the decision came from; None where the block decides nothing.
    """

    x: Tensor
    alive: Tensor
    score: Tensor | None


class Method(nn.Module, ABC):
    """The blocks of a model in masked form, with a method's decisions in between.

    Subclasses set ``name`` and ``Parameters`` and fill ``steps`` with one module per block, each returning a `Step`.

    Attributes:
        steps: the blocks, in order.
    """

    name: ClassVar[str]
    Parameters: ClassVar[type[BaseModel]]

    steps: nn.ModuleList

    @abstractmethod
    def __init__(self, parts: Parts, parameters: Any) -> None:
        """Build from a family's parts and validated parameters."""
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks: ``x: [B, N, C]``, ``alive: bool [B, N]`` to the same after the last one."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened inside a pruned model, block by block.

    Attributes:
        outputs: the model's outputs.
        kept: per block, bool ``[B, N]``: alive after it.
        scores: per block, float32 ``[B, N]``; None where the block decides nothing.
        hidden: the embedding output, then per block its hidden states, ``[B, N, C]``.
    """

    outputs: dict[str, Tensor]
    kept: tuple[Tensor, ...]
    scores: tuple[Tensor | None, ...]
    hidden: tuple[Tensor, ...]


class Pruned(nn.Module):
    """A dense model and a method, in masked form: shapes stay, dropped tokens are hidden by masks and marked by ``ops.prune``.

    Attributes:
        dense: the model it wraps; same inputs, same output names.
        body: the method's blocks.
        method: the method's name.
        method_parameters: its parameters, JSON-able.
        family: name of the family that named the parts.
        parts: those parts.
    """

    def __init__(self, parts: Parts, body: Method, parameters: BaseModel) -> None:
        super().__init__()
        self.dense = parts.dense
        self.body = body
        self.method = body.name
        self.method_parameters: dict[str, Any] = parameters.model_dump(mode="json")
        self.family = parts.family
        self.parts = parts
        self.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``token_type_ids``: int64 ``[B, N]`` to the dense model's outputs by name."""
        x = self.parts.embed(input_ids, token_type_ids, attention_mask)
        x, alive = self.body(x, alive_tokens(input_ids, attention_mask))
        return self.parts.head(x, alive)

    @torch.no_grad()
    def trace(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Trace:
        """Run once and return what every block decided. For tests and reports; ``forward`` itself records nothing.

        Args:
            input_ids: int64 ``[B, N]``.
            attention_mask: int64 ``[B, N]``, 0 for padding.
            token_type_ids: int64 ``[B, N]``.
        """
        inputs: list[Tensor] = []
        steps: list[Step] = []
        hooks = [self.body.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))]
        hooks += [step.register_forward_hook(lambda _, args, result: steps.append(result)) for step in self.body.steps]
        try:
            outputs = self(input_ids, attention_mask, token_type_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return Trace(
            outputs=outputs,
            kept=tuple(step.alive for step in steps),
            scores=tuple(step.score for step in steps),
            hidden=(inputs[0], *(step.x for step in steps)),
        )
