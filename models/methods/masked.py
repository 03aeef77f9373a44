"""What methods in masked form share: attention that no dropped token takes part in, a mask of the prefix, decisions at block entries."""

import torch
from torch import Tensor

from tpcompile.models.families import Block

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
