"""Percentiles, bounds and ratios."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcompile.stats import as_json, bounds, least, paired_ratio, spread, summarise

times = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=80).map(np.array)


def test_least_samples_are_the_known_numbers():
    assert [least(q) for q in (0.9, 0.95, 0.99)] == [29, 59, 299]


@pytest.mark.parametrize(("n", "known"), [(4, 0), (28, 1), (29, 2), (59, 3), (298, 3), (299, 4)])
def test_percentiles_only_where_supported(n, known):
    summary = summarise(np.arange(1.0, n + 1))
    assert sum(value is not None for value in (summary.p50, summary.p90, summary.p95, summary.p99)) == known
    assert summary.total == n * (n + 1) / 2


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


@settings(deadline=None, max_examples=20)
@given(st.floats(0.2, 5), st.integers(0, 2**16))
def test_constant_ratio_has_no_width(ratio, seed):
    second = np.random.default_rng(seed).uniform(1, 9, 30)
    found = paired_ratio(second * ratio, second, 0.95, seed)
    assert found.low == pytest.approx(ratio)
    assert found.high == pytest.approx(ratio)


def test_ratio_is_paired_and_repeatable():
    rng = np.random.default_rng(0)
    second = rng.uniform(1, 100, 60)  # samples differ a hundredfold, their ratio by a few percent
    first = second * rng.uniform(1.9, 2.1, 60)
    found = paired_ratio(first, second, 0.95, 7)
    assert 1.9 < found.low < found.value < found.high < 2.1
    assert found == paired_ratio(first, second, 0.95, 7)


def test_few_pairs_say_nothing():
    found = paired_ratio(np.array([3.0, 3.0, 3.0, 3.0]), np.ones(4), 0.95, 0)
    assert (found.value, found.low, found.high) == (3.0, 0.0, math.inf)


def test_spread_of_passes():
    assert spread(np.array([2.0, 2.2])) == pytest.approx(0.1)


def test_as_json_is_strict_json():
    document = as_json({"a": (1.0, math.nan), "b": np.arange(2), "c": summarise(np.ones(3))})
    assert json.loads(json.dumps(document, allow_nan=False))["a"] == [1.0, None]
