"""Task scores, the interval of a drop, McNemar's test."""

import numpy as np
import pytest

from tpcompile.proof.scores import METRICS, drop_interval, mcnemar


def test_metrics_against_their_definitions():
    from sklearn.metrics import f1_score, matthews_corrcoef

    rng = np.random.default_rng(0)
    right, given = rng.integers(0, 2, (2, 5, 40)).astype(np.float64)
    for i, row in enumerate(METRICS["matthews"](given, right)):
        assert row == pytest.approx(matthews_corrcoef(right[i], given[i]))
        assert METRICS["f1"](given, right)[i] == pytest.approx(f1_score(right[i], given[i]))
        assert METRICS["pearson"](given, right)[i] == pytest.approx(np.corrcoef(given[i], right[i])[0, 1])
    assert METRICS["matthews"](np.zeros(4), np.array([0.0, 1, 0, 1])) == 0
    assert METRICS["f1"](np.zeros(2), np.zeros(2)) == 0


def test_the_interval_holds_the_drop_as_often_as_it_says():
    """200 draws of 150 cases, each of which the pruned model loses with 6 % and gains with 2 %: a drop of 4 points."""
    rng, inside = np.random.default_rng(1), 0
    right = np.ones(150)
    for _ in range(200):
        u = rng.random(150)
        dense, pruned = (u < 0.9).astype(float), ((u < 0.84) | (u > 0.98)).astype(float)
        found = drop_interval(METRICS["accuracy"], dense, pruned, right, 0.9)
        inside += found.low <= 0.04 <= found.high
    assert 165 <= inside <= 195


def test_few_cases_have_no_interval():
    assert drop_interval(METRICS["accuracy"], np.ones(3), np.ones(3), np.ones(3), 0.95) is None


def test_cases_that_all_agree_bound_the_drop_and_do_not_exclude_one():
    from scipy.stats import binomtest

    found = drop_interval(METRICS["accuracy"], np.ones(50), np.ones(50), np.zeros(50), 0.95)
    assert (found.value, found.low) == (0.0, -found.high)
    assert found.high == pytest.approx(binomtest(0, 50).proportion_ci(0.95).high)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(8, 0) == pytest.approx(2 * 0.5**8)
