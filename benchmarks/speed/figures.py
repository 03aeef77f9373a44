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

    Where the pruned engine met shapes at load, whoever it is compared with counts as warm in the first pass too: another engine could
    have been shown shapes as well.

    Attributes:
        speedup: dense over pruned, by phase.
        realised: that over the FLOPs ratio of the paper's formula.
        bound: static engines with the same counts over pruned, on the samples they run, by phase; static engines are always warm.
        ideal: static dense over static pruned: what the counts are worth without any change of shape.
        best: name of the fastest dense engine, ours and peers, and its time over the pruned engine's, by phase.
        naive: the naive export's time over the pruned engine's, by phase.
        start: load and first pass together, nobody taken for warm, dense over pruned.
        unprimed: of the engine that met no shape at load: first pass against dense's first, share of the bound, and ``start``.
    """

    speedup: Mapping[str, float]
    realised: Mapping[str, float]
    bound: Mapping[str, float]
    ideal: float | None
    best: Mapping[str, tuple[str, float]]
    naive: Mapping[str, float]
    start: float
    unprimed: tuple[float, float, float] | None


def figures(document: Document) -> Figures:
    """A cell's figures."""
    pruned, dense = row(document, "pruned"), row(document, "dense")
    assert pruned is not None
    assert dense is not None
    own = {phase: sum(times(pruned, phase)) for phase in PHASES}
    static, twin, naive, bare = (row(document, role) for role in ("static", "dense static", "naive", "unprimed"))
    against = dict.fromkeys(PHASES, "warm") if bare is not None else {phase: phase for phase in PHASES}
    speedup = {phase: sum(times(dense, against[phase])) / own[phase] for phase in PHASES}
    bound, ideal, unprimed = {}, None, None
    if static is not None:
        fixed = sum(times(static, "warm"))
        bound = {phase: fixed / sum(times(pruned, phase, static["only"])) for phase in PHASES}
        ideal = sum(times(twin, "warm")) / fixed if twin is not None else None
    if bare is not None:
        held = sum(times(static, "warm")) / sum(times(bare, "cold", static["only"])) if static is not None else 0.0
        unprimed = (sum(times(dense, "cold")) / sum(times(bare, "cold")), held, _begun(dense) / _begun(bare))
    rivals = [one for one in document["rows"] if one["role"] in ("dense", "peer")]
    best = {
        phase: min(((one["name"], sum(times(one, against[phase])) / own[phase]) for one in rivals), key=lambda pair: pair[1])
        for phase in PHASES
    }
    return Figures(
        speedup=speedup,
        realised={phase: value / document["flops"]["paper"] for phase, value in speedup.items()},
        bound=bound,
        ideal=ideal,
        best=best,
        naive={phase: sum(times(naive, phase)) / own[phase] for phase in PHASES} if naive is not None else {},
        start=_begun(dense) / _begun(pruned),
        unprimed=unprimed,
    )


def _begun(one: Mapping[str, Any]) -> float:
    """Milliseconds until the stream ran once, from nothing."""
    return 1e3 * float(one["load_s"]) + sum(times(one, "cold"))
