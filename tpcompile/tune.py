"""Choose among plans by measurement, on real inputs.

Every candidate is built and opened; then all of them run the same inputs in the same order, taking turns, forth and back, once cold (shapes
are new, but for what ``load`` runs, which are other inputs where there are two) and a few times warm. What counts is the cold pass and the
median warm pass together: a stream meets both. A choice must not hang on noise: of those within ``MARGIN`` of the fastest the one that runs
least at load is taken, and of such the first; the very first is the rule's own.
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
"""How much slower than the fastest a candidate may be: about what two runs of one engine differ by."""
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
        runs: inferences when it was loaded.
    """

    plan: Plan
    cold: float
    warm: float
    noise: float
    runs: int = 0

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
        if self.runs:
            how["runs"] = self.runs
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
        runs = [len(one.manifest.swept) or one.manifest.primed for one in engines]
    later = [[one[i] for one in warm] for i in range(len(engines))]
    return [
        Trial(plan, cold[i], statistics.median(later[i]), _spread(later[i]), runs[i]) for i, (plan, _) in enumerate(candidates)
    ]


def choose(trials: Sequence[Trial]) -> Trial:
    """Of those within the margin of the fastest, the first that runs least at load."""
    most = min(trial.total for trial in trials) * (1 + MARGIN)
    return min((trial for trial in trials if trial.total <= most), key=lambda trial: trial.runs)


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
