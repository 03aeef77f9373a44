"""The clockwork of ``bench`` and of ``--tune``: engines take turns on a stream, on a core of their own as far as the system allows.

One repeat opens fresh engines, runs the stream once *cold* (each engine meets each shape for the first time) and then *warm*. Within a
pass the order is A B, B A, A B, ... (ABBA over neighbours), the next pass the other way round. Two clocks run: the wall's, and that of
the engine's CPU time, which stands still while another program holds the core. The system also says how long threads stood in line
for a core: where CPU time and that together make up the wall's time, one thread did all the work, and its CPU time is the engine's own.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

TOLD = 0.1
"""How far CPU time and time in line may be from the wall's time, as a share, for the rest to be believed."""
TASKS = Path("/proc/self/task")
TURN = 5
"""Samples that one of many engines runs before the next: one in use finds its own weights in the caches, not nine others'."""
PAUSE = 0.002
"""Seconds between two engines of several threads: workers that still wait actively would take the next one's core."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One inference.

    Attributes:
        wall: nanoseconds.
        cpu: nanoseconds of CPU time of the engine's process.
        queued: nanoseconds that its threads stood in line for a core; None where the system does not say.
        peak: the most MB that the engine added to its process so far; None where that cannot be told.
    """

    wall: int
    cpu: int
    queued: int | None = None
    peak: float | None = None


class Clocked(Protocol):
    """An engine that was opened for this measurement, has the stream, and is closed after it."""

    def __call__(self, index: int, /) -> Tick:
        """Run one sample of the stream, and say what it took."""
        ...

    def close(self) -> None:
        """Give its memory and threads back."""
        ...


Opener = Callable[[], Clocked]


@dataclass(frozen=True, eq=False)
class Times:
    """What one phase took.

    Attributes:
        wall: ms ``[E, passes, n]``, in the order of the engines and of the stream.
        cpu: ms of CPU time, likewise.
        own: the CPU time is what the wall clock would show on a core of one's own.
        peaks: the most MB that each engine added to its process until then; empty where that cannot be told.
    """

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]
    own: bool
    peaks: tuple[float, ...] = ()

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
    """Keep this thread, and what it starts, on ``threads`` cores, the last ones; where the system has no such thing, do nothing.

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


def measure(
    openers: Sequence[Opener],
    count: int,
    repeats: int,
    *,
    warm: int = 1,
    turn: int = 1,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Times, Times]:
    """Time engines on a stream, ``repeats`` times freshly opened.

    Args:
        openers: each opens an engine.
        count: of samples in the stream.
        repeats: of a cold pass and the warm ones behind it.
        warm: passes behind each cold one.
        turn: samples that an engine runs before it is the next one's turn.
        threads: of each engine.
        progress: called between passes, while no clock runs, with the passes done and with all of them.

    Returns:
        The cold passes ``[E, repeats, n]``, and the warm ones ``[E, repeats * warm, n]``.
    """
    cold: list[list[list[Tick]]] = []
    later: list[list[list[Tick]]] = []
    for number in range(repeats):
        with ExitStack() as opened:
            order = openers if number % 2 == 0 else openers[::-1]
            engines = [opened.enter_context(closing(opener())) for opener in order]
            engines = engines if number % 2 == 0 else engines[::-1]
            for step in range(warm + 1):
                if progress is not None:
                    progress(len(cold) + len(later), repeats * (warm + 1))
                ticks = _pass(engines, count, turn, number + step, PAUSE if threads > 1 else 0)
                (later if step else cold).append(ticks)
    return _times(cold), _times(later)


def _pass(engines: Sequence[Clocked], count: int, turn: int, number: int, pause: float) -> list[list[Tick]]:
    """Run the stream; who goes first alternates with the turn and with the pass."""
    found: list[list[Tick]] = [[] for _ in engines]
    for step, start in enumerate(range(0, count, turn)):
        order = range(len(engines))
        for which in order if (step + number) % 2 == 0 else reversed(order):
            found[which] += [engines[which](i) for i in range(start, min(start + turn, count))]
            time.sleep(pause)
    return found


def _times(passes: Sequence[Sequence[Sequence[Tick]]]) -> Times:
    """Of ticks ``[passes, E, n]``."""
    clocks = np.array([[[(tick.wall, tick.cpu) for tick in row] for row in one] for one in passes], dtype=np.float64)
    wall, cpu = np.moveaxis(clocks, (3, 1), (0, 1)) / 1e6
    engines = [[tick for one in passes for tick in one[engine]] for engine in range(len(wall))]
    queued = [tick.queued for ticks in engines for tick in ticks]
    peaks = [tick.peak for ticks in engines for tick in ticks]
    own = None not in queued and bool(cpu.all())
    own = own and abs((cpu.sum() + sum(ns or 0 for ns in queued) / 1e6) / wall.sum() - 1) <= TOLD
    held = () if None in peaks else tuple(max(tick.peak or 0.0 for tick in ticks) for ticks in engines)
    return Times(wall, cpu, bool(own), held)


def tick(work: Callable[[], object]) -> Tick:
    """Run something by both clocks."""
    before = queued_ns()
    busy, start = process_time_ns(), perf_counter_ns()
    work()
    wall, cpu = perf_counter_ns() - start, process_time_ns() - busy
    after = queued_ns()
    return Tick(wall, cpu, None if before is None or after is None else after - before)


def queued_ns() -> int | None:
    """How long this process's threads stood in line for a core so far; None where the system does not say."""
    try:
        return sum(int((task / "schedstat").read_text(encoding="ascii").split()[1]) for task in TASKS.iterdir())
    except (OSError, IndexError):  # no such system, or a thread ended on the way
        return None
