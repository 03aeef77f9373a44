"""The custom torch ops of the IR. Each has an eager and a fake kernel, and survives ``torch.export`` with its user line.

``prune`` marks a site in masked form, ``compact`` is the gathered site: the only data-dependent op of the IR.
"""

import torch
from torch import Tensor

MIN_COUNT = 2
"""Least number of stored tokens (design.md 5): sizes of 0 and 1 are special to torch's shape guards."""


@torch.library.custom_op("tpcompile::prune", mutates_args=())
def prune(x: Tensor, keep: Tensor, score: Tensor | None = None) -> Tensor:
    """Mark a prune site in masked form. The identity in eager: dropped rows keep flowing, as in the model it marks.

    Args:
        x: hidden states ``[B, N, C]``, any float dtype.
        keep: bool ``[B, N]``; False drops the token from here on. The masks that hide it are the model's own.
        score: float ``[B, N]`` the decision came from; only reported.

    Returns:
        ``[B, N, C]``, equal to ``x``.
    """
    return x.clone()


@prune.register_fake
def _(x: Tensor, keep: Tensor, score: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tpcompile::compact", mutates_args=())
def compact(x: Tensor, keep: Tensor, pinned: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Store the kept and pinned rows only: the gathered form of a site.

    The stored rows are the kept and pinned ones in original order, then, where the batch's largest count (at least
    ``MIN_COUNT``) leaves slots, dropped rows *of the same sample* in original order. A stored row that is not kept is hidden by the
    program's own masks exactly as it was in masked form, so a superset of the kept rows is always exact (docs/decisions/0002).

    Args:
        x: hidden states ``[B, N, C]``.
        keep: bool ``[B, N]``.
        pinned: bool ``[B, N]``, rows that are stored even when dropped (a CLS row that an output reads).
        score: float ``[B, N]`` or None; unused here, kept for lowerings with a fixed count.

    Returns:
        ``(rows, alive, index)``: rows ``[B, K, C]``; alive bool ``[B, K]``, False for rows stored though dropped;
        index int64 ``[B, K]``, positions in ``x``. ``K = min(N, max(MIN_COUNT, max over the batch of kept-or-pinned rows))``.
    """
    stored = keep | pinned
    count = min(max(int(stored.sum(1).max()), MIN_COUNT), keep.shape[1])
    order = torch.sort(stored.to(torch.uint8), dim=1, descending=True, stable=True).indices
    index = order[:, :count].contiguous()
    rows = torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return rows, torch.gather(keep, 1, index), index


@compact.register_fake
def _(x: Tensor, keep: Tensor, pinned: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size(min=MIN_COUNT)
    batch = x.shape[0]
    return x.new_empty(batch, count, x.shape[2]), keep.new_empty(batch, count), keep.new_empty(batch, count, dtype=torch.int64)


PRUNE = torch.ops.tpcompile.prune.default
COMPACT = torch.ops.tpcompile.compact.default
