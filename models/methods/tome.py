"""ToMe, token merging (arXiv 2210.09461, ICLR 2023), sections 3.2 to 3.4 and appendix D: no training, no threshold.

Between attention and feed-forward of every block, the r pairs of tokens with the most similar keys become one token each. Tokens at even
positions look for their most similar token at an odd position; the r most similar of them merge into it, several into one where they
choose the same. A merged token is the mean of its tokens, each weighted by its size, the number of patches in it. With *proportional
attention* the logarithm of a key's size is added to its logits. Kept tokens stand in the order that the next block's even and odd
positions follow from: even ones that did not merge, then the odd ones.

Deviations: none at batch 1 or more. Equal similarities are taken in order, where the official code leaves that to the sort; more than two
leading tokens (registers) are protected as the CLS token and the distillation token are. For an encoder of texts (not in the paper)
padding neither merges nor is merged into, and as many pairs merge as fit.
"""

from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.gathered import attend, check_images, check_length, fetch, ranked

Count = Annotated[int, Field(ge=0)]
FAR = float("-inf")


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

    def __init__(self, parts: Parts, parameters: TomeParameters) -> None:
        super().__init__(parts, parameters)
        check_images(self.name, parts, cls=False)
        counts = schedule(parameters, len(parts.blocks))
        self.prop_attn = parameters.prop_attn
        self.steps = nn.ModuleList(TomeBlock(block, parts.prefix, r) for block, r in zip(parts.blocks, counts, strict=True))

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``, all True; what each returned, in order."""
        steps: list[Step] = []
        size: Tensor | None = None
        for layer in self.steps:
            step, size = layer(x, alive, size, self.prop_attn)
            steps.append(step)
            x, alive = step.x, step.alive
        return tuple(steps)


class TomeBlock(nn.Module):
    """A block that merges up to r pairs."""

    def __init__(self, block: Block, prefix: int, r: int) -> None:
        super().__init__()
        self.block, self.prefix, self.r = block, prefix, r

    def forward(self, x: Tensor, alive: Tensor, size: Tensor | None, prop_attn: bool) -> tuple[Step, Tensor | None]:
        """Run the block.

        Args:
            x: ``[B, N, C]``.
            alive: bool ``[B, N]``, all True.
            size: float ``[B, N, 1]``, tokens of the input in each; None: one each.
            prop_attn: see `TomeParameters`.
        """
        bias = size.log().transpose(1, 2).unsqueeze(1) if prop_attn and size is not None else None
        x, _, key = attend(self.block, x, bias)
        r = min(self.r, (x.shape[1] - self.prefix) // 2)
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
