"""ATS, adaptive token sampling (arXiv 2111.15667, ECCV 2022), sections 3.1 and 3.2: no parameters, no training.

Inside the attention of a block, a token's significance is the attention that the CLS token pays it, summed over heads, times the norm of
its value (all heads together), over the sum of all. The tokens in rising significance give a cumulative distribution; evenly spaced
values are looked up in it, and the tokens found nearest stay, each once: many where significance is spread, few where it is concentrated.
Only *queries* are dropped: all tokens that enter the block are still keys and values there.

Deviations: the softmax is plain, where the official code's carries an eps of 1e-6 (up to 2.5e-6 in the logits of the oracle's cases). In
a batch every sample is sampled as it is alone: the official code lets the padding of a batch into the distribution. What stays keeps its
order, where the official code sorts by significance; nothing reads the order.
"""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_images, check_locations
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.gathered import Blocks, Plain, fetch, hidden

FAR = float("inf")
TINY = 1e-30


class AtsParameters(base.Parameters):
    """Parameters of ATS.

    Attributes:
        ats_blocks: the blocks that sample.
        num_tokens: the most tokens that a block keeps, the CLS token included; None: as many as the model has.
    """

    ats_blocks: Blocks = Field(default=[3, 4, 5, 6, 7, 8, 9, 10, 11])
    num_tokens: Annotated[int, Field(ge=3)] | None = None


class Ats(Method):
    """ATS over all blocks of a model."""

    name: ClassVar[str] = "ats"
    Parameters = AtsParameters
    dials = (Dial("num_tokens", "over", least=3, most=4096),)

    def __init__(self, parts: Parts, parameters: AtsParameters) -> None:
        super().__init__(parts, parameters)
        check_images(self.name, parts)
        check_locations("ats_blocks", parameters.ats_blocks, len(parts.blocks))
        self.num_tokens = parameters.num_tokens
        self.steps = nn.ModuleList(
            AtsBlock(block, parts.prefix) if number in parameters.ats_blocks else Plain(block, hides=True)
            for number, block in enumerate(parts.blocks)
        )

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``; what each returned, in order."""
        samples = (self.num_tokens or x.shape[1]) - 1
        steps: list[Step] = []
        for layer in self.steps:
            steps.append(layer(x, alive) if isinstance(layer, Plain) else layer(x, alive, samples))
            x, alive = steps[-1].x, steps[-1].alive
        return tuple(steps)


class AtsBlock(nn.Module):
    """A block that samples its queries."""

    def __init__(self, block: Block, prefix: int) -> None:
        super().__init__()
        self.block, self.prefix = block, prefix

    def forward(self, x: Tensor, alive: Tensor, samples: int) -> Step:
        """``x: [B, N, C]`` and ``alive: bool [B, N]`` to ``[B, K, C]``; ``samples`` values are looked up."""
        query, key, value = self.block.qkv(x)
        bias = hidden(alive)
        front = torch.arange(x.shape[1], device=x.device) < self.prefix
        open_ = torch.logical_and(alive, torch.logical_not(front))
        paid = ((query[:, :, :1] * self.block.scale) @ key.transpose(-1, -2) + bias).softmax(dim=-1).sum(dim=(1, 2))
        weight = torch.where(open_, paid * value.square().sum(dim=(1, 3)).sqrt(), 0.0)
        score = weight / weight.sum(dim=1, keepdim=True)
        keep = torch.logical_or(torch.logical_and(front, alive), sampled(score, open_, samples))
        rows, living, index = ops.compact(x, keep, front.unsqueeze(0), score)
        rows = ops.gathered(rows, x, index, keep, torch.where(open_, score, math.nan))
        heads = query.shape[1]
        asked = (
            fetch(query.transpose(1, 2).reshape(x.shape), index).reshape(rows.shape[0], -1, heads, query.shape[3]).transpose(1, 2)
        )
        attention = ((asked * self.block.scale) @ key.transpose(-1, -2) + bias).softmax(dim=-1)
        context = (attention @ value).transpose(1, 2).reshape(rows.shape)
        return Step(self.block.feed_forward(self.block.attention_output(context, rows)), living)


def sampled(score: Tensor, open_: Tensor, samples: int) -> Tensor:
    """The tokens that are nearest to evenly spaced values of the cumulative distribution.

    Args:
        score: float ``[B, N]``, 0 for tokens that are no candidates; sums to 1.
        open_: bool ``[B, N]``, the candidates.
        samples: how many values.

    Returns:
        bool ``[B, N]``.
    """
    rising, order = torch.sort(torch.where(open_, score, FAR), dim=1, stable=True)
    there = rising < FAR  # the candidates come first
    cdf = torch.where(there, rising, 0.0).cumsum(dim=1)
    low, high = torch.where(there, cdf, FAR).amin(dim=1, keepdim=True), cdf.amax(dim=1, keepdim=True)
    cdf = (cdf - low) / (high - low).clamp(min=TINY)  # one candidate is its own distribution, and stays
    first = torch.where(torch.logical_and(there, cdf > 0), cdf, 1.0).amin(dim=1, keepdim=True)
    steps = torch.arange(samples, device=score.device, dtype=score.dtype) / (samples - 1)
    values = first + (1.0 - first) * steps
    distance = torch.where(there.unsqueeze(1), (values.unsqueeze(2) - cdf.unsqueeze(1)).abs(), FAR)
    nearest = distance.argmin(dim=2)
    found = (nearest.unsqueeze(1) == torch.arange(score.shape[1], device=score.device).unsqueeze(1)).any(dim=2)
    return found.gather(1, order.argsort(dim=1))
