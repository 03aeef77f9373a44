"""Cores: the measurement is kept on some, and given back."""

import gc
import os

import pytest

from tpcompile.timing import pinned, without_gc


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no threads")
def test_threads_are_pinned_and_given_back():
    before = os.sched_getaffinity(0)
    with pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores) == {max(before)}
    assert os.sched_getaffinity(0) == before
    with pinned(10_000) as cores:
        assert set(cores) == before


def test_no_garbage_is_collected_while_the_clock_runs():
    assert gc.isenabled()
    with without_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
