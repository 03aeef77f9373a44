"""Cores: the measurement is kept on some, and given back."""

import os

import pytest

from tpcompile.timing import turns
from tpcompile.timing.turns import TASKS, Tick, measure, pinned, queued_ns


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no threads")
def test_threads_are_pinned_and_given_back():
    before = os.sched_getaffinity(0)
    with pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores) == {max(before)}
    assert os.sched_getaffinity(0) == before
    with pinned(10_000) as cores:
        assert set(cores) == before


class Engine:
    """Takes as long as its number says."""

    def __init__(self, number=1, log=None):
        self.number, self.log = number, [] if log is None else log

    def __call__(self, index):
        self.log.append((self.number, index))
        return Tick(self.number * 10**6, self.number * 10**6, 0, 10.0 * self.number + index)

    def close(self):
        self.log.append((self.number, "closed"))


class Silent(Engine):
    """On a system that says neither who stands in line nor what a process holds."""

    def __call__(self, index):
        return Tick(5, 5)


def test_progress_is_told_before_every_pass():
    told = []
    cold, warm = measure([Engine, Engine], 3, 2, progress=lambda *step: told.append(step))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert cold.wall.shape == warm.wall.shape == (2, 2, 3)


def test_any_number_of_engines_take_turns_of_any_length():
    log = []
    cold, warm = measure([lambda n=n: Engine(n, log) for n in (1, 2, 3)], 5, 1, warm=2, turn=2)
    assert "".join(f"{engine}{index} " for engine, index in log[:15]) == "10 11 20 21 30 31 32 33 22 23 12 13 14 24 34 "
    assert (cold.wall.shape, warm.cpu.shape) == ((3, 1, 5), (3, 2, 5))
    assert warm.wall.sum(axis=2).tolist() == [[5.0, 5.0], [10.0, 10.0], [15.0, 15.0]]
    assert (warm.own, warm.peaks) == (True, (14.0, 24.0, 34.0))
    assert [one for one, what in log if what == "closed"] == [3, 2, 1]


def test_a_clock_that_not_every_engine_has_is_not_believed():
    cold, _ = measure([Engine, Silent], 3, 1)
    assert (cold.own, cold.peaks, cold.waited) == (False, (), 0.0)


@pytest.mark.skipif(not (TASKS / str(os.getpid()) / "schedstat").exists(), reason="this system does not say who stands in line")
def test_time_in_line_for_a_core_only_grows():
    first = queued_ns()
    assert first is not None
    assert 0 <= first <= queued_ns()


def test_a_tick_is_read_off_three_clocks(monkeypatch):
    for name, times in (("perf_counter_ns", [100, 130]), ("process_time_ns", [10, 30]), ("queued_ns", [7, 12])):
        monkeypatch.setattr(turns, name, iter(times).__next__)
    ran = []
    assert turns.tick(lambda: ran.append(1)) == Tick(30, 20, 5)
    assert ran == [1]
