"""The clockwork of ``bench``: two engines take turns on a stream, on a core of their own as far as the system allows.

One repeat opens fresh sessions, runs the stream once *cold* (each engine meets each shape for the first time) and once *warm*. Within a
pass the order is A B, B A, A B, ... (ABBA over neighbours), the next pass the other way round. Two clocks run: the wall's, and that of
this process's CPU time, which stands still while another program holds the core. The system also says how long threads stood in line
for a core: where CPU time and that together make up the wall's time, one thread did all the work, and its CPU time is the engine's own.
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample

TOLD = 0.1
"""How far CPU time and time in line may be from the wall's time, as a share, for the rest to be believed."""
TASKS = Path("/proc/self/task")


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
        cpu: ms of CPU time of this process, likewise.
        own: the CPU time is what the wall clock would show on a core of one's own.
    """

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]
    own: bool

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


@dataclass
class _Pass:
    """Nanoseconds by engine and sample, of the wall and of the CPU, and what all threads stood in line meanwhile."""

    wall: list[list[int]]
    cpu: list[list[int]]
    queued: int | None


def measure(
    dense: Opener, pruned: Opener, samples: Sequence[Sample], repeats: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Times, Times]:
    """Time both engines on the stream, ``repeats`` times in fresh sessions.

    Args:
        dense: opens one.
        pruned: opens the other.
        samples: the stream.
        repeats: pairs of a cold and a warm pass.
        progress: called between passes, while no clock runs, with the passes done and with all of them.

    Returns:
        The cold passes and the warm ones, ``[2, repeats, n]`` each.
    """
    passes: list[_Pass] = []
    for number in range(repeats):
        with ExitStack() as opened:
            order = (dense, pruned) if number % 2 == 0 else (pruned, dense)
            engines = [opened.enter_context(closing(opener())) for opener in order]
            engines = engines if number % 2 == 0 else engines[::-1]
            for turn in (number, number + 1):
                if progress is not None:
                    progress(len(passes), 2 * repeats)
                passes.append(_pass(engines, samples, turn))
    return _times(passes[::2]), _times(passes[1::2])


def _times(passes: Sequence[_Pass]) -> Times:
    wall, cpu = (
        np.array(rows, dtype=np.float64).swapaxes(0, 1) / 1e6 for rows in zip(*((p.wall, p.cpu) for p in passes), strict=True)
    )
    queued = [one.queued for one in passes]
    if any(one is None for one in queued) or not cpu.all():
        return Times(wall, cpu, own=False)
    told = cpu.sum() + sum(one or 0 for one in queued) / 1e6
    return Times(wall, cpu, own=bool(abs(told / wall.sum() - 1) <= TOLD))


def _pass(engines: Sequence[Opened], samples: Sequence[Sample], number: int) -> _Pass:
    """Run the stream; who goes first alternates with the sample and with the pass."""
    found = _Pass([[], []], [[], []], None)
    before = queued_ns()
    with without_gc():
        for index, sample in enumerate(samples):
            first = (index + number) % 2
            for which in (first, 1 - first):
                busy, start = process_time_ns(), perf_counter_ns()
                engines[which](**sample.inputs)
                found.wall[which].append(perf_counter_ns() - start)
                found.cpu[which].append(process_time_ns() - busy)
    after = queued_ns()
    found.queued = after - before if before is not None and after is not None else None
    return found


def queued_ns() -> int | None:
    """How long this process's threads stood in line for a core so far; None where the system does not say."""
    try:
        return sum(int((task / "schedstat").read_text(encoding="ascii").split()[1]) for task in TASKS.iterdir())
    except (OSError, IndexError):  # no such system, or a thread ended on the way
        return None


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
