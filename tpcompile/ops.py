"""The custom torch ops of the IR. Each has an eager and a fake kernel, and survives ``torch.export`` with its user line.

Masked form: ``prune`` marks a site, ``rank`` says which tokens score highest, ``restore`` brings rows back to full length. Gathered form:
``compact`` is a site, the only data-dependent op of the IR; ``fit`` bounds what a site of constant count keeps; ``take`` gathers at a join,
each sample by its own positions; ``put`` is what ``restore`` becomes. ``memory`` leaves the living rows to a decoder, in both forms alike.
A model that gathers by itself says so with ``gathered`` (docs/decisions/0011).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile import rows
from tpcompile.rows import MIN_COUNT, Rows, store

__all__ = [
    "COMPACT",
    "FIT",
    "GATHERED",
    "MEMORY",
    "MIN_COUNT",
    "PRUNE",
    "PUT",
    "RANK",
    "RESTORE",
    "TAKE",
    "compact",
    "fit",
    "gathered",
    "memory",
    "prune",
    "put",
    "rank",
    "restore",
    "take",
]


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


def _straight(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


prune.register_autograd(_straight)  # the identity: a marked model trains as it did


@torch.library.custom_op("tpcompile::rank", mutates_args=())
def rank(score: Tensor) -> Tensor:
    """How many tokens of the same sample stand before each token: those that score higher, and of equal ones those in front.

    Ranks of a sample are a permutation, so ``rank(score) < k`` keeps exactly ``min(k, N)``: a fixed count, which the compiler knows. A
    dropped token must score -inf (``where(alive, score, -inf)``): then it stands behind every living one.

    Args:
        score: float ``[B, N]``.

    Returns:
        int64 ``[B, N]``.
    """
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


@rank.register_fake
def _(score: Tensor) -> Tensor:
    return torch.empty_like(score, dtype=torch.int64)


@torch.library.custom_op("tpcompile::compact", mutates_args=())
def compact(
    x: Tensor, keep: Tensor, pinned: Tensor, score: Tensor | None = None, ladder: Sequence[int] | None = None, limit: int = 0,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Store the kept and pinned rows only: the gathered form of a site.

    The stored rows are the kept and pinned ones in the order of ``x``, then, where the count (see below) leaves slots, dropped rows
    *of the same sample* in the order of ``x``. A stored row that is not kept is hidden by the
    program's own masks exactly as it was in masked form, so a superset of the kept rows is always exact (docs/decisions/0002).

    Args:
        x: hidden states ``[B, N, C]``.
        keep: bool ``[B, N]``.
        pinned: bool ``[B, N]`` or ``[1, N]``, rows that are stored even when dropped (a CLS row that an output reads).
        score: float ``[B, N]`` or None; unused here, see ``fit``.
        ladder: sizes that the count is rounded up to, see ``tpcompile.rows``.
        limit: a constant count, at least that of any sample (``fit`` sees to it). 0: the count follows the data.
        exact: not even ``MIN_COUNT`` adds a dropped row; of one sample.

    Returns:
        ``(rows, alive, index)``: rows ``[B, K, C]``; alive bool ``[B, K]``, False for rows stored though dropped;
        index int64 ``[B, K]``, positions in ``x``. Without ladder and limit,
        ``K = min(N, max(MIN_COUNT, max over the batch of kept-or-pinned rows))``.
    """
    positions = store(keep.cpu().numpy(), pinned.cpu().numpy(), Rows(tuple(ladder or ()), limit, exact))
    index = torch.from_numpy(positions).to(x.device)
    stored = torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return stored, torch.gather(keep, 1, index), index


@compact.register_fake
def _(
    x: Tensor, keep: Tensor, pinned: Tensor, score: Tensor | None = None, ladder: Sequence[int] | None = None, limit: int = 0,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length = x.shape[:2]
    # A constant count of a fixed number of tokens is a number: behind it nothing is dynamic any more.
    count = min(limit, length) if limit and isinstance(length, int) else torch.library.get_ctx().new_dynamic_size(min=MIN_COUNT)
    return x.new_empty(batch, count, x.shape[2]), keep.new_empty(batch, count), keep.new_empty(batch, count, dtype=torch.int64)


@torch.library.custom_op("tpcompile::fit", mutates_args=())
def fit(keep: Tensor, pinned: Tensor, score: Tensor | None, limit: int) -> Tensor:
    """The kept tokens that find room in a constant count: what a site of lowering ``static`` reads in place of its keep mask.

    Args:
        keep: bool ``[B, N]``.
        pinned: bool ``[B, N]`` or ``[1, N]``: these rows take room first.
        score: float ``[B, N]``, the lowest are lost; None: the last are.
        limit: rows there is room for.

    Returns:
        bool ``[B, N]``, contained in ``keep``, and equal to it where all fit.
    """
    scores = None if score is None else score.detach().float().cpu().numpy()
    return torch.from_numpy(rows.fit(keep.cpu().numpy(), pinned.cpu().numpy(), scores, limit)).to(keep.device)


@fit.register_fake
def _(keep: Tensor, pinned: Tensor, score: Tensor | None, limit: int) -> Tensor:
    return torch.empty_like(keep)


@torch.library.custom_op("tpcompile::gathered", mutates_args=())
def gathered(
    rows: Tensor, x: Tensor, index: Tensor, keep: Tensor | None = None, score: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """Mark a site of a model that gathers, or merges, by itself. The identity on ``rows``: the program passes through as it is.

    Args:
        rows: hidden states ``[B, K, C]`` behind the site.
        x: hidden states ``[B, N, C]`` before it.
        index: int64 ``[B, K]``, the position in ``x`` that each row continues; -1 for a row that continues none (a fused token).
        keep: bool ``[B, N]``, tokens that live on; default: those that ``index`` names.
        score: float ``[B, N]`` the decision came from; only reported.
        into: int64 ``[B, N]``, for a method that merges: the position in ``x`` whose row each token went into, its own where it went
            into none. A token whose row is not stored is gone.

    Returns:
        ``[B, K, C]``, equal to ``rows``.
    """
    return rows.clone()


@gathered.register_fake
def _(
    rows: Tensor, x: Tensor, index: Tensor, keep: Tensor | None = None, score: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    return torch.empty_like(rows)


def _straight_rows(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    return grad, None, None, None, None, None


gathered.register_autograd(_straight_rows)


@torch.library.custom_op("tpcompile::restore", mutates_args=())
def restore(x: Tensor, keep: Tensor, base: Tensor) -> Tensor:
    """Bring rows back to full length: kept tokens from ``x``, dropped ones from ``base``, the method's fill.

    Args:
        x: hidden states ``[B, N, C]`` behind one or more sites.
        keep: bool ``[B, N]``, the keep mask of the last of those sites: True where ``x`` counts.
        base: ``[B, N, C]`` as it was before them: the last hidden state of the tokens dropped there, or zeros.

    Returns:
        ``[B, N, C]``: ``where(keep, x, base)``.
    """
    return torch.where(keep.unsqueeze(-1), x, base)


@restore.register_fake
def _(x: Tensor, keep: Tensor, base: Tensor) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("tpcompile::take", mutates_args=())
def take(x: Tensor, index: Tensor, batch: int, dim: int) -> Tensor:
    """Gather along a dim, each sample by its own positions.

    Args:
        x: any rank; ``x.shape[batch]`` is B, or 1 for what all samples share.
        index: int64 ``[B, K]``, positions along ``dim``.
        batch: the dim that runs over samples.
        dim: the dim to gather along.

    Returns:
        ``x`` with B at ``batch`` and K at ``dim``.
    """
    return torch.take_along_dim(x, _along(index, x.dim(), batch, dim), dim)


@take.register_fake
def _(x: Tensor, index: Tensor, batch: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[batch], shape[dim] = index.shape
    return x.new_empty(shape)


@torch.library.custom_op("tpcompile::put", mutates_args=())
def put(base: Tensor, rows: Tensor, index: Tensor, keep: Tensor) -> Tensor:
    """Write rows back to their positions: the gathered form of ``restore``.

    Args:
        base: ``[B, N, C]``.
        rows: ``[B, K, C]``.
        index: int64 ``[B, K]``, positions in ``base``, distinct within a sample.
        keep: bool ``[B, K]``; a stored row that is not kept leaves ``base`` as it is.

    Returns:
        ``[B, N, C]``.
    """
    where = _along(index, 3, 0, 1).expand(-1, -1, base.shape[2])
    return base.scatter(1, where, torch.where(keep.unsqueeze(-1), rows, base.gather(1, where)))


@put.register_fake
def _(base: Tensor, rows: Tensor, index: Tensor, keep: Tensor) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("tpcompile::memory", mutates_args=())
def memory(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The living rows alone, for a reader that takes a mask beside them: what a decoder's cross-attention reads.

    Short in masked form as well, so both forms give the same rows in the same order. Rows that fill up a batch, or a memory of one
    token, are zeros.

    Args:
        x: hidden states ``[B, N, C]``.
        keep: bool ``[B, N]``, the keep mask of the last site before it.

    Returns:
        ``[B, K, C]``, and bool ``[B, K]``: the rows that live.
    """
    nothing = torch.zeros_like(keep)
    positions = torch.from_numpy(store(keep.cpu().numpy(), nothing.cpu().numpy(), Rows())).to(x.device)
    alive = torch.gather(keep, 1, positions)
    rows = torch.gather(x, 1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.where(alive.unsqueeze(-1), rows, 0.0), alive


@memory.register_fake
def _(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size(min=MIN_COUNT)
    return x.new_empty(x.shape[0], count, x.shape[2]), keep.new_empty(x.shape[0], count)


def _along(index: Tensor, rank: int, batch: int, dim: int) -> Tensor:
    """``[B, K]`` with B at ``batch``, K at ``dim`` and 1 elsewhere."""
    shape = [1] * rank
    shape[batch], shape[dim] = index.shape
    return (index if batch < dim else index.transpose(0, 1)).reshape(shape)


PRUNE = torch.ops.tpcompile.prune.default
GATHERED = torch.ops.tpcompile.gathered.default
RANK = torch.ops.tpcompile.rank.default
RESTORE = torch.ops.tpcompile.restore.default
COMPACT = torch.ops.tpcompile.compact.default
MEMORY = torch.ops.tpcompile.memory.default
FIT = torch.ops.tpcompile.fit.default
TAKE = torch.ops.tpcompile.take.default
PUT = torch.ops.tpcompile.put.default
