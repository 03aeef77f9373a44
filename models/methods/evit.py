"""EViT, expediting vision transformers via token reorganizations (arXiv 2202.07800, ICLR 2022), section 3.2 and equation 3.

Between attention and feed-forward of a few blocks, the tokens that the CLS token attends to most stay, ``ceil(keep_rate * N)`` of the N
behind the prefix; the others become one *fused* token: the sum of their hidden states, each times its attention, as in the official code
not normalised. The fused token comes last, and is a token like any other to the blocks behind.

Deviations: none at batch 1 or more. Where several tokens come first (distillation, registers), all of them are kept and none is a
candidate; equal attentions are kept in order, where the official code leaves that to the sort.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_images, check_locations
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.gathered import Blocks, Plain, Rate, attend, attention_of_cls, behind, fetch, ranked, scored


class EvitParameters(base.Parameters):
    """Parameters of EViT.

    Attributes:
        base_keep_rate: share of the tokens behind the prefix that stay at each location.
        drop_loc: the blocks that drop.
        fuse_token: fuse what is dropped into one token; else it is gone.
    """

    base_keep_rate: Rate = 0.7
    drop_loc: Blocks = Field(default=[3, 6, 9])
    fuse_token: bool = True


class Evit(Method):
    """EViT over all blocks of a model."""

    name: ClassVar[str] = "evit"
    Parameters = EvitParameters
    dials = (Dial("base_keep_rate", "from one", least=0.01),)

    def __init__(self, parts: Parts, parameters: EvitParameters) -> None:
        super().__init__(parts, parameters)
        check_images(self.name, parts)
        check_locations("drop_loc", parameters.drop_loc, len(parts.blocks))
        self.steps = nn.ModuleList(
            EvitBlock(block, parts.prefix, parameters.base_keep_rate, parameters.fuse_token)
            if number in parameters.drop_loc and parameters.base_keep_rate < 1
            else Plain(block)
            for number, block in enumerate(parts.blocks)
        )


class EvitBlock(nn.Module):
    """A block that keeps a share of its tokens."""

    def __init__(self, block: Block, prefix: int, rate: float, fuse: bool) -> None:
        super().__init__()
        self.block, self.prefix, self.rate, self.fuse = block, prefix, rate, fuse

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """``x: [B, N, C]``, ``alive: bool [B, N]``, all True, to ``[B, K, C]``."""
        x, attention, _ = attend(self.block, x)
        score = attention_of_cls(attention, self.prefix)
        count = math.ceil(self.rate * score.shape[1])
        order = ranked(score)
        index = behind(self.prefix, order[:, :count])
        rows = fetch(x, index)
        if self.fuse:
            lost = behind(self.prefix, order)[:, self.prefix + count :]
            weight = score.gather(1, order[:, count:]).unsqueeze(1)
            rows = torch.cat([rows, weight @ fetch(x, lost)], dim=1)
            index = torch.cat([index, index.new_full((index.shape[0], 1), -1)], dim=1)
        rows = ops.gathered(rows, x, index, score=scored(self.prefix, score))
        return Step(self.block.feed_forward(rows), torch.ones_like(rows.select(2, 0), dtype=torch.bool))
