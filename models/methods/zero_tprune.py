"""Zero-TPrune (arXiv 2305.17328, CVPR 2024), sections 3.2 and 3.3: a weighted PageRank on the attention, and duplicates by keys.

A stage stands behind a block, and uses that block's attention and keys. *I'*: one vote of the PageRank ranks the tokens. *S*: the less
important half is group A, the other half group B (the variant Sequential-U); each token of A is matched to the token of B with the most
similar key, and the pairs of highest similarity lose their token of A. *I*: the PageRank over what is left, to its end; those of highest
score stay.

PageRank of a head: ``s <- A^T s``, from equal shares with the CLS token's larger by ``sqrt(N)``. Heads count whose scores vary neither
too little nor too much over the tokens; over them the score is the root of the mean square.

No code exists, and some details could not be read. Choices of ours, each a reconstruction: scores are scaled to a mean of 1 before their
variance is held against ``v_min`` and ``v_max`` (on scores that sum to 1 the published bounds exclude every head), and where no head is
left, all count; keys are those of all heads side by side; in *I* the tokens that *S* dropped cast no vote and get none, and the votes of
the others are scaled to sum to 1; the places and counts of the stages are parameters, in shares of the tokens.

Texts are not in the paper: there the method is carried over from images, with the attention and the keys of the text. The shares are of
the text's own tokens behind CLS ([SEP] is one of them), so counts follow from its length. Padding is hidden as a key, casts no vote and
gets none, has no double and is none, and stands behind the kept tokens, so it changes nothing: every text of a batch comes out as it
does alone. An output that is a mean over tokens is the mean of those that stay.
"""

import math
from fractions import Fraction
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_cls, check_locations, check_pooled, is_padded
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.gathered import (
    FAR,
    FAR_BEHIND,
    Plain,
    Rate,
    attend,
    behind,
    fetch,
    hidden,
    leading,
    ranked,
    scored,
)

Number = TypeVar("Number", int, Tensor)
LEAST = Fraction(1, 10**6)
"""The steps that shares are counted in."""


class Stage(BaseModel):
    """One pruning layer.

    Attributes:
        block: the block it stands behind.
        iterations: of the PageRank in *I*; the paper has 30 to 50 in the first three blocks, 5 to 10 in the middle, 1 in the last three.
        similar: share of the tokens that *S* drops.
        keep: share of what is left that *I* keeps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: Annotated[int, Field(ge=0)]
    iterations: Annotated[int, Field(ge=1, le=100)]
    similar: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    keep: Rate = 0.9


class ZeroTpruneParameters(base.Parameters):
    """Parameters of Zero-TPrune.

    Attributes:
        stages: the pruning layers, by rising block.
        v_min: least variance of a head's scores, of mean 1, for the head to count.
        v_max: greatest.
        cls_boost: start the CLS token with ``sqrt(N)`` times the share of another; else with the same (Zero-TPrune-uni).
    """

    stages: Annotated[list[Stage], Field(min_length=1)]
    v_min: Annotated[float, Field(ge=0)] = 0.01
    v_max: Annotated[float, Field(gt=0)] = 0.7
    cls_boost: bool = True


class ZeroTprune(Method):
    """Zero-TPrune over all blocks of a model."""

    name: ClassVar[str] = "zero_tprune"
    Parameters = ZeroTpruneParameters
    dials = (Dial("stages.similar", most=0.5), Dial("stages.keep", "from one", least=0.01))

    def __init__(self, parts: Parts, parameters: ZeroTpruneParameters) -> None:
        super().__init__(parts, parameters)
        if parameters.cls_boost:
            check_cls(self.name, parts)
        check_pooled(self.name, parts)
        check_locations("stages.block", [stage.block for stage in parameters.stages], len(parts.blocks))
        stages = {stage.block: stage for stage in parameters.stages}
        pads = is_padded(parts)
        kind = TextPruning if pads else Pruning
        self.steps = nn.ModuleList(
            kind(block, parts.prefix, stages[number], parameters) if number in stages else Plain(block, hides=pads)
            for number, block in enumerate(parts.blocks)
        )


class Pruning(nn.Module):
    """A block with a pruning layer behind it."""

    def __init__(self, block: Block, prefix: int, stage: Stage, parameters: ZeroTpruneParameters) -> None:
        super().__init__()
        self.block, self.prefix, self.stage, self.options = block, prefix, stage, parameters

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """``x: [B, N, C]``, ``alive: bool [B, N]``, all True, to ``[B, K, C]``."""
        x, attention, key = attend(self.block, x)
        x = self.block.feed_forward(x)
        similar, kept = counts(self.stage, x.shape[1] - self.prefix)
        left = self.distinct(attention, key, similar)
        score = self.rank(attention * left.to(x.dtype)[:, None, None, :], self.stage.iterations, left)
        open_ = torch.where(left, score, -1.0)[:, self.prefix :]
        index = behind(self.prefix, ranked(open_)[:, :kept].sort(dim=1).values)
        rows = ops.gathered(fetch(x, index), x, index, score=scored(self.prefix, open_))
        return Step(rows, torch.ones_like(rows.select(2, 0), dtype=torch.bool))

    def distinct(self, attention: Tensor, key: Tensor, similar: int) -> Tensor:
        """*I'* and *S*: bool ``[B, N]``, False for the tokens that have a double."""
        tokens = key.shape[2]
        everyone = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool)
        if similar == 0:
            return everyone
        order = behind(self.prefix, ranked(self.rank(attention, 1, everyone)[:, self.prefix :]))
        half = self.prefix + (tokens - self.prefix + 1) // 2
        above, below = order[:, self.prefix : half], order[:, half:]
        features = nn.functional.normalize(key.transpose(1, 2).flatten(2), dim=-1)
        likeness = (fetch(features, below) @ fetch(features, above).transpose(-1, -2)).amax(dim=-1)
        doubles = below.gather(1, ranked(likeness)[:, :similar])
        places = torch.arange(tokens, device=key.device)
        return torch.logical_not((places.unsqueeze(1) == doubles.unsqueeze(1)).any(dim=2))

    def rank(self, attention: Tensor, iterations: int, left: Tensor) -> Tensor:
        """The PageRank over the heads that count.

        Args:
            attention: ``[B, H, N, N]``, 0 at keys that are not left.
            iterations: how many votes.
            left: bool ``[B, N]``, the tokens that vote.

        Returns:
            ``[B, N]``, with a mean of about 1 over those tokens in each head.
        """
        votes = attention / attention.sum(dim=-1, keepdim=True)
        voters = left.to(attention.dtype)
        count = voters.sum(dim=1, keepdim=True)
        first = torch.arange(voters.shape[1], device=voters.device) == 0
        share = torch.where(first, count.sqrt(), voters) if self.options.cls_boost else voters
        score = (share / share.sum(dim=1, keepdim=True) * count)[:, None, None, :].expand(-1, votes.shape[1], -1, -1)
        for _ in range(iterations):
            score = score @ votes
        score = score.squeeze(2)
        spread = ((score - 1.0).square() * voters.unsqueeze(1)).sum(dim=2) / count
        counts = torch.logical_and(spread >= self.options.v_min, spread <= self.options.v_max)
        counts = torch.logical_or(counts, torch.logical_not(counts.any(dim=1, keepdim=True))).to(score.dtype).unsqueeze(2)
        return ((score.square() * counts).sum(dim=1) / counts.sum(dim=1)).sqrt()


class TextPruning(Pruning):
    """The same over tokens of which some are padding. How many rows are stored follows from the padded length alone."""

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` to ``[B, K, C]``, dead rows behind the others."""
        x, attention, key = attend(self.block, x, hidden(alive))
        x = self.block.feed_forward(x)
        places = torch.arange(x.shape[1], device=x.device)
        words = torch.logical_and(alive, places >= self.prefix)
        similar, kept = counts(self.stage, words.sum(dim=1, keepdim=True))
        left = torch.logical_and(alive, torch.logical_not(self.doubles(attention, key, alive, words, similar)))
        score = self.rank(attention * left.to(x.dtype)[:, None, None, :], self.stage.iterations, left)
        judged = torch.logical_and(left, words)
        best = torch.logical_and(judged, ops.rank(torch.where(judged, score, FAR)) < kept)
        keep = torch.logical_or(best, torch.logical_and(alive, places < self.prefix))
        order = torch.argsort(places + FAR_BEHIND * torch.logical_not(keep).to(torch.int64), dim=1)
        index = leading(order, self.prefix + counts(self.stage, x.shape[1] - self.prefix)[1])
        rows = ops.gathered(fetch(x, index), x, index, keep, torch.where(judged, score, math.nan))
        return Step(rows, keep.gather(1, index))

    def doubles(self, attention: Tensor, key: Tensor, alive: Tensor, words: Tensor, similar: Tensor) -> Tensor:
        """*I'* and *S* over ``words: bool [B, N]``, of which ``similar: int64 [B, 1]`` go: bool ``[B, N]``, True for those."""
        if self.stage.similar == 0:
            return torch.zeros_like(words)
        rank = ops.rank(torch.where(words, self.rank(attention, 1, alive), FAR))
        upper = rank < (words.sum(dim=1, keepdim=True) + 1) // 2
        above, below = torch.logical_and(words, upper), torch.logical_and(words, torch.logical_not(upper))
        features = nn.functional.normalize(key.transpose(1, 2).flatten(2), dim=-1)
        pairs = torch.logical_and(below.unsqueeze(2), above.unsqueeze(1))
        likeness = torch.where(pairs, features @ features.transpose(-1, -2), FAR).amax(dim=-1)
        return torch.logical_and(below, ops.rank(likeness) < similar)


def counts(stage: Stage, tokens: Number) -> tuple[Number, Number]:
    """How many of so many tokens *S* drops, and how many of the others *I* keeps: the floor and the ceiling of their shares.

    In whole numbers, a share to its millionth: a dynamic length, an int64 tensor of lengths and a number come to the same counts.
    """
    left = share_of(1 - Fraction(str(stage.similar)), tokens)
    return tokens - left, share_of(Fraction(str(stage.keep)), left)


def share_of(share: Fraction, tokens: Number) -> Number:
    """A share of so many tokens, rounded up. No number is negative: engines divide those towards zero."""
    part = max(share.limit_denominator(LEAST.denominator), LEAST)
    return (tokens * part.numerator + part.denominator - 1) // part.denominator
