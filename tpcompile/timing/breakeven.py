"""From where on pruning pays: a line of time over work for each engine, and where the two cross.

An inference costs a fixed part and so much for each FLOP: ``t = fixed + rate * work``, fitted by least squares on every other sample, with
the work from the manifest's formulas, and checked on the samples between. Where all samples have one length the dense engine's time is
one number, and only the rate of what is kept can be predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpcompile.flops import Counts, Formulas, saving

RATES = np.linspace(0.02, 1.0, 99)
FLAT = 0.01
"""Work that varies by less than this share gives no line."""
BATCHES = 64
NEAR = 5
"""Samples that say what others of their length keep."""


@dataclass(frozen=True, slots=True)
class Line:
    """Milliseconds an inference: ``fixed + rate * work`` with the work in GFLOP."""

    fixed: float
    rate: float

    def at(self, work: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """The time for this work, in FLOP."""
        return np.asarray(self.fixed + self.rate * np.asarray(work) / 1e9)


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where pruning begins to pay; None where it does not happen in range, or cannot be told.

    Attributes:
        dense: the dense engine's line.
        pruned: the pruned engine's.
        keep: largest share of the tokens that every site may keep, at the median length.
        length: fewest tokens, at the shares that samples of about that length keep; within the lengths seen.
        batch: fewest samples an inference, at the median length and its shares; 1 where one is enough.
        error: median relative error of both lines on samples they were not fitted on.
        agrees: share of those samples on which the lines name the faster engine rightly.
        measured_length: fewest tokens from which on the measured medians are faster; to be held against ``length``.
    """

    dense: Line
    pruned: Line
    keep: float | None
    length: int | None
    batch: int | None
    error: float
    agrees: float
    measured_length: int | None


def break_even(
    flops: Formulas, counts: Sequence[Counts], dense: NDArray[np.float64], pruned: NDArray[np.float64]
) -> BreakEven | None:
    """Fit, predict and check.

    Args:
        flops: of the pruned bundle.
        counts: per sample.
        dense: ms ``[n]`` of the dense engine.
        pruned: ms ``[n]`` of the pruned one.

    Returns:
        None without formulas, or with fewer than eight samples.
    """
    if not flops.tokens or len(counts) < 8 or len(counts) != len(dense):
        return None
    work = [saving(flops, [one]) for one in counts]
    full, left = (np.array([getattr(one, name) for one in work]) for name in ("graph_dense", "graph_pruned"))
    fit, check = slice(0, None, 2), slice(1, None, 2)
    lines = _line(full[fit], dense[fit]), _line(left[fit], pruned[fit])
    predicted = lines[0].at(full[check]), lines[1].at(left[check])
    errors = np.concatenate([abs(predicted[0] / dense[check] - 1), abs(predicted[1] / pruned[check] - 1)])
    agrees = float(((predicted[1] < predicted[0]) == (pruned[check] < dense[check])).mean())
    lengths = np.array([one.tokens for one in counts])
    middle = int(np.median(lengths))
    measured = _first(np.sort(lengths), (pruned < dense)[np.argsort(lengths, kind="stable")])
    return BreakEven(
        *lines, _keep(flops, lines, middle, len(counts[0].stored)), _length(flops, lines, counts[fit]) if _varies(full) else None,
        _batch(flops, lines, middle, _shares(counts[fit], middle)), float(np.median(errors)), agrees, measured,
    )  # fmt: skip


def _varies(work: NDArray[np.float64]) -> bool:
    return bool(np.ptp(work) > FLAT * work.mean())


def _line(work: NDArray[np.float64], times: NDArray[np.float64]) -> Line:
    """Least squares on relative errors, neither part negative; through the origin where the work does not vary."""
    from scipy.optimize import nnls

    giga = work / 1e9
    columns = np.stack([np.ones_like(giga), giga] if _varies(work) else [np.zeros_like(giga), giga], axis=1)
    fixed, rate = nnls(columns / times[:, None], np.ones_like(times))[0]
    return Line(float(fixed), float(rate))


def _works(flops: Formulas, length: int, shares: NDArray[np.float64]) -> tuple[float, float]:
    """Dense and pruned FLOP of one sample of which every site keeps a share."""
    kept = tuple(int(max(1, round(length * share))) for share in shares)
    one = saving(flops, [Counts(length, kept, kept)])
    return one.graph_dense, one.graph_pruned


def _keep(flops: Formulas, lines: tuple[Line, Line], length: int, sites: int) -> float | None:
    works = [_works(flops, length, np.full(sites, rate)) for rate in RATES]
    pays = [bool(lines[1].at(left) < lines[0].at(full)) for full, left in works]
    return float(RATES[max(i for i, one in enumerate(pays) if one)]) if any(pays) else None


def _shares(counts: Sequence[Counts], length: int) -> NDArray[np.float64]:
    """What each site stores of samples of about this length, as shares."""
    near = sorted(counts, key=lambda one: abs(one.tokens - length))[:NEAR]
    return np.asarray(np.mean([np.array(one.stored) / one.tokens for one in near], axis=0))


def _length(flops: Formulas, lines: tuple[Line, Line], counts: Sequence[Counts]) -> int | None:
    seen = [one.tokens for one in counts]
    lengths = np.arange(min(seen), max(seen) + 1)
    works = [_works(flops, int(n), _shares(counts, int(n))) for n in lengths]
    return _first(lengths, np.array([bool(lines[1].at(left) < lines[0].at(full)) for full, left in works]))


def _first(lengths: NDArray[np.int64], pays: NDArray[np.bool_]) -> int | None:
    """The least length from which on, for every longer one too, it pays."""
    loses = np.flatnonzero(~pays)
    first = int(loses[-1]) + 1 if loses.size else 0
    return int(lengths[first]) if first < len(lengths) else None


def _batch(flops: Formulas, lines: tuple[Line, Line], length: int, shares: NDArray[np.float64]) -> int | None:
    full, left = _works(flops, length, shares)
    sizes = range(1, BATCHES + 1)
    return next((size for size in sizes if lines[1].at(size * left) < lines[0].at(size * full)), None)
