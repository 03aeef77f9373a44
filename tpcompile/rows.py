"""How many rows a site stores, and which: one policy for the eager op, the ONNX translation and the staged runtime.

Any stored set that holds the kept tokens is exact (docs/decisions/0002), so a lowering only chooses how many dropped rows go along:

- ``dynamic``: none, but for ``MIN_COUNT``, and not even for that where a site is ``exact``;
- ``bucketed``: as many as reach the next rung of a ladder, so that few distinct sizes occur;
- ``static``: a constant. A sample that keeps more loses the tokens of lowest score before the site (``fit``): it *overflows*, and is
  approximate; what is computed is the masked model under the smaller mask.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MIN_COUNT = 2
"""Least number of stored tokens (design.md 5): sizes of 0 and 1 are special to torch's shape guards."""
FAR = 3e38
"""Beyond every finite score: where pinned rows stand when scores are sorted, and, negative, dropped ones."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The policy of one site; without a ladder and a limit it is ``dynamic``.

    Attributes:
        ladder: rising sizes; a count is rounded up to the first that holds it, and beyond the last to a multiple of it.
        limit: a constant count.
        exact: one sample, and its kept rows are all there is: no row is stored that is dropped, and masks behind the site are gone.
    """

    ladder: tuple[int, ...] = ()
    limit: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no policy.

        Raises:
            ValueError: a ladder that does not rise from ``MIN_COUNT`` upwards, a limit below it.
        """
        rising = all(low < high for low, high in pairwise((MIN_COUNT - 1, *self.ladder)))
        if not rising or (self.limit and self.limit < MIN_COUNT):
            sizes = ", ".join(map(str, self.ladder or (self.limit,)))
            raise ValueError(f"{sizes} is no rising list of sizes from {MIN_COUNT}")

    def count(self, needed: int, length: int) -> int:
        """Rows to store.

        Args:
            needed: the batch's largest number of kept or pinned rows.
            length: rows there are.
        """
        if self.limit:
            return min(self.limit, length)
        return min(self.rung(max(needed, 1 if self.exact else MIN_COUNT)), length)

    def rung(self, needed: int) -> int:
        """The first size of the ladder that holds a count."""
        if not self.ladder:
            return needed
        last = self.ladder[-1]
        return next((rung for rung in self.ladder if rung >= needed), -(-needed // last) * last)


def store(keep: NDArray[np.bool_], pinned: NDArray[np.bool_], rows: Rows) -> NDArray[np.int64]:
    """Positions of the rows to store: the kept and pinned ones in order, then dropped ones of the same sample in order.

    Args:
        keep: bool ``[B, N]``.
        pinned: bool ``[B, N]`` or ``[1, N]``.
        rows: the policy.

    Returns:
        int64 ``[B, K]``.

    Raises:
        ValueError: a constant count is too small: ``fit`` was left out.
    """
    stored = keep | pinned
    needed, length = int(stored.sum(1).max()), keep.shape[1]
    count = rows.count(needed, length)
    if needed > count:
        raise ValueError(f"{needed} rows do not fit into {count}")
    return np.ascontiguousarray(np.argsort(~stored, axis=1, kind="stable")[:, :count])


def fit(keep: NDArray[np.bool_], pinned: NDArray[np.bool_], score: NDArray[np.floating] | None, limit: int) -> NDArray[np.bool_]:
    """The kept tokens that find room in a constant count beside the pinned ones: those of highest score, equal scores in order.

    Args:
        keep: bool ``[B, N]``.
        pinned: bool ``[B, N]`` or ``[1, N]``, at most ``limit`` a sample.
        score: float ``[B, N]``; None: the first tokens stay.
        limit: the count.

    Returns:
        bool ``[B, N]``, contained in ``keep``.
    """
    rank = np.broadcast_to(-np.arange(keep.shape[1], dtype=np.float32), keep.shape) if score is None else score
    key = np.where(pinned, FAR, np.where(keep, np.clip(rank, -FAR / 2, FAR / 2), -FAR))
    best = np.zeros(keep.shape, dtype=bool)
    np.put_along_axis(best, np.argsort(-key, axis=1, kind="stable")[:, :limit], True, axis=1)
    return keep & best
