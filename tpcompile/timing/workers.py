"""Several callers on one engine: how much it gets done, and how long each of them waits.

Each round every engine's callers empty the stream together, dense and pruned in turns (A B, B A, ...). The callers share one
compiled engine, each with a session of its own on it.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter_ns
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample
from tpcompile.timing.stats import Interval, Summary, mean_ratio, summarise
from tpcompile.timing.turns import pinned


class Shared(Protocol):
    """An engine that several threads can use at once, each through a handle of its own."""

    def __call__(self, **inputs: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Compute."""
        ...

    def close(self) -> None:
        """Give its memory and threads back."""
        ...

    def share(self) -> Self:
        """Another handle on the same engine."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """What several callers at once found.

    Attributes:
        workers: callers.
        per_second: samples a second of ``dense`` and ``pruned`` together, median over rounds.
        dense: ms of a call, as its caller sees it.
        pruned: the same for the pruned engine.
        gain: throughput of pruned over dense.
    """

    workers: int
    per_second: Mapping[str, float]
    dense: Summary
    pruned: Summary
    gain: Interval

    def text(self) -> str:
        """One line."""
        dense, pruned = self.per_second["dense"], self.per_second["pruned"]
        span = f"{self.gain.value:.2f}x ({self.gain.low:.2f} to {self.gain.high:.2f})"
        return f"{self.workers} callers: {dense:.1f} samples/s dense, {pruned:.1f} pruned, {span}"


def crowd(
    dense: Callable[[], Shared],
    pruned: Callable[[], Shared],
    samples: Sequence[Sample],
    workers: int,
    threads: int,
    rounds: int,
    confidence: float,
) -> Load:
    """Let ``workers`` callers empty the stream together, in turns on either engine.

    Args:
        dense: opens an engine that has ``share``.
        pruned: likewise.
        samples: the stream.
        workers: callers, 2 or more.
        threads: of each engine; the measurement is kept on ``workers * threads`` cores.
        rounds: measured, after one that is not.
        confidence: of the interval.

    Raises:
        UsageError: an engine that serves one caller only.
    """
    with pinned(workers * threads), ExitStack() as opened:
        crowds = []
        for opener in (dense, pruned):
            first = opened.enter_context(closing(opener()))
            crowds.append([first, *(opened.enter_context(closing(first.share())) for _ in range(workers - 1))])
        pool = opened.enter_context(ThreadPoolExecutor(workers))
        drained: list[tuple[list[tuple[float, list[float]]], ...]] = []
        with without_gc():
            for number in range(rounds + 1):
                turns: tuple[list[tuple[float, list[float]]], ...] = ([], [])
                for which in (0, 1, 1, 0) if number % 2 == 0 else (1, 0, 0, 1):
                    turns[which].append(_drain(pool, crowds[which], samples))
                drained.append(turns)
    return _load(drained[1:], workers, samples, confidence)


@contextmanager
def without_gc() -> Iterator[None]:
    """No garbage is collected while the clock runs."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _drain(pool: ThreadPoolExecutor, engines: Sequence[Shared], samples: Sequence[Sample]) -> tuple[float, list[float]]:
    """All callers take from one stream until it is empty; ms in all, and ms of each call."""
    turn = count()

    def caller(engine: Shared) -> list[float]:
        times = []
        while (index := next(turn)) < len(samples):
            start = perf_counter_ns()
            engine(**samples[index].inputs)
            times.append((perf_counter_ns() - start) / 1e6)
        return times

    begin = perf_counter_ns()
    found = [time for times in pool.map(caller, engines) for time in times]
    return (perf_counter_ns() - begin) / 1e6, found


def _load(rounds: Sequence[Any], workers: int, samples: Sequence[Sample], confidence: float) -> Load:
    size = sum(len(next(iter(sample.inputs.values()))) for sample in samples)
    totals = np.array([[sum(total for total, _ in side) / len(side) for side in turns] for turns in rounds])
    calls = [np.array([time for turns in rounds for _, times in turns[which] for time in times]) for which in (0, 1)]
    rate = 1e3 * size / np.median(totals, axis=0)
    return Load(
        workers,
        {"dense": float(rate[0]), "pruned": float(rate[1])},
        summarise(calls[0], len(samples)),
        summarise(calls[1], len(samples)),
        mean_ratio(np.log(totals[:, 0] / totals[:, 1]), confidence),
    )
