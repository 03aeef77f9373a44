"""Choose among plans by measurement, on real inputs.

Every candidate is built and opened in a process of its own; then all of them run the same inputs in the same order, taking turns, forth
and back, once cold (shapes are new, but for what ``load`` runs, which are other inputs where there are two) and a few times warm. What
counts is the cold pass and a warm one, of every input the median, together: a stream meets both. What ``load`` runs is spread over
``SERVED`` inputs. A choice must not hang on noise: of those within ``MARGIN`` of the least cost the one that runs least at load is taken,
and of such the first; the very first is the rule's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpcompile.bundle import read
from tpcompile.plan import Plan
from tpcompile.timing.alone import apart
from tpcompile.timing.stats import spread
from tpcompile.timing.turns import TURN, measure, pinned

MARGIN = 0.03
"""How much more than the least a candidate may cost: about what two runs of one engine differ by."""
SERVED = 1000
"""Inputs that pay for a load: an engine that is primed is one that stays."""
REPEATS = 3
"""Warm passes."""


@dataclass(frozen=True)
class Trial:
    """One candidate's times.

    Attributes:
        plan: what was built.
        cold: milliseconds of the first pass over the inputs.
        warm: milliseconds of a later pass: the sum of every input's median.
        noise: how far those passes are apart, as a share.
        runs: inferences when it was loaded.
        ruler: ``cpu`` or ``wall``: the clock of all candidates' times (``tpcompile.timing.turns``).
    """

    plan: Plan
    cold: float
    warm: float
    noise: float
    runs: int = 0
    ruler: str = "wall"

    @property
    def cost(self) -> float:
        """What is compared: two passes, with their share of what ``load`` runs."""
        return (self.cold + self.warm) * (1 + self.runs / SERVED)

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
        return {
            **how,
            "cold_ms": round(self.cold, 1),
            "warm_ms": round(self.warm, 1),
            "noise": round(self.noise, 3),
            "ruler": self.ruler,
        }


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
    with apart(feeds, threads) as opener, pinned(threads):
        cold, warm = measure([opener(path) for _, path in candidates], len(feeds), 1, warm=REPEATS, turn=TURN, threads=threads)
    ruler = "cpu" if cold.own and warm.own else "wall"  # one for both: they are added up
    first, later = (getattr(one, ruler) for one in (cold, warm))
    typical = np.median(later, axis=1)  # of an input: a busy second spoils one pass of some
    return [
        Trial(plan, float(first[i].sum()), float(typical[i].sum()), spread(later[i].sum(axis=1)), _runs(path), ruler)
        for i, (plan, path) in enumerate(candidates)
    ]


def _runs(bundle: Path) -> int:
    """Inferences when it is loaded."""
    manifest = read(bundle).manifest
    return len(manifest.swept) or manifest.primed


def choose(trials: Sequence[Trial]) -> Trial:
    """Of those within the margin of the least cost, the first that runs least at load."""
    most = min(trial.cost for trial in trials) * (1 + MARGIN)
    return min((trial for trial in trials if trial.cost <= most), key=lambda trial: trial.runs)
