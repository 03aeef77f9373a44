"""The clockwork of ``bench``: two engines take turns on a stream, on a core of their own as far as the system allows.

One repeat opens fresh sessions, runs the stream once *cold* (each engine meets each shape for the first time) and once *warm*. Within a
pass the order is A B, B A, A B, ... (ABBA over neighbours), the next pass the other way round. Two clocks run: the wall's, and that of
the calling thread's CPU time, which stands still while another program holds the core.
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpcompile.samples import Sample

ALONE = 0.02
"""An engine computes on the calling thread where its least disturbed calls take no more than this share of time beside it."""


class Opened(Protocol):
    """An engine that was opened for this measurement and is closed after it."""

    def __call__(self, **inputs: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Compute."""
        ...

    def close(self) -> None:
        """Give its memory and threads back."""
        ...


Opener = Callable[[], Opened]


@dataclass(frozen=True, eq=False)
class Times:
    """What one phase took.

    Attributes:
        wall: ms ``[2, passes, n]``, dense first, in stream order.
        cpu: ms of CPU time of the calling thread, likewise.
    """

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]

    @property
    def own(self) -> bool:
        """Whether the calling thread did the work, so that its CPU time is what the wall clock would show on a core of one's own."""
        if not self.cpu.all():
            return False
        beside = np.quantile(self.wall / self.cpu, 0.1, axis=(1, 2))  # the quiet calls; a thread that waits for others never is
        return bool((beside <= 1 + ALONE).all())

    @property
    def ruler(self) -> NDArray[np.float64]:
        """The times that engines are compared by: CPU time where it is their own, else the wall's."""
        return self.cpu if self.own else self.wall

    @property
    def waited(self) -> float:
        """Share of the time in which other programs held the core; 0 where it cannot be told."""
        return max(0.0, 1 - float(self.cpu.sum() / self.wall.sum())) if self.own else 0.0


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Keep this thread, and those it starts, on ``threads`` cores, the last ones; where the system has no such thing, do nothing.

    Yields:
        The cores; empty where nothing was pinned.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    before = os.sched_getaffinity(0)
    chosen = tuple(sorted(before)[-threads:])
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def measure(dense: Opener, pruned: Opener, samples: Sequence[Sample], repeats: int) -> tuple[Times, Times]:
    """Time both engines on the stream, ``repeats`` times in fresh sessions.

    Returns:
        The cold passes and the warm ones, ``[2, repeats, n]`` each.
    """
    passes: list[tuple[list[list[int]], list[list[int]]]] = []
    for number in range(repeats):
        with ExitStack() as opened:
            order = (dense, pruned) if number % 2 == 0 else (pruned, dense)
            engines = [opened.enter_context(closing(opener())) for opener in order]
            engines = engines if number % 2 == 0 else engines[::-1]
            passes += [_pass(engines, samples, number), _pass(engines, samples, number + 1)]
    walls, cpus = (np.array(rows, dtype=np.float64).swapaxes(0, 1) / 1e6 for rows in zip(*passes, strict=True))
    return Times(walls[:, ::2], cpus[:, ::2]), Times(walls[:, 1::2], cpus[:, 1::2])


def _pass(engines: Sequence[Opened], samples: Sequence[Sample], number: int) -> tuple[list[list[int]], list[list[int]]]:
    """Nanoseconds by engine and sample, of the wall and of the CPU; who goes first alternates with the sample and with the pass."""
    walls: list[list[int]] = [[], []]
    cpus: list[list[int]] = [[], []]
    with without_gc():
        for index, sample in enumerate(samples):
            first = (index + number) % 2
            for which in (first, 1 - first):
                busy, start = thread_time_ns(), perf_counter_ns()
                engines[which](**sample.inputs)
                walls[which].append(perf_counter_ns() - start)
                cpus[which].append(thread_time_ns() - busy)
    return walls, cpus


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
