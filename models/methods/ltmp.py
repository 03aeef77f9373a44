"""LTMP, learned thresholds for token merging and pruning (arXiv 2307.10780, TMLR 2023), section 3, in its form of inference.

Between attention and feed-forward of every block, two decisions. *Merge*: tokens at even positions look for the token at an odd position
with the most similar keys, as in ToMe, and merge into it where their cosine exceeds the block's threshold; a merged token is the mean of
its tokens, weighted by their sizes, and is as important as the most important of them. *Prune*: a token stays where its importance, the
attention it receives averaged over heads and queries, exceeds the block's other threshold. Keys count with the logarithm of their size.
What stays stands in the order that the next block's even and odd positions follow from: even tokens that did not merge, then odd ones.
How many stay depends on the sample. Without ``prune_thresholds`` it is LTM, without ``merge_thresholds`` LTP of the same paper.

The masked form of training is another function as soon as one token is gone (dead tokens count in the means and keep their positions),
and not this one.

Deviations: none at batch 1. In a batch, where the official code needs equal counts, every sample is computed as it is alone. More leading
tokens than the CLS token are protected as that is.
"""

import math
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_images, check_length
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.gathered import FAR, FAR_BEHIND, attend, hidden, odd_likeness

Threshold = Annotated[float, Field(ge=0, le=1)]


class LtmpParameters(base.Parameters):
    """Parameters of LTMP.

    Attributes:
        merge_thresholds: a cosine for every block; None: nothing merges.
        prune_thresholds: an importance for every block; None: nothing is pruned.
        prop_attn: add the logarithm of the sizes to the logits.
    """

    merge_thresholds: list[Threshold] | None = None
    prune_thresholds: list[Threshold] | None = None
    prop_attn: bool = True

    @model_validator(mode="after")
    def _some(self) -> "LtmpParameters":
        if self.merge_thresholds is None and self.prune_thresholds is None:
            raise ValueError("merge_thresholds or prune_thresholds is required")
        return self


class Ltmp(Method):
    """LTMP over all blocks of a model."""

    name: ClassVar[str] = "ltmp"
    Parameters = LtmpParameters
    dials = (Dial("merge_thresholds", "from one"), Dial("prune_thresholds", most=1.0))

    def __init__(self, parts: Parts, parameters: LtmpParameters) -> None:
        super().__init__(parts, parameters)
        check_images(self.name, parts, cls=False)
        depth = len(parts.blocks)
        off: list[float | None] = [None] * depth
        merge, prune = parameters.merge_thresholds or off, parameters.prune_thresholds or off
        check_length("merge_thresholds", merge, depth)
        check_length("prune_thresholds", prune, depth)
        self.prop_attn = parameters.prop_attn
        self.steps = nn.ModuleList(
            LtmpBlock(block, parts.prefix, *thresholds) for block, *thresholds in zip(parts.blocks, merge, prune, strict=True)
        )

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``; what each returned, in order."""
        steps: list[Step] = []
        size = torch.ones_like(x.select(2, 0))
        for layer in self.steps:
            step, size = layer(x, alive, size, self.prop_attn)
            steps.append(step)
            x, alive = step.x, step.alive
        return tuple(steps)


class LtmpBlock(nn.Module):
    """A block that merges, then prunes; None for a threshold switches its decision off."""

    def __init__(self, block: Block, prefix: int, merge: float | None, prune: float | None) -> None:
        super().__init__()
        self.block, self.prefix, self.merge, self.prune = block, prefix, merge, prune

    def forward(self, x: Tensor, alive: Tensor, size: Tensor, prop_attn: bool) -> tuple[Step, Tensor]:
        """Run the block.

        Args:
            x: ``[B, N, C]``.
            alive: bool ``[B, N]``; dead rows stand behind all others.
            size: float ``[B, N]``, tokens of the input in each.
            prop_attn: see `LtmpParameters`.
        """
        x, attention, key = attend(self.block, x, hidden(alive, size.log() if prop_attn else 0.0))
        importance = self.importance(attention, alive)
        weighted = torch.cat([x, torch.ones_like(x[:, :, :1])], dim=2) * size.unsqueeze(-1)
        places = torch.arange(x.shape[1], device=x.device)
        if self.merge is None:
            keep = torch.logical_and(alive, self.wanted(importance))
            stored, living, index = ops.compact(weighted, keep, (places < self.prefix).unsqueeze(0), importance)
            rows, size = stored[:, :, :-1] / stored[:, :, -1:], stored.select(2, -1)
            rows = ops.gathered(rows, x, index, keep, self.shown(importance))
            return Step(self.block.feed_forward(rows), living), size
        site = self.merged(weighted, importance, odd_likeness(key, alive, self.prefix))
        keep = torch.logical_and(torch.logical_and(alive, torch.logical_not(site.gone)), self.wanted(site.importance))
        order = torch.argsort(places + FAR_BEHIND * (places % 2))
        pinned = (order < self.prefix).unsqueeze(0)
        score = site.importance.index_select(1, order)
        stored, living, index = ops.compact(site.weighted.index_select(1, order), keep.index_select(1, order), pinned, score)
        rows, size = stored[:, :, :-1] / stored[:, :, -1:], stored.select(2, -1)
        rows = ops.gathered(rows, x, order.expand_as(keep).gather(1, index), keep, self.shown(importance), site.into)
        return Step(self.block.feed_forward(rows), living), size

    def importance(self, attention: Tensor, alive: Tensor) -> Tensor:
        """What a token receives of ``[B, H, N, N]``, mean over heads and living queries: ``[B, N]``; infinite for the prefix."""
        counted = alive.to(attention.dtype)
        received = (attention * counted[:, None, :, None]).sum(dim=(1, 2))
        mean = received / (counted.sum(dim=1, keepdim=True) * attention.shape[1])
        return torch.where(torch.arange(mean.shape[1], device=mean.device) < self.prefix, -FAR, mean)

    def shown(self, importance: Tensor) -> Tensor:
        """The importance ``[B, N]`` for reports: nan for the prefix, which is not judged."""
        return torch.where(importance == -FAR, math.nan, importance)

    def wanted(self, importance: Tensor) -> Tensor:
        """``[B, N]``: important enough."""
        return importance > (self.prune if self.prune is not None else FAR)

    def merged(self, weighted: Tensor, importance: Tensor, similarity: Tensor) -> "Merged":
        """Merge what is similar enough; see `Merged`. ``similarity: [B, N, N]``."""
        assert self.merge is not None
        best, match = similarity.max(dim=-1)
        gone = best > self.merge
        places = torch.arange(weighted.shape[1], device=weighted.device)
        chosen = torch.logical_and(gone.unsqueeze(2), match.unsqueeze(2) == places)
        sums = weighted + chosen.to(weighted.dtype).transpose(1, 2) @ weighted
        most = torch.maximum(importance, torch.where(chosen, importance.unsqueeze(2), FAR).amax(dim=1))
        return Merged(sums, gone, most, torch.where(gone, match, places))


class Merged(NamedTuple):
    """Tokens between the two decisions.

    Attributes:
        weighted: ``[B, N, C + 1]``: hidden states times size, and the size.
        gone: bool ``[B, N]``: merged into another.
        importance: ``[B, N]``.
        into: int64 ``[B, N]``: the position whose row each went into.
    """

    weighted: Tensor
    gone: Tensor
    importance: Tensor
    into: Tensor
