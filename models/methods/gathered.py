"""What methods share that gather by themselves: the attention written out, fixed counts by rank, rows fetched by position.

Their eager form is gathered already (``ops.gathered`` marks the sites): what runs here is what the compiler writes.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block
from tpcompile.models.methods.base import Step
from tpcompile.models.methods.masked import MASKED

Rate = Annotated[float, Field(gt=0, le=1)]
"""A share of tokens to keep."""
Blocks = list[Annotated[int, Field(ge=0)]]
"""Numbers of blocks, the first is 0."""

FAR = float("-inf")
FAR_BEHIND = 1 << 20
"""More than there are tokens: what puts some positions behind all others in a sort."""


class Plain(nn.Module):
    """A block that drops nothing; it hides dead rows where there may be some (``hides``)."""

    def __init__(self, block: Block, hides: bool = False) -> None:
        super().__init__()
        self.block, self.hides = block, hides

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """``x: [B, N, C]``, ``alive: bool [B, N]``, all True unless dead rows are hidden."""
        x, _, _ = attend(self.block, x, hidden(alive) if self.hides else None)
        return Step(self.block.feed_forward(x), alive)


def attend(block: Block, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A block up to its feed-forward.

    Args:
        block: the family's.
        x: ``[B, N, C]``.
        bias: added to the logits, broadcasts to ``[B, H, N, N]``.

    Returns:
        ``x`` behind attention and residual, the softmaxed attention ``[B, H, N, N]``, and the keys ``[B, H, N, D]``.
    """
    query, key, value = block.qkv(x)
    logits = (query * block.scale) @ key.transpose(-1, -2)
    attention = (logits if bias is None else logits + bias).softmax(dim=-1)
    context = (attention @ value).transpose(1, 2).reshape(x.shape)
    return block.attention_output(context, x), attention, key


def hidden(alive: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """What hides dead keys, beside a bias for the others: ``bool [B, N]`` (and ``[B, N]``) to ``[B, 1, 1, N]``."""
    return torch.where(alive, bias, MASKED)[:, None, None, :]


def fetch(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x: [B, N, C]`` at ``index: int64 [B, K]``: ``[B, K, C]``."""
    if x.shape[0] == 1:
        return x.index_select(1, index[0])
    rows: Tensor = ops.take(x, index, 0, 1)
    return rows


def ranked(score: Tensor) -> Tensor:
    """Positions by falling score, equal scores in order: ``float [B, M]`` to ``int64 [B, M]``."""
    order: Tensor = torch.sort(score, dim=1, descending=True, stable=True).indices
    return order


def behind(prefix: int, positions: Tensor) -> Tensor:
    """Positions among all tokens, the prefix first, from positions ``int64 [B, K]`` among the others: ``[B, prefix + K]``."""
    front = torch.arange(prefix, device=positions.device).expand(positions.shape[0], prefix)
    return torch.cat([front, positions + prefix], dim=1)


def scored(prefix: int, score: Tensor) -> Tensor:
    """A score ``[B, M]`` for every token: nan for the prefix, which has none."""
    return torch.cat([score.new_full((score.shape[0], prefix), math.nan), score], dim=1)


def leading(order: Tensor, count: int) -> Tensor:
    """The first positions of ``order: int64 [B, N]``: ``[B, count]``.

    By index: a slice asks whether the count fits, which nobody can say of one that follows from a dynamic length.
    """
    return order.index_select(1, torch.arange(count, device=order.device))


def odd_likeness(key: Tensor, alive: Tensor, prefix: int) -> Tensor:
    """Cosines of the keys' means over heads, living tokens at even positions against those at odd ones; -inf elsewhere.

    All positions are compared and most are masked: halves of a size that follows the data make a graph of shapes.

    Args:
        key: ``[B, H, N, D]``.
        alive: bool ``[B, N]``.
        prefix: leading tokens that are compared with none.

    Returns:
        ``[B, N, N]``.
    """
    metric = key.mean(dim=1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    places = torch.arange(key.shape[2], device=key.device)
    odd = places % 2 == 1
    free = torch.logical_and(alive, places >= prefix)
    rows, columns = torch.logical_and(free, torch.logical_not(odd)), torch.logical_and(free, odd)
    pairs = torch.logical_and(rows.unsqueeze(2), columns.unsqueeze(1))
    return torch.where(pairs, metric @ metric.transpose(-1, -2), FAR)


def attention_of_cls(attention: Tensor, prefix: int) -> Tensor:
    """What the CLS query pays every token behind the prefix, mean over heads: ``[B, H, N, N]`` to ``[B, N - prefix]``."""
    return attention[:, :, 0, prefix:].mean(dim=1)
