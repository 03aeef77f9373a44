"""Task scores of two models on the same cases, and whether their difference may be chance. Pure functions of numbers."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tpcompile.timing.stats import Interval, least

Values = NDArray[np.float64]
Metric = Callable[[Values, Values], Values]
"""Answers and right answers ``[..., n]`` to a score ``[...]``."""

RESAMPLES = 2000
CHUNK = 2_000_000
"""Numbers of a resampling held at once."""


def accuracy(given: Values, right: Values) -> Values:
    """Share of equal answers."""
    return np.asarray((given == right).mean(-1))


def f1(given: Values, right: Values) -> Values:
    """F1 of class 1; 0 where neither side has it."""
    both = ((given == 1) & (right == 1)).sum(-1)
    return np.asarray(2 * both / np.maximum((given == 1).sum(-1) + (right == 1).sum(-1), 1))


def matthews(given: Values, right: Values) -> Values:
    """Matthews correlation of two classes: the correlation of their indicators; 0 where one side is constant."""
    return pearson((given == 1).astype(np.float64), (right == 1).astype(np.float64))


def pearson(given: Values, right: Values) -> Values:
    """Pearson correlation; 0 where one side is constant."""
    a, b = (side - side.mean(-1, keepdims=True) for side in (given, right))
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.asarray(np.where(norm > 0, (a * b).sum(-1) / np.where(norm > 0, norm, 1.0), 0.0))


def mean(given: Values, right: Values) -> Values:
    """Of scores that are known by case."""
    return np.asarray(given.mean(-1))


METRICS: Mapping[str, Metric] = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson}
"""By the name that a data set asks for."""


def drop_interval(metric: Metric, dense: Values, pruned: Values, right: Values, confidence: float, seed: int = 0) -> Interval | None:
    """How far the score falls from dense to pruned, with a bootstrap interval over cases; a case's two answers stay together.

    Where no case differs resampling says nothing: then the interval is the exact binomial bound of the share of cases that do.

    Args:
        metric: of answers.
        dense: ``[n]`` answers.
        pruned: ``[n]`` answers.
        right: ``[n]`` right answers.
        confidence: of the two-sided interval.
        seed: of the resampling.

    Returns:
        None for fewer cases than a bound of the median needs: resampling so few says nothing.
    """
    count = len(dense)
    if count < least(0.5, confidence):
        return None
    if np.array_equal(dense, pruned):
        most = float(1 - ((1 - confidence) / 2) ** (1 / count))
        return Interval(0.0, -most, most, confidence)
    rng, falls = np.random.default_rng(seed), []
    rows = max(1, min(RESAMPLES, CHUNK // count))
    for start in range(0, RESAMPLES, rows):
        index = rng.integers(0, count, (min(rows, RESAMPLES - start), count))
        falls.append(metric(dense[index], right[index]) - metric(pruned[index], right[index]))
    low, high = np.quantile(np.concatenate(falls), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(metric(dense, right) - metric(pruned, right)), float(low), float(high), confidence)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the chance of so uneven a split of the cases on which one model alone is right.

    Args:
        lost: cases only dense has right.
        gained: cases only pruned has right.
    """
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
