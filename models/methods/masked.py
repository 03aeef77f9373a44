"""What methods in masked form share: attention that no dropped token takes part in, a mask of the prefix, decisions at block entries."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts

MASKED = -10000.0
"""Added to the logits of dead keys; far enough below any logit that their softmax is exactly 0 in float32."""


def attention(block: Block, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Softmaxed attention and values of one block.

    Args:
        block: of the model.
        x: hidden states ``[B, N, C]``.
        alive: bool ``[B, N]``; dead keys are masked, rows of dead queries are set to 0.

    Returns:
        ``[B, H, N, N]`` and ``[B, H, N, D]``.
    """
    query, key, value = block.qkv(x)
    logits = query @ key.transpose(-1, -2) * block.scale
    logits = logits + torch.where(alive, 0.0, MASKED)[:, None, None, :]
    return logits.softmax(dim=-1) * alive.to(x.dtype)[:, None, :, None], value


def joined(context: Tensor, x: Tensor) -> Tensor:
    """Heads side by side: ``[B, H, N, D]`` to the shape of ``x``, ``[B, N, C]``."""
    return context.transpose(1, 2).reshape(x.shape)


def leading(x: Tensor, count: int) -> Tensor:
    """True for the first ``count`` tokens of ``x: [B, N, ...]``, bool ``[N]``: a comparison, since a pruned axis has no fixed slices."""
    return torch.arange(x.shape[1], device=x.device) < count


def check_locations(name: str, locations: Sequence[int], blocks: int, first: int) -> None:
    """Demand rising block numbers that the model has.

    Args:
        name: the parameter's.
        locations: block numbers, from 0.
        blocks: the model's.
        first: the earliest block at which the method can decide.

    Raises:
        UsageError: naming the parameter and what it may hold.
    """
    rising = all(a < b for a, b in pairwise(locations))
    if not rising or not all(first <= block < blocks for block in locations):
        raise UsageError(
            f"{name} is {list(locations)}, the model has blocks 0 to {blocks - 1}",
            fix=f"give rising block numbers from {first} to {blocks - 1}",
        )


def demand_cls(method: str, parts: Parts) -> None:
    """Demand a CLS token.

    Raises:
        UsageError: the model has none.
    """
    if not parts.cls:
        raise UsageError(
            f"{method} scores tokens by a CLS token, and this {parts.architecture} has none",
            fix="use --method ltp, which averages over all queries",
        )
