"""ToMe, token merging (arXiv 2210.09461, ICLR 2023), sections 3.2 to 3.4 and appendix D: no training, no threshold.

Between attention and feed-forward of every block, the r pairs of tokens with the most similar keys become one token each. Tokens at even
positions look for their most similar token at an odd position; the r most similar of them merge into it, several into one where they
choose the same. A merged token is the mean of its tokens, each weighted by its size, the number of patches in it. With *proportional
attention* the logarithm of a key's size is added to its logits. Kept tokens stand in the order that the next block's even and odd
positions follow from: even ones that did not merge, then the odd ones.

Deviations: none at batch 1 or more. Equal similarities are taken in order, where the official code leaves that to the sort; more than two
leading tokens (registers) are protected as the CLS token and the distillation token are.

Texts are not in the paper: there the method is carried over from images. The CLS token is protected, every other one may merge, [SEP]
and punctuation too. Of a text of n tokens ``min(r, (n - 1) // 2)`` pairs merge in a block: at most half, where it is shorter than 2 r.
Padding is hidden as a key, neither merges nor is merged into, and stands behind the text's own tokens, so it changes nothing: every
text of a batch comes out as it does alone. An output that is a mean over tokens counts a merged token with its size, as if every token
of the text were still there; for images the mean is the official code's, over rows.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_length, check_pooled, is_padded
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.gathered import FAR, FAR_BEHIND, attend, fetch, hidden, leading, odd_likeness, ranked

Count = Annotated[int, Field(ge=0)]
NO_COSINE = -2.0
"""Below every cosine, and above what OpenVINO makes of the maximum of nothing but -inf: the least finite number."""


class TomeParameters(base.Parameters):
    """Parameters of ToMe.

    Attributes:
        r: pairs that merge in a block: for all blocks, or one number for each.
        inflect: -1 to 1, for one ``r``: the blocks' numbers rise linearly where it is positive, and fall where it is negative.
        prop_attn: add the logarithm of the sizes to the logits.
    """

    r: Count | list[Count]
    inflect: Annotated[float, Field(ge=-1, le=1)] = 0.0
    prop_attn: bool = True

    @model_validator(mode="after")
    def _one(self) -> "TomeParameters":
        if isinstance(self.r, list) and self.inflect:
            raise ValueError("inflect bends one r, and r is a list")
        return self


class Tome(Method):
    """ToMe over all blocks of a model."""

    name: ClassVar[str] = "tome"
    Parameters = TomeParameters
    dials = (Dial("r", most=1024),)

    def __init__(self, parts: Parts, parameters: TomeParameters) -> None:
        super().__init__(parts, parameters)
        check_pooled(self.name, parts)
        self.prefix, self.merges = parts.prefix, schedule(parameters, len(parts.blocks))
        self.stored, kind = (rows_enough, TextBlock) if is_padded(parts) else (rows_left, TomeBlock)
        self.steps = nn.ModuleList(
            kind(block, parts.prefix, r, parameters.prop_attn) for block, r in zip(parts.blocks, self.merges, strict=True)
        )

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``, all True for images; what each returned, in order."""
        steps: list[Step] = []
        size: Tensor | None = None
        for layer, count in zip(self.steps, self.stored(x.shape[1], self.prefix, self.merges), strict=True):
            step, size = layer(x, alive, size, count)
            steps.append(step)
            x, alive = step.x, step.alive
        return tuple(steps)


class TomeBlock(nn.Module):
    """A block that merges up to r pairs."""

    def __init__(self, block: Block, prefix: int, r: int, prop_attn: bool) -> None:
        super().__init__()
        self.block, self.prefix, self.r, self.prop_attn = block, prefix, r, prop_attn

    def forward(self, x: Tensor, alive: Tensor, size: Tensor | None, count: int) -> tuple[Step, Tensor | None]:
        """Run the block.

        Args:
            x: ``[B, N, C]``.
            alive: bool ``[B, N]``, all True.
            size: float ``[B, N, 1]``, tokens of the input in each; None: one each.
            count: rows to leave.
        """
        bias = size.log().transpose(1, 2).unsqueeze(1) if self.prop_attn and size is not None else None
        x, _, key = attend(self.block, x, bias)
        r = x.shape[1] - count
        if r == 0:
            return Step(self.block.feed_forward(x), alive), size
        similarity = likeness(key, self.prefix)
        score, match = similarity.max(dim=-1)
        order = ranked(score)
        pairs = Pairs(order[:, r:].sort(dim=1).values, order[:, :r], match.gather(1, order[:, :r]))
        size = torch.ones_like(x[:, :, :1]) if size is None else size
        rows, sizes = pairs.merge(x, size)
        rows = ops.gathered(rows, x, pairs.stored(x), into=pairs.into(x))
        return Step(self.block.feed_forward(rows), torch.ones_like(rows.select(2, 0), dtype=torch.bool)), sizes


class TextBlock(TomeBlock):
    """The same over tokens of which some are padding. How many rows are stored follows from the padded length alone."""

    def forward(self, x: Tensor, alive: Tensor, size: Tensor | None, count: int) -> tuple[Step, Tensor | None]:
        """Run the block; dead rows stand behind all others, here and in what is returned.

        Args:
            x: ``[B, N, C]``.
            alive: bool ``[B, N]``.
            size: float ``[B, N, 1]``, tokens of the input in each; None: one each.
            count: rows to store, at least the living ones.
        """
        bias = hidden(alive, size.squeeze(2).log() if self.prop_attn and size is not None else 0.0)
        x, _, key = attend(self.block, x, bias)
        size = torch.ones_like(x[:, :, :1]) if size is None else size
        if self.r == 0:
            return Step(self.block.feed_forward(x), alive, weight=torch.where(alive, size.squeeze(2), 0.0)), size
        places = torch.arange(x.shape[1], device=x.device)
        score, match = odd_likeness(key, alive, self.prefix).max(dim=-1)
        gone = torch.logical_and(score > NO_COSINE, ops.rank(score) < self.r)
        into = torch.where(gone, match, places)
        late = places % 2 + 2 * torch.logical_not(alive).to(torch.int64) + 4 * gone.to(torch.int64)
        index = leading(torch.argsort(places + FAR_BEHIND * late, dim=1), count)
        chosen = (into.unsqueeze(1) == index.unsqueeze(2)).to(x.dtype)
        sums = chosen @ torch.cat([x * size, size], dim=2)
        keep = torch.logical_and(alive, torch.logical_not(gone))
        sizes, living = sums[:, :, -1:].clamp(min=1.0), keep.gather(1, index)  # a row that is stored though merged holds nothing
        rows = ops.gathered(sums[:, :, :-1] / sizes, x, index, keep, into=into)
        return Step(self.block.feed_forward(rows), living, weight=torch.where(living, sizes.squeeze(2), 0.0)), sizes


class Pairs(NamedTuple):
    """What merges into what; even positions are numbered apart from odd ones.

    Attributes:
        left: int64 ``[B, A - r]``, rising: even positions that stay.
        source: int64 ``[B, r]``: even positions that merge.
        target: int64 ``[B, r]``: the odd positions they merge into.
    """

    left: Tensor
    source: Tensor
    target: Tensor

    def merge(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [B, N, C]`` and ``size: [B, N, 1]`` to the rows that stay, the even ones first, and their sizes."""
        weighted = torch.cat([x * size, size], dim=2)
        odd, own = weighted[:, 1::2], 2 * self.left
        chosen = (self.target.unsqueeze(1) == torch.arange(odd.shape[1], device=x.device).unsqueeze(1)).to(x.dtype)
        sums = odd + chosen @ fetch(weighted, 2 * self.source)
        sizes = torch.cat([fetch(size, own), sums[:, :, -1:]], dim=1)
        return torch.cat([fetch(x, own), sums[:, :, :-1] / sums[:, :, -1:]], dim=1), sizes

    def stored(self, x: Tensor) -> Tensor:
        """The position in ``x: [B, N, C]`` of each row that stays: int64 ``[B, N - r]``."""
        odd = torch.arange(x.shape[1] // 2, device=x.device).expand(x.shape[0], -1) * 2 + 1
        return torch.cat([2 * self.left, odd], dim=1)

    def into(self, x: Tensor) -> Tensor:
        """The position in ``x: [B, N, C]`` that each of its rows went into: int64 ``[B, N]``."""
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return own.scatter(1, 2 * self.source, 2 * self.target + 1)


def likeness(key: Tensor, prefix: int) -> Tensor:
    """Cosines of the keys' means over heads, even positions against odd ones; -inf where either belongs to the prefix.

    Args:
        key: ``[B, H, N, D]``.
        prefix: leading tokens that never merge.

    Returns:
        ``[B, (N + 1) // 2, N // 2]``.
    """
    metric = key.mean(dim=1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = metric[:, ::2], metric[:, 1::2]
    similarity = even @ odd.transpose(-1, -2)
    rows = torch.arange(even.shape[1], device=key.device).unsqueeze(1) * 2 < prefix
    columns = torch.arange(odd.shape[1], device=key.device) * 2 + 1 < prefix
    masked: Tensor = similarity.masked_fill(torch.logical_or(rows, columns), FAR)
    return masked


def rows_left(tokens: int, prefix: int, merges: Sequence[int]) -> list[int]:
    """Rows behind each block: r fewer, or half of those that may merge."""
    left = [tokens]
    for r in merges:
        left.append(left[-1] - min(r, (left[-1] - prefix) // 2))
    return left[1:]


def rows_enough(tokens: int, prefix: int, merges: Sequence[int]) -> list[int]:
    """Rows to store behind each block: no fewer than `rows_left`, and as many while the largest r of tokens may still merge.

    A block that is cut short leaves at most r tokens that may merge: so many are stored from there on. `rows_left` itself would name the
    length twice in every block, which of a dynamic length makes terms that double with the depth.
    """
    greater: Any = torch.sym_max  # untyped in torch
    smaller: Any = torch.sym_min
    free, most, gone = tokens - prefix, 0, 0
    enough = 0
    rows: list[int] = []
    for r in merges:
        gone += r
        if r > most:
            enough, most = smaller(rows[-1] - prefix if rows else free, r), r
        rows.append(prefix + greater(free - gone, enough))
    return rows


def schedule(parameters: TomeParameters, depth: int) -> list[int]:
    """How many pairs merge in each block.

    Raises:
        UsageError: a list of another length.
    """
    if isinstance(parameters.r, list):
        check_length("r", parameters.r, depth)
        return parameters.r
    least = int(parameters.r * (1.0 - parameters.inflect))
    most = 2 * parameters.r - least
    step = (most - least) / (depth - 1) if depth > 1 else 0.0
    return [int(least + step * number) for number in range(depth)]
