"""What methods with one score threshold per layer share: the masked block, and the decision in its middle.

The decision falls between a block's attention output and its feed-forward: the attention still sees every token alive at entry,
the feed-forward and all that follows only those kept.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.masked import attention, joined, leading

FLOOR = 1e-5
"""Lower bound of an active threshold, as in the official LTP: it keeps tokens without attention, the dead ones, below every one."""

Score = Callable[[Tensor], Tensor]
"""Attention ``[B, H, N, N]``, softmaxed, rows of dead queries 0, to a score per token ``[B, N]``."""


Thresholds = list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
"""One per layer, 0 or more."""


class ThresholdParameters(base.Parameters):
    """Parameters of a method with thresholds.

    Attributes:
        thresholds: one per layer, 0 or more; 0 switches the layer's decision off.
    """

    thresholds: Thresholds


class ThresholdLayer(nn.Module):
    """One block with a decision between its attention output and its feed-forward.

    Attributes:
        threshold: float32, 0-d.
        active: False for a threshold of exactly 0: the block hands its mask on.
        protected: number of leading tokens that never fall.
        least: lower bound of an active threshold.
    """

    threshold: Tensor
    least: ClassVar[float] = FLOOR

    def __init__(self, block: Block, theta: float, protected: int) -> None:
        super().__init__()
        self.block = block
        self.protected = protected
        exact = torch.tensor(theta, dtype=torch.float32)
        self.active = bool(exact != 0)
        self.register_buffer("threshold", exact.clamp(min=self.least))

    def forward(self, x: Tensor, alive: Tensor, score_of: Score, entry: Tensor) -> Step:
        """Run the block.

        Args:
            x: hidden states ``[B, N, C]``.
            alive: bool ``[B, N]``, tokens alive at entry.
            score_of: the method's score.
            entry: bool ``[B, N]``, tokens alive at the first block's entry.
        """
        weights, value = attention(self.block, x, alive)
        x = self.block.attention_output(joined(weights @ value, x), x)
        if not self.active:
            return Step(self.block.feed_forward(x), alive)
        score = score_of(weights)
        keep = torch.logical_and(alive, self._or_protected(self.wanted(score, alive, entry)))
        return Step(self.block.feed_forward(ops.prune(x, keep, score)), keep, score, x)

    def wanted(self, score: Tensor, alive: Tensor, entry: Tensor) -> Tensor:
        """The decision: at the threshold or above.

        Args:
            score: ``[B, N]``.
            alive: bool ``[B, N]``, tokens alive at the block's entry.
            entry: bool ``[B, N]``, tokens alive at the first block's entry.

        Returns:
            bool ``[B, N]``.
        """
        return score >= self.threshold

    def _or_protected(self, wanted: Tensor) -> Tensor:
        """``wanted: bool [B, N]``, and the protected tokens."""
        return torch.logical_or(wanted, leading(wanted, self.protected)) if self.protected else wanted


class ThresholdMethod(Method):
    """One threshold per layer over all blocks of a model; subclasses say what the score is."""

    def __init__(
        self,
        parts: Parts,
        parameters: base.Parameters,
        thresholds: Sequence[float],
        protected: int,
        layer: type[ThresholdLayer] = ThresholdLayer,
    ) -> None:
        """Build one layer per block.

        Args:
            parts: of the model.
            parameters: of the method.
            thresholds: one per block.
            protected: number of leading tokens that never fall.
            layer: makes a block's layer.
        """
        super().__init__(parts, parameters)
        check_length(thresholds, len(parts.blocks))
        self.steps = nn.ModuleList(layer(block, theta, protected) for block, theta in zip(parts.blocks, thresholds, strict=True))

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``; what each returned, in order."""
        score_of, entry = self.score(x, alive), alive
        steps: list[Step] = []
        for layer in self.steps:
            steps.append(layer(x, alive, score_of, entry))
            x, alive = steps[-1].x, steps[-1].alive
        return tuple(steps)

    @abstractmethod
    def score(self, x: Tensor, alive: Tensor) -> Score:
        """The score function for one run on ``x: [B, N, C]``, ``alive: bool [B, N]``, the first block's input."""


def check_length(thresholds: Sequence[float], layers: int) -> None:
    """Demand one threshold per layer.

    Raises:
        UsageError: naming both lengths.
    """
    if len(thresholds) != layers:
        raise UsageError(
            f"thresholds has {len(thresholds)} values, the model has {layers} layers",
            fix=f"pass {layers} thresholds, 0 for a layer that should not prune",
        )
