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

RESAMPLES = 2000
BALANCED = 4
"""Passes from which on an effect of the order of opening can be told from noise."""


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

    def differs(self, effect: float) -> int:
        """1 where a ratio is surely above ``1 + effect``, -1 where surely below ``1 - effect``, 0 where neither is sure."""
        return int(self.low > 1 + effect) - int(self.high < 1 - effect)


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


def summarise(milliseconds: NDArray[np.float64], inputs: int | None = None) -> Summary:
    """Sum, mean and the percentiles that ``[n]`` times support; of fewer ``inputs`` run again and again, those that the inputs do."""
    n = len(milliseconds)
    known = [float(np.quantile(milliseconds, q)) if (inputs or n) >= least(q) else None for q in QUANTILES]
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
    """How many times longer ``first`` takes than ``second`` over a stream, from calls in pairs a moment apart.

    The estimate weighs each sample's median ratio over passes by its time, so that a pass disturbed at one sample does not count. Two
    sources make the interval. Samples: a bootstrap over blocks of neighbours, two ABBA rounds or more each, as disturbances last longer
    than a call. Passes: what two passes differ by at the weighted median sample, which holds whatever a session keeps from its
    opening to its end, such as where its memory lies; with Student's factor, as passes are few. What even and odd passes differ by is
    the order of opening, which takes turns (seen: 4 % for the one opened first): it is evened out and no noise.

    Args:
        first: ``[passes, n]`` times of one engine; opened first in even passes.
        second: ``[passes, n]`` times of the other, call by call beside the first's.
        confidence: of the two-sided interval.
        seed: of the resampling.

    Returns:
        The interval; infinitely wide for one pass, or fewer samples than a bound of the median needs: resampling so few says nothing.
    """
    logs, weights = np.log(first / second), np.median(second, axis=0)
    passes, n = logs.shape
    turns = 2 if passes >= BALANCED else 1
    if turns == 2:
        tilt = _weighted_median(np.median(logs[::2], axis=0) - np.median(logs[1::2], axis=0), weights) / 2
        logs = logs - tilt * (-1.0) ** np.arange(passes)[:, None]
    medians = np.exp(np.median(logs, axis=0))
    value = float((weights * medians).sum() / weights.sum())
    if n < least(0.5, confidence) or passes < 2:
        return Interval(value, 0.0, math.inf, confidence)
    drawn = _blocks(n, np.random.default_rng(seed))
    low, high = np.quantile((weights * medians)[drawn].sum(axis=1) / weights[drawn].sum(axis=1), _tails(confidence))
    apart = [_weighted_median(logs[i] - logs[j], weights) for i in range(passes) for j in range(i % turns, i, turns)]
    reach = student(np.sqrt(np.mean(np.square(apart)) / 2), passes, passes - turns, confidence)
    down, up = math.hypot(math.log(value / low), reach), math.hypot(math.log(high / value), reach)
    return Interval(value, value * math.exp(-down), value * math.exp(up), confidence)


def mean_ratio(logs: NDArray[np.float64], confidence: float) -> Interval:
    """The ratio whose logarithms were measured independently, ``[rounds]``, with Student's interval; infinitely wide for one."""
    value = math.exp(float(logs.mean()))
    if len(logs) < 2:
        return Interval(value, 0.0, math.inf, confidence)
    reach = math.exp(student(float(logs.std(ddof=1)), len(logs), len(logs) - 1, confidence))
    return Interval(value, value / reach, value * reach, confidence)


def student(deviation: float, count: int, freedom: int, confidence: float) -> float:
    """How far the mean of ``count`` values may be off, on either side, by a standard deviation with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, freedom)) * float(deviation) / math.sqrt(count)


def _blocks(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``RESAMPLES`` draws of ``n`` indices in blocks of neighbours, the last next to the first."""
    length = 2 * math.ceil(n ** (1 / 3) / 2)
    starts = rng.integers(0, n, (RESAMPLES, -(-n // length), 1))
    return ((starts + np.arange(length)) % n).reshape(RESAMPLES, -1)[:, :n]


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(below, below[-1] / 2)])


def spread(values: NDArray[np.float64]) -> float:
    """A-A noise: how far the largest of ``[passes]`` repeated measurements is above the smallest, as a share."""
    return float(values.max() / values.min() - 1)


def drift(values: NDArray[np.float64]) -> float:
    """By which share ``[passes]`` measurements rose from the first to the last, by the median of all slopes (Theil and Sen)."""
    logs = np.log(values)
    slopes = [(logs[i] - logs[j]) / (i - j) for i in range(len(logs)) for j in range(i)]
    return math.expm1(float(np.median(slopes)) * (len(logs) - 1)) if slopes else 0.0


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
