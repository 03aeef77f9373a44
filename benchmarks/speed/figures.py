"""What follows from a cell's times: sums, spreads, and how much of the FLOPs ratio became time."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpcompile.timing.stats import least

Document = Mapping[str, Any]
PHASES = ("cold", "warm")


def row(document: Document, role: str) -> Mapping[str, Any] | None:
    """The first row of a role."""
    found: Mapping[str, Any] | None = next((one for one in document["rows"] if one["role"] == role), None)
    return found


def times(one: Mapping[str, Any], phase: str, only: Sequence[int] = ()) -> list[float]:
    """Milliseconds of each sample, or of those named: of the first pass, or the medians over the later ones."""
    each = one["cold_ms"] if phase == "cold" else [statistics.median(sample) for sample in zip(*one["warm_ms"], strict=True)]
    return [each[i] for i in only] if only and not one["only"] else list(each)


def spread(one: Mapping[str, Any], phase: str = "warm", quantile: float = 0.9) -> float | None:
    """A quantile over the median; None where there are too few samples for it."""
    each = times(one, phase)
    high, middle = np.quantile(each, [quantile, 0.5])
    return float(high / middle) if len(each) >= least(quantile) else None


@dataclass(frozen=True)
class Figures:
    """A cell at a glance; None where a row is missing.

    Attributes:
        speedup: dense over pruned, by phase.
        realised: that over the FLOPs ratio of the paper's formula.
        bound: static engines with the same counts over pruned, on the samples they run, by phase; static engines are always warm.
        ideal: static dense over static pruned: what the counts are worth without any change of shape.
        best: name of the fastest dense engine, ours and peers, and its time over the pruned engine's, by phase.
        naive: the naive export's time over the pruned engine's, by phase.
        primed: of the engine that ran its primers at load: cold speed-up against dense *warm*, share of the bound, seconds of its load.
    """

    speedup: Mapping[str, float]
    realised: Mapping[str, float]
    bound: Mapping[str, float]
    ideal: float | None
    best: Mapping[str, tuple[str, float]]
    naive: Mapping[str, float]
    primed: tuple[float, float, float] | None


def figures(document: Document) -> Figures:
    """A cell's figures."""
    pruned, dense = row(document, "pruned"), row(document, "dense")
    assert pruned is not None
    assert dense is not None
    own = {phase: sum(times(pruned, phase)) for phase in PHASES}
    speedup = {phase: sum(times(dense, phase)) / own[phase] for phase in PHASES}
    static, twin, naive = (row(document, role) for role in ("static", "dense static", "naive"))
    bound, ideal, primed = {}, None, None
    if static is not None:
        fixed = sum(times(static, "warm"))
        bound = {phase: fixed / sum(times(pruned, phase, static["only"])) for phase in PHASES}
        ideal = sum(times(twin, "warm")) / fixed if twin is not None else None
    if (one := row(document, "primed")) is not None:
        fresh = sum(times(one, "cold"))
        held = sum(times(static, "warm")) / sum(times(one, "cold", static["only"])) if static is not None else 0.0
        primed = (sum(times(dense, "warm")) / fresh, held, one["load_s"])
    rivals = [one for one in document["rows"] if one["role"] in ("dense", "peer")]
    best = {
        phase: min(((one["name"], sum(times(one, phase)) / own[phase]) for one in rivals), key=lambda pair: pair[1])
        for phase in PHASES
    }
    return Figures(
        speedup=speedup,
        realised={phase: value / document["flops"]["paper"] for phase, value in speedup.items()},
        bound=bound,
        ideal=ideal,
        best=best,
        naive={phase: sum(times(naive, phase)) / own[phase] for phase in PHASES} if naive is not None else {},
        primed=primed,
    )
