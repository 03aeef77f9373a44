"""JMP (reconstruction): joint merging and pruning (J. Electronic Imaging 33(4), 043045, 2024).

Only the abstract could be read; no code exists. It says that JMP chooses between pruning and merging *in each sample*, by how similar its
critical and non-critical tokens are, without trained parameters. All else here is a reconstruction on EViT's frame, and its choices are
parameters:

between attention and feed-forward of a few blocks, the ``ceil(keep_rate * N)`` tokens that the CLS token attends to most are critical.
Each other token has a host, the critical token most similar to it; ``s`` is the mean of those similarities over the sample. Where ``s >
tau`` every other token is averaged into its host, ``x_j <- (x_j + sum_i x_i) / (1 + n_j)``; else it is dropped. Either way the same
number of tokens stays.

Deviations: not known. Figures of the paper are not claimed for it.
"""

import math
from typing import Annotated, ClassVar, Literal

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


class JmpParameters(base.Parameters):
    """Parameters of the reconstruction of JMP.

    Attributes:
        keep_rate: share of the tokens behind the prefix that are critical.
        locations: the blocks that compress.
        tau: the similarity at which the choice turns.
        merge_where: ``similar``: merge above tau and prune below; ``dissimilar``: the other way round.
        choice: ``sample``: one choice for all tokens of a sample, by their mean similarity; ``token``: one for each token, by its own.
        features: what is compared: ``states``, hidden states behind the attention, or ``keys``, the keys of all heads.
    """

    keep_rate: Rate = 0.7
    locations: Blocks = Field(default=[3, 6, 9])
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.5
    merge_where: Literal["similar", "dissimilar"] = "similar"
    choice: Literal["sample", "token"] = "sample"
    features: Literal["states", "keys"] = "states"


class Jmp(Method):
    """The reconstruction of JMP over all blocks of a model."""

    name: ClassVar[str] = "jmp"
    Parameters = JmpParameters
    dials = (Dial("keep_rate", "from one", least=0.01),)

    def __init__(self, parts: Parts, parameters: JmpParameters) -> None:
        super().__init__(parts, parameters)
        check_images(self.name, parts)
        check_locations("locations", parameters.locations, len(parts.blocks))
        self.steps = nn.ModuleList(
            JmpBlock(block, parts.prefix, parameters)
            if number in parameters.locations and parameters.keep_rate < 1
            else Plain(block)
            for number, block in enumerate(parts.blocks)
        )


class JmpBlock(nn.Module):
    """A block that merges or drops all but its critical tokens."""

    def __init__(self, block: Block, prefix: int, parameters: JmpParameters) -> None:
        super().__init__()
        self.block, self.prefix, self.options = block, prefix, parameters

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """``x: [B, N, C]``, ``alive: bool [B, N]``, all True, to ``[B, K, C]``."""
        x, attention, key = attend(self.block, x)
        score = attention_of_cls(attention, self.prefix)
        front = self.prefix + math.ceil(self.options.keep_rate * score.shape[1])
        order = behind(self.prefix, ranked(score))
        index, lost = order[:, :front], order[:, front:]
        features = x if self.options.features == "states" else key.transpose(1, 2).flatten(2)
        features = nn.functional.normalize(features, dim=-1)
        likeness, host = (fetch(features, lost) @ fetch(features, index[:, self.prefix :]).transpose(-1, -2)).max(dim=-1)
        merge = self.chosen(likeness)
        rows, guests = fetch(x, index), fetch(x, lost)
        critical = torch.arange(front - self.prefix, device=x.device)
        weight = torch.logical_and(host.unsqueeze(1) == critical.unsqueeze(1), merge.unsqueeze(1)).to(x.dtype)
        hosts = (rows[:, self.prefix :] + weight @ guests) / (1.0 + weight.sum(dim=2, keepdim=True))
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        into = own.scatter(1, lost, torch.where(merge, index[:, self.prefix :].gather(1, host), lost))
        rows = torch.cat([rows[:, : self.prefix], hosts], dim=1)
        rows = ops.gathered(rows, x, index, score=scored(self.prefix, score), into=into)
        return Step(self.block.feed_forward(rows), torch.ones_like(rows.select(2, 0), dtype=torch.bool))

    def chosen(self, likeness: Tensor) -> Tensor:
        """Which tokens merge: similarities ``[B, M]`` to bool ``[B, M]``."""
        if self.options.choice == "sample":
            likeness = likeness.mean(dim=1, keepdim=True).expand_as(likeness)
        above = likeness > self.options.tau
        return above if self.options.merge_where == "similar" else torch.logical_not(above)
