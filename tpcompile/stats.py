"""The statistics behind a verdict: percentiles that the sample supports, their bounds, paired ratios. Pure functions of numbers.

scipy is imported where it is used: its import takes most of a second, and the command line's help must not wait for it.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.5, 0.9, 0.95, 0.99)
SUPPORT = 0.95
"""Confidence with which the largest value must exceed a quantile before the quantile is reported: 29, 59 and 299 samples."""

RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
        confidence: of the two-sided interval.
    """

    value: float
    low: float
    high: float
    confidence: float

    def widened(self, noise: float) -> "Interval":
        """The same for a ratio of two measurements, each of which may be off by ``noise`` (relative)."""
        return Interval(self.value, self.low / (1 + noise), self.high * (1 + noise), self.confidence)


@dataclass(frozen=True, slots=True)
class Summary:
    """Times of one engine in one phase, in ms; a percentile is None where the sample is too small for it."""

    count: int
    total: float
    mean: float
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None


def least(quantile: float, confidence: float = SUPPORT) -> int:
    """The fewest samples whose largest value bounds the quantile, whatever the distribution: p90 29, p95 59, p99 299."""
    return math.ceil(math.log(1 - confidence) / math.log(quantile))


def summarise(milliseconds: NDArray[np.float64]) -> Summary:
    """Sum, mean and the percentiles that ``[n]`` times support."""
    n = len(milliseconds)
    known = [float(np.quantile(milliseconds, q)) if n >= least(q) else None for q in QUANTILES]
    return Summary(n, float(milliseconds.sum()), float(milliseconds.mean()), *known)


def bounds(values: NDArray[np.float64], quantile: float, confidence: float) -> tuple[float, float]:
    """Distribution-free one-sided confidence bounds of a quantile, from order statistics.

    Args:
        values: ``[n]``.
        quantile: between 0 and 1.
        confidence: of each side.

    Returns:
        The lower and the upper bound; infinite where the sample is too small.
    """
    from scipy.stats import binom

    ordered = np.sort(values)
    n = len(ordered)
    # chance that the value at rank i + 1 is not below the quantile
    below = binom.cdf(np.arange(n), n, quantile)
    low, high = np.flatnonzero(below <= 1 - confidence), np.flatnonzero(below >= confidence)
    return (float(ordered[low[-1]]) if low.size else -math.inf, float(ordered[high[0]]) if high.size else math.inf)


def paired_ratio(first: NDArray[np.float64], second: NDArray[np.float64], confidence: float, seed: int) -> Interval:
    """``sum(first) / sum(second)`` with a bootstrap interval over pairs; a sample's two times stay together.

    Args:
        first: ``[n]`` times of one engine.
        second: ``[n]`` times of the other on the same samples.
        confidence: of the two-sided interval.
        seed: of the resampling.

    Returns:
        The interval; infinitely wide for fewer pairs than a bound of the median needs: resampling so few says nothing.
    """
    from scipy.stats import bootstrap

    def ratio(a: NDArray[np.float64], b: NDArray[np.float64], axis: int = -1) -> Any:
        return a.sum(axis=axis) / b.sum(axis=axis)

    value = float(ratio(first, second))
    if len(first) < least(0.5, confidence):
        return Interval(value, 0.0, math.inf, confidence)
    found = bootstrap(
        (first, second),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=confidence,
        method="percentile",  # BCa divides by zero where all pairs have the same ratio
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), confidence)


def spread(values: NDArray[np.float64]) -> float:
    """A-A noise: how far the largest of ``[passes]`` repeated measurements is above the smallest, as a share."""
    return float(values.max() / values.min() - 1)


def as_json(value: Any) -> Any:
    """Dataclasses, mappings, arrays and tuples as JSON takes them; numbers that are not finite become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, tuple | list):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
