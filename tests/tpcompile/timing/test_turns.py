"""Cores: the measurement is kept on some, and given back."""

import gc
import os

import numpy as np
import pytest

from tpcompile.data.samples import Sample
from tpcompile.timing.turns import TASKS, measure, pinned, queued_ns, without_gc


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no threads")
def test_threads_are_pinned_and_given_back():
    before = os.sched_getaffinity(0)
    with pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores) == {max(before)}
    assert os.sched_getaffinity(0) == before
    with pinned(10_000) as cores:
        assert set(cores) == before


def test_progress_is_told_before_every_pass():
    class Engine:
        def __call__(self, **inputs):
            return inputs

        def close(self):
            pass

    told = []
    cold, warm = measure(Engine, Engine, [Sample("", {"x": np.ones((1, 2))})] * 3, 2, lambda *step: told.append(step))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert cold.wall.shape == warm.wall.shape == (2, 2, 3)


def test_no_garbage_is_collected_while_the_clock_runs():
    assert gc.isenabled()
    with without_gc():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.skipif(not (TASKS / str(os.getpid()) / "schedstat").exists(), reason="this system does not say who stands in line")
def test_time_in_line_for_a_core_only_grows():
    first = queued_ns()
    assert first is not None
    assert 0 <= first <= queued_ns()
