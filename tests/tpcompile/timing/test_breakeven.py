"""Break-even: known lines are found again, their crossing is where arithmetic puts it."""

from dataclasses import dataclass

import numpy as np
import pytest

from tpcompile.flops import Counts
from tpcompile.timing.breakeven import break_even


@dataclass(frozen=True)
class Formulas:
    tokens: tuple = ("t0", "t1")
    paper: tuple = ((1e6, ("t1",)),)
    graph: tuple = ((1e6, ("t1",)),)
    dense: tuple = ((1e6, ("t0",)),)


NONE = Formulas((), (), (), ())


def measured(fixed, keep=0.5, noise=0.0, lengths=range(10, 90)):
    """Dense: 1 ms a GFLOP and 0.01 ms beside; pruned: the same rate and another fixed part. A token is 0.001 GFLOP."""
    counts = [Counts(n, (int(n * keep),), (int(n * keep),)) for n in lengths]
    rough = np.random.default_rng(0).normal(1, noise, (2, len(counts)))
    dense = np.array([0.01 + 1e-3 * one.tokens for one in counts]) * rough[0]
    return counts, dense, np.array([fixed + 1e-3 * one.stored[0] for one in counts]) * rough[1]


def test_lines_and_crossings_are_found():
    found = break_even(Formulas(), *measured(0.03))
    assert (found.dense.fixed, found.dense.rate) == (pytest.approx(0.01), pytest.approx(1.0))
    assert (found.pruned.fixed, found.pruned.rate) == (pytest.approx(0.03), pytest.approx(1.0))
    assert found.keep == pytest.approx(1 - 0.02 / 0.049, abs=0.03)  # 49 tokens: 0.01 + 0.049 = 0.03 + 0.049 k
    assert found.length == pytest.approx(41, abs=2)  # 0.02 = 0.0005 n
    assert found.measured_length == pytest.approx(found.length, abs=2)
    assert found.error < 1e-6
    assert found.agrees > 0.95


def test_noise_leaves_the_crossing_near():
    found = break_even(Formulas(), *measured(0.03, noise=0.05))
    assert found.length == pytest.approx(41, abs=15)
    assert 0.01 < found.error < 0.1


def test_a_batch_pays_where_one_sample_does_not():
    found = break_even(Formulas(), *measured(0.11, lengths=range(20, 60)))
    assert (found.length, found.measured_length, found.keep) == (None, None, None)
    assert found.batch == 6  # 0.1 ms more, 0.0195 ms a sample less


def test_one_length_predicts_the_keep_rate_only():
    counts = [Counts(49, (k,), (k,)) for k in range(5, 45)]
    found = break_even(Formulas(), counts, np.full(40, 0.06), np.array([0.03 + 1e-3 * one.stored[0] for one in counts]))
    assert found.length is None
    assert found.keep == pytest.approx(30 / 49, abs=0.03)


def test_nothing_is_said_without_formulas_or_samples():
    assert break_even(NONE, *measured(0.03)) is None
    assert break_even(Formulas(), *measured(0.03, lengths=range(10, 16))) is None
