"""Choose among plans by measurement, on real inputs.

Every candidate is built and opened; then all of them run the same inputs in the same order, taking turns, forth and back, once cold (shapes
are new, but for those that ``load`` runs) and a few times warm. What counts is the cold pass and the median warm pass together: a stream
meets both. The first candidate, which is the rule's own, stays unless another is ``MARGIN`` better: a choice must not hang on noise.
"""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from tpcompile.engine import Engine, load
from tpcompile.plan import Plan

MARGIN = 0.03
"""How much faster another candidate must be than the first: more than two runs of one engine differ by."""
REPEATS = 3
"""Warm passes."""


@dataclass(frozen=True)
class Trial:
    """One candidate's times.

    Attributes:
        plan: what was built.
        cold: milliseconds of the first pass over the inputs.
        warm: milliseconds of the median pass after it.
        noise: how far those passes are apart, as a share.
    """

    plan: Plan
    cold: float
    warm: float
    noise: float

    @property
    def total(self) -> float:
        """What is compared."""
        return self.cold + self.warm

    def to_json(self) -> dict[str, Any]:
        """For the manifest's ``measured``."""
        how: dict[str, Any] = {
            "lowering": self.plan.lowering,
            "form": self.plan.form,
            "sizes": list(self.plan.buckets or self.plan.counts),
        }
        if self.plan.square:
            how["square"] = True
        if self.plan.lengths:
            how["lengths"] = list(self.plan.lengths)
        return {**how, "cold_ms": round(self.cold, 1), "warm_ms": round(self.warm, 1), "noise": round(self.noise, 3)}


def tune(
    plans: Sequence[Plan],
    build: Callable[[Plan, Path], None],
    folder: Path,
    feeds: Sequence[Mapping[str, np.ndarray]],
    threads: int = 1,
) -> list[Trial]:
    """Build every plan and time them in turns.

    Args:
        plans: one or more.
        build: writes a sealed bundle of a plan into an empty folder.
        folder: for the bundles: ``0``, ``1``, ... in it.
        feeds: real inputs, in their order.
        threads: per engine.

    Returns:
        What was measured, in the order of the plans.
    """
    for number, plan in enumerate(plans):
        (folder / str(number)).mkdir()
        build(plan, folder / str(number))
    return time_in_turns([(plan, folder / str(number)) for number, plan in enumerate(plans)], feeds, threads)


def time_in_turns(
    candidates: Sequence[tuple[Plan, Path]], feeds: Sequence[Mapping[str, np.ndarray]], threads: int = 1
) -> list[Trial]:
    """Time bundles in turns; ``tune`` says how.

    Args:
        candidates: plans with their bundles.
        feeds: real inputs, in their order.
        threads: per engine.
    """
    with ExitStack() as opened:
        engines = [opened.enter_context(load(path, threads=threads)) for _, path in candidates]
        cold, *warm = [_pass(engines, feeds, number) for number in range(REPEATS + 1)]
    later = [[one[i] for one in warm] for i in range(len(engines))]
    return [Trial(plan, cold[i], statistics.median(later[i]), _spread(later[i])) for i, (plan, _) in enumerate(candidates)]


def choose(trials: Sequence[Trial]) -> Trial:
    """The fastest, if it beats the first by the margin; else the first."""
    best = min(trials, key=lambda trial: trial.total)
    return best if best.total < trials[0].total * (1 - MARGIN) else trials[0]


def _spread(times: Sequence[float]) -> float:
    return (max(times) - min(times)) / statistics.median(times)


def _pass(engines: Sequence[Engine], feeds: Sequence[Mapping[str, np.ndarray]], number: int) -> list[float]:
    """Milliseconds of each engine over all inputs; every other input in the order turned round."""
    times = [0.0] * len(engines)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index, one in enumerate(feeds):
            order = range(len(engines))
            for which in order if (index + number) % 2 == 0 else reversed(order):
                begin = perf_counter()
                engines[which](**one)
                times[which] += (perf_counter() - begin) * 1e3
    finally:
        if collecting:
            gc.enable()
    return times
