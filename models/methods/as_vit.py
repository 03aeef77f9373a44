"""AS-ViT, adaptive sparse ViT (arXiv 2209.13802, IJCAI 2023), evaluation at batch 1: learned thresholds on a CLS attention.

In block ``l`` with heads' contexts ``o = A V`` a patch ``n`` scores ``s[n] = sum_h w[h, n] * A[h, 0, n]``, where ``w[h, n] = |o[h, n]| /
(sum_h' |o[h', n]| + 1e-8)`` weighs the heads. At the *entry* of each listed block the patches that scored
above the stage's threshold in the block before stay (strictly above). CLS always stays; survivors keep their order; nothing is merged.

Deviations:

- a batch is as many single samples: every sample keeps its own count. The published code switches to one count for the whole batch, the
  mean, taken by top-k: another function, not offered.
- the running average of scores (``ema_accu``) is not offered: ``accu``, their sum, is.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_cls, check_locations
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.masked import attention, joined, leading

LOCATIONS = {12: [4, 7, 10], 16: [5, 9, 13], 20: [6, 11, 16]}
"""Depth -> the paper's blocks."""

EPS = 1e-8
"""Beside the sum of the heads' norms."""

RECORDED = 2
"""The first block whose score a sum of scores takes."""


class AsVitParameters(base.Parameters):
    """Parameters of AS-ViT.

    Attributes:
        thresholds: one per stage, 0 or more; a patch stays above it.
        pruning_loc: the blocks at whose entry stages decide, from 1; default: the paper's for 12, 16 and 20 blocks.
        accu: a stage compares the sum of the scores since block 2 instead of the last block's.
    """

    thresholds: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    pruning_loc: list[int] | None = None
    accu: bool = False


class AsVitLayer(nn.Module):
    """One block, with a decision at its entry or none, and its score for the block behind it.

    Attributes:
        threshold: float32, 0-d; None where the block decides nothing.
        scores: whether a later block reads this one's score.
    """

    threshold: Tensor | None

    def __init__(self, block: Block, theta: float | None, scores: bool) -> None:
        super().__init__()
        self.block = block
        self.scores = scores
        self.register_buffer("threshold", None if theta is None else torch.tensor(theta, dtype=torch.float32))

    def forward(self, x: Tensor, alive: Tensor, score: Tensor | None) -> tuple[Step, Tensor | None]:
        """Run the block.

        Args:
            x: hidden states ``[B, N, C]``.
            alive: bool ``[B, N]``.
            score: ``[B, N]`` so far; None before the first.

        Returns:
            What the block did, and its score ``[B, N]``, None where nobody reads it.
        """
        entry = x
        decides = self.threshold is not None and score is not None
        if self.threshold is not None and score is not None:
            alive = torch.logical_and(alive, torch.logical_or(score > self.threshold, leading(x, 1)))
            x = ops.prune(x, alive, score)
        weights, value = attention(self.block, x, alive)
        context = weights @ value
        found = _score(weights, context) if self.scores else None
        y = self.block.feed_forward(self.block.attention_output(joined(context, x), x))
        return Step(y, alive, score, entry) if decides else Step(y, alive), found


def _score(weights: Tensor, context: Tensor) -> Tensor:
    """Attention ``[B, H, N, N]`` and contexts ``[B, H, N, D]`` to a score per token ``[B, N]``."""
    norms = torch.linalg.vector_norm(context, dim=-1)
    share = norms / (norms.sum(dim=1, keepdim=True) + EPS)
    score: Tensor = (share * weights.select(2, 0)).sum(dim=1)
    return score


class AsVit(Method):
    """AS-ViT over all blocks of a model with one CLS token."""

    name: ClassVar[str] = "as_vit"
    Parameters = AsVitParameters
    dials = (Dial("thresholds", most=16.0),)  # of ``accu`` the score is a sum over blocks

    def __init__(self, parts: Parts, parameters: AsVitParameters) -> None:
        super().__init__(parts, parameters)
        check_cls(self.name, parts)
        if parts.prefix != 1:
            raise UsageError(
                f"as_vit knows a CLS token and patches, and this {parts.architecture} has {parts.prefix} leading tokens",
                fix="use a model without distillation and register tokens, or --method cls-attention",
            )
        depth = len(parts.blocks)
        places = parameters.pruning_loc if parameters.pruning_loc is not None else LOCATIONS.get(depth)
        if places is None:
            raise UsageError(
                f"the paper has no blocks for a model of {depth}", fix="add --param pruning_loc=[4,7,10] with your blocks"
            )
        check_locations("pruning_loc", places, depth, first=1)
        if len(parameters.thresholds) != len(places):
            raise UsageError(
                f"thresholds has {len(parameters.thresholds)} values, and there are {len(places)} stages, at blocks {places}",
                fix=f"pass {len(places)} thresholds, or other blocks with --param pruning_loc",
            )
        stages = dict(zip(places, parameters.thresholds, strict=True))
        read = set(range(RECORDED, max(places, default=0))) if parameters.accu else set()
        read |= {place - 1 for place in places}
        self.accu = parameters.accu
        self.steps = nn.ModuleList(AsVitLayer(block, stages.get(i), i in read) for i, block in enumerate(parts.blocks))

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``; what each returned, in order."""
        score: Tensor | None = None
        steps: list[Step] = []
        for layer in self.steps:
            step, found = layer(x, alive, score)
            steps.append(step)
            x, alive = step.x, step.alive
            score = score + found if self.accu and score is not None and found is not None else found
        return tuple(steps)
