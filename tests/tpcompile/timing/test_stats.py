"""Percentiles, bounds and ratios."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcompile.timing.stats import as_json, bounds, drift, least, mean_ratio, paired_ratio, spread, summarise

times = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=80).map(np.array)


def test_least_samples_are_the_known_numbers():
    assert [least(q) for q in (0.9, 0.95, 0.99)] == [29, 59, 299]


@pytest.mark.parametrize(("n", "known"), [(4, 0), (28, 1), (29, 2), (59, 3), (298, 3), (299, 4)])
def test_percentiles_only_where_supported(n, known):
    summary = summarise(np.arange(1.0, n + 1))
    assert sum(value is not None for value in (summary.p50, summary.p90, summary.p95, summary.p99)) == known
    assert summary.total == n * (n + 1) / 2
    assert (summarise(np.arange(300.0), n).p99 is None) == (n < 299)  # calls of few inputs are no samples


@settings(deadline=None)
@given(times, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_bounds_enclose_or_are_infinite(values, quantile):
    low, high = bounds(values, quantile, 0.95)
    assert low <= high
    assert math.isinf(high) == (len(values) < least(quantile))


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 2**16))
def test_bounds_cover_as_often_as_they_say(seed):
    draws = np.random.default_rng(seed).exponential(size=(400, 80))
    truth = -math.log(1 - 0.9)
    covered = [low <= truth for low, _ in (bounds(row, 0.9, 0.95) for row in draws)]
    above = [high >= truth for _, high in (bounds(row, 0.9, 0.95) for row in draws)]
    assert min(np.mean(covered), np.mean(above)) > 0.9


@settings(deadline=None, max_examples=10)
@given(st.floats(0.2, 5), st.integers(0, 2**16))
def test_constant_ratio_has_no_width(ratio, seed):
    second = np.random.default_rng(seed).uniform(1, 9, (3, 30))
    found = paired_ratio(second * ratio, second, 0.95, seed)
    assert found.low == pytest.approx(ratio)
    assert found.high == pytest.approx(ratio)


def test_ratio_is_paired_and_repeatable():
    rng = np.random.default_rng(0)
    second = rng.uniform(1, 100, (4, 60))  # samples differ a hundredfold, their ratio by a few percent
    first = second * rng.uniform(1.9, 2.1, (4, 60))
    found = paired_ratio(first, second, 0.95, 7)
    assert 1.9 < found.low < found.value < found.high < 2.1
    assert found == paired_ratio(first, second, 0.95, 7)


def test_few_pairs_or_one_pass_say_nothing():
    for shape in ((3, 4), (1, 40)):
        found = paired_ratio(np.full(shape, 3.0), np.ones(shape), 0.95, 0)
        assert (found.value, found.low, found.high) == (pytest.approx(3.0), 0.0, math.inf)


def test_a_ratio_is_positive_however_little_is_known():
    """Two passes that differ by a factor of three."""
    second = np.ones((2, 30))
    found = paired_ratio(second * np.array([[0.5], [1.5]]), second, 0.95, 0)
    assert 0 < found.low < 0.5 < 1.5 < found.high < math.inf


def noisy(kind, rng, factor=1.0, passes=6, n=40):
    """Two engines' times on a machine with noise of one kind; the second takes ``factor`` times the first's."""
    base = rng.uniform(1, 4, n) * np.exp(rng.normal(0, 0.005, (2, passes, 1)))  # sessions differ by half a percent
    base[0, ::2] *= 1.04  # who was opened first is slower
    base[1, 1::2] *= 1.04
    log = rng.normal(0, 0.03, (2, passes, n))
    if kind == "spiky":
        log += (rng.random(log.shape) < 0.08) * rng.exponential(1, log.shape)
    if kind == "drifting":
        log += np.linspace(0, 0.4, passes * n).reshape(passes, n)
    if kind == "autocorrelated":  # a neighbour comes and goes; it meets both engines of a pair, one a little more
        wave = np.convolve(rng.normal(0, 0.3, passes * n + 7), np.ones(8) / 8, mode="valid").reshape(passes, n)
        log += wave + 0.1 * wave * rng.normal(0, 1, (2, passes, n))
    first, second = base * np.exp(log)
    return first, second * factor


@pytest.mark.parametrize("kind", ["plain", "spiky", "drifting", "autocorrelated"])
def test_the_interval_is_honest_under_noise(kind):
    """Of a hundred comparisons of an engine with itself few miss 1 and hardly any finds a difference; 5 % more time is found."""
    rng = np.random.default_rng(len(kind))
    alike = [paired_ratio(*noisy(kind, rng), 0.95, 0) for _ in range(100)]
    slower = [paired_ratio(*noisy(kind, rng, 1.05), 0.95, 0) for _ in range(40)]
    assert sum(found.low <= 1 <= found.high for found in alike) >= 93
    assert sum(found.differs(0.01) != 0 for found in alike) <= 1
    assert sum(found.differs(0.01) == -1 for found in slower) >= 36


def test_rounds_have_students_interval():
    found = mean_ratio(np.log(np.array([2.0, 2.1, 1.9, 2.0])), 0.95)
    assert found.low < 2.0 < found.high
    assert found.value == pytest.approx(1.9987, abs=1e-3)
    assert mean_ratio(np.zeros(1), 0.95).high == math.inf


def test_drift_is_the_rise_from_first_to_last():
    assert drift(np.array([1.0, 1.1, 1.21])) == pytest.approx(0.21)
    assert drift(np.array([1.0, 5.0, 1.0, 1.0])) == pytest.approx(0.0)  # one disturbed pass is no drift
    assert drift(np.ones(1)) == 0.0


def test_spread_of_passes():
    assert spread(np.array([2.0, 2.2])) == pytest.approx(0.1)


def test_as_json_is_strict_json():
    document = as_json({"a": (1.0, math.nan), "b": np.arange(2), "c": summarise(np.ones(3))})
    assert json.loads(json.dumps(document, allow_nan=False))["a"] == [1.0, None]
