"""DynamicViT, dynamic token sparsification (arXiv 2106.02034, NeurIPS 2021), section 3.2, in its gathered form of inference.

In front of a few blocks a trained predictor scores the tokens behind the prefix; those of highest score stay, ``int(keep_ratio * N)`` of
the N patches of the image, and the others are gone. The masked form of training decides by Gumbel noise, and its softmax carries an eps:
it is another function, and not this one.

Deviations: none at batch 1 or more. N is the model's number of patches, where the official code has 196; equal scores are kept in order.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_images, check_locations
from tpcompile.models.methods.gathered import Blocks, Plain, Rate, behind, fetch, ranked, scored
from tpcompile.models.methods.predictor import Predictor, attached


class DynamicVitParameters(base.Parameters):
    """Parameters of DynamicViT.

    Attributes:
        prune_loc: the blocks that tokens are dropped in front of.
        keep_ratio: share of the image's patches that stay at each location, as a list; one number: its powers, the first, the second, ...
    """

    prune_loc: Blocks = Field(default=[3, 6, 9], min_length=1)
    keep_ratio: Rate | list[Rate] = 0.7


class OfPatches(Method):
    """A method that keeps shares of the image's patches: its dropping blocks are told how many there are."""

    prefix: int

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``, all True; what each returned, in order."""
        patches = x.shape[1] - self.prefix
        steps: list[Step] = []
        for layer in self.steps:
            steps.append(layer(x, alive) if isinstance(layer, Plain) else layer(x, patches))
            x, alive = steps[-1].x, steps[-1].alive
        return tuple(steps)


class DynamicVit(OfPatches):
    """DynamicViT over all blocks of a model."""

    name: ClassVar[str] = "dynamicvit"
    Parameters = DynamicVitParameters
    decided = "its predictors are trained for one keep_ratio"

    def __init__(self, parts: Parts, parameters: DynamicVitParameters) -> None:
        super().__init__(parts, parameters)
        check_images(self.name, parts, cls=False)
        check_locations("prune_loc", parameters.prune_loc, len(parts.blocks))
        predictors = attached(self.name, parts, len(parameters.prune_loc))
        stages = dict(zip(parameters.prune_loc, zip(predictors, ratios(parameters), strict=True), strict=True))
        self.steps = nn.ModuleList(
            Entry(block, parts.prefix, *stages[number]) if number in stages else Plain(block)
            for number, block in enumerate(parts.blocks)
        )
        self.prefix = parts.prefix


class Entry(nn.Module):
    """A block that drops tokens before it runs."""

    def __init__(self, block: Block, prefix: int, predictor: Predictor, ratio: float) -> None:
        super().__init__()
        self.plain, self.prefix, self.predictor, self.ratio = Plain(block), prefix, predictor, ratio

    def forward(self, x: Tensor, patches: int) -> Step:
        """``x: [B, N, C]`` and the image's number of patches to ``[B, K, C]``."""
        score = self.predictor(x[:, self.prefix :])
        order = ranked(score)
        index = behind(self.prefix, order[:, : count(patches, self.ratio)])
        rows = ops.gathered(fetch(x, index), x, index, score=scored(self.prefix, score))
        step: Step = self.plain(rows, torch.ones_like(rows.select(2, 0), dtype=torch.bool))
        return step


def ratios(parameters: DynamicVitParameters) -> list[float]:
    """The share of the image's patches that each location keeps.

    Raises:
        UsageError: a list of another length.
    """
    stages = len(parameters.prune_loc)
    if not isinstance(parameters.keep_ratio, list):
        return [parameters.keep_ratio ** (stage + 1) for stage in range(stages)]
    if len(parameters.keep_ratio) != stages:
        raise UsageError(
            f"keep_ratio has {len(parameters.keep_ratio)} values, prune_loc {stages}",
            fix="give a ratio for each block, or one number",
        )
    return parameters.keep_ratio


def count(patches: int, ratio: float) -> int:
    """How many patches stay, at least one."""
    return max(1, int(patches * ratio))
