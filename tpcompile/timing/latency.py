"""Is the pruned engine faster on real inputs? Paired, interleaved, cold and warm apart, with a verdict that can be trusted.

Protocol (design.md 9): the inputs come in their real order, each once a pass, so that counts and shapes change as in use; how the
two engines take turns is ``tpcompile.timing.turns``'s. *Cold* is the first pass of fresh engines: shapes are new; *warm* the pass
after it.

Figures are sums over the stream, percentiles only where the number of samples supports them, and the ratio dense / pruned with an
interval over samples and passes. Engines are compared by the time they had a core for, where that can be told; a latency target is
held against the calls of every pass by the wall clock, and missed only if it would be without the other programs too. Noise is what
passes over the same inputs differ by (A-A), drift what they rise by: the machine's, as both engines share it, and it cancels from the
ratio.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample
from tpcompile.errors import InputError, UsageError
from tpcompile.flops import Counts, Formulas, Saving, saving
from tpcompile.timing.attribution import Attribution
from tpcompile.timing.stats import Interval, Summary, as_json, drift, paired_ratio, spread, summarise
from tpcompile.timing.targets import VERDICTS, Judged, Slo, judge_speedup, worst
from tpcompile.timing.turns import Opener, Times, measure, pinned
from tpcompile.timing.workers import Load

EFFECT = 0.01
"""The smallest difference worth a word: two runs of one engine differ by that much."""
DISTURBED = 0.05
"""A share of waiting, or of drift, that is told in a sentence."""
SHAPES = 8
"""Rows of the table by shape, at most."""

PhaseName = Literal["cold", "warm"]


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """Cold or warm: both engines on the same stream.

    Attributes:
        dense_ms: ``[passes, n]`` raw times of the wall clock in real order.
        pruned_ms: ``[passes, n]``.
        dense_cpu_ms: ``[passes, n]`` CPU time of the engine's process.
        pruned_cpu_ms: ``[passes, n]``.
        ruler: ``cpu`` or ``wall``: the clock that engines are compared by.
        dense: figures of the per-sample medians over passes, by the ruler that engines are compared with.
        pruned: the same for the pruned engine.
        speedup: dense time over pruned time; below 1 pruning made it slower.
        realisation: speed-up / FLOPs ratio by ``paper`` and by ``graph``; empty where the formulas are not known.
        slower: number of samples on which the pruned engine was slower.
    """

    dense_ms: NDArray[np.float64]
    pruned_ms: NDArray[np.float64]
    dense_cpu_ms: NDArray[np.float64]
    pruned_cpu_ms: NDArray[np.float64]
    ruler: str
    dense: Summary
    pruned: Summary
    speedup: Interval
    realisation: Mapping[str, float]
    slower: int

    def side(self, name: str) -> Summary:
        """The figures of ``dense`` or ``pruned``."""
        return self.dense if name == "dense" else self.pruned

    @property
    def times(self) -> Times:
        """Both clocks of both engines."""
        wall, cpu = (self.dense_ms, self.pruned_ms), (self.dense_cpu_ms, self.pruned_cpu_ms)
        return Times(np.stack(wall), np.stack(cpu), self.ruler == "cpu")


@dataclass(frozen=True, slots=True)
class Shape:
    """Inputs of one length, or of near lengths where there are many.

    Attributes:
        low: fewest tokens.
        high: most tokens.
        count: of samples.
        dense: median warm ms.
        pruned: median warm ms.
        cold: total dense time over total pruned time at first sight.
        warm: the same once warm.
    """

    low: int
    high: int
    count: int
    dense: float
    pruned: float
    cold: float
    warm: float


@dataclass(frozen=True, eq=False)
class Latency:
    """The result of ``bench``.

    Attributes:
        verdict: ``PASSED``, ``FAILED`` or ``INCONCLUSIVE``; PASSED where no target was set.
        reason: one sentence.
        exit_code: 0, 8 or 10.
        tokens: length of every sample, in stream order.
        shapes: number of distinct lengths among them.
        by_shape: the same by length.
        cold: the first pass of fresh engines.
        warm: the passes after it.
        noise: how far warm passes are apart, as a share: totals of ``dense`` and ``pruned``, and their ``ratio``.
        drift: by which share warm passes became slower from the first to the last, both engines together.
        ruler: ``cpu`` or ``wall``: the clock that engines are compared by.
        waited: share of the time in which other programs held the core.
        cpus: cores that the measurement was kept on.
        effect: smallest difference that is called one, as a share.
        per_second: samples a second of ``dense`` and ``pruned``, warm, one caller.
        load: several callers at once; None where that was not asked for.
        memory: the most MB that an engine added to its process, ``dense`` and ``pruned``; empty where that cannot be told.
        attribution: where the time went; None where that was not asked for.
        saving: work of dense and pruned on these samples; None where it is not known.
        seed: of the bootstrap.
    """

    verdict: str
    reason: str
    exit_code: int
    tokens: tuple[int, ...]
    shapes: int
    by_shape: tuple[Shape, ...]
    cold: Phase
    warm: Phase
    noise: Mapping[str, float]
    drift: float
    ruler: str
    waited: float
    cpus: tuple[int, ...]
    effect: float
    per_second: Mapping[str, float]
    load: Load | None
    memory: Mapping[str, float]
    saving: Saving | None
    seed: int
    attribution: Attribution | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON document with every raw time, and the FLOPs ratios."""
        ratios = {"paper": self.saving.paper, "graph": self.saving.graph} if self.saving else {}
        return {**as_json(self), "flops_ratio": ratios, "sentences": list(self.sentences())}

    def text(self) -> str:
        """The result as a few plain lines."""
        rows = list(self.sentences())
        for name, phase in (("cold", self.cold), ("warm", self.warm)):
            rows += [
                _figures(f"{name} {engine}", figures) for engine, figures in (("dense", phase.dense), ("pruned", phase.pruned))
            ]
        if self.saving is not None:
            ratios = {"paper": self.saving.paper, "graph": self.saving.graph}
            rows += [
                f"FLOPs ratio by {name} {ratio:.2f}, realised {self.cold.realisation[name]:.2f} cold"
                f", {self.warm.realisation[name]:.2f} warm"
                for name, ratio in ratios.items()
                if ratio is not None
            ]
        rows += [_shape_line(row) for row in self.by_shape] if len(self.by_shape) > 1 else []
        rows += [self.load.text()] if self.load is not None else []
        rows += [f"peak memory {', '.join(f'{name} {size:.0f} MB' for name, size in self.memory.items())}"] if self.memory else []
        rows += [self.attribution.text()] if self.attribution is not None else []
        apart = ", ".join(f"{name} {share:.1%}" for name, share in self.noise.items())
        return "\n".join([*rows, f"{self.shapes} distinct lengths; warm passes differ by: {apart}"])

    def sentences(self) -> tuple[str, ...]:
        """What was found, in words. Slower is called slower."""
        found = [_sentence(name, phase, self.effect) for name, phase in (("cold", self.cold), ("warm", self.warm))]
        if self.waited > DISTURBED:
            found.append(f"other programs held the core for {self.waited:.0%} of the time; the comparison leaves that time out")
        if abs(self.drift) > DISTURBED:
            found.append(
                f"the machine became {abs(self.drift):.0%} {'slower' if self.drift > 0 else 'faster'} on the way, for both"
            )
        return tuple(found)


def bench(
    pruned: Opener,
    dense: Opener,
    samples: Sequence[Sample],
    repeats: int = 4,
    seed: int = 0,
    *,
    confidence: float = 0.95,
    min_speedup: float | None = None,
    min_effect: float = EFFECT,
    slo: Slo | None = None,
    phases: Sequence[PhaseName] = ("cold", "warm"),
    threads: int = 1,
    flops: Formulas | None = None,
    counts: Sequence[Counts] | Callable[[], Sequence[Counts]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Time both engines on the stream and judge.

    Args:
        pruned: opens a fresh pruned engine that has the stream.
        dense: opens a fresh dense engine with the same threads and precision.
        samples: the stream: real inputs in their real order.
        repeats: times that fresh engines run the stream cold and warm, at least 2: noise is what they differ by.
        seed: of the bootstrap.
        confidence: of the interval a verdict needs.
        min_speedup: least dense time / pruned time.
        min_effect: smallest difference, as a share, that is called faster or slower.
        slo: target for a percentile of the pruned engine.
        phases: phases that the targets apply to; all of them must hold.
        threads: of each engine: so many cores the measurement is kept on.
        flops: the pruned bundle's formulas.
        counts: what the pruned engine kept of each sample, for the formulas; a function is called after the timing. Where
            ``samples`` are batches, one entry per sample in them.
        progress: called between passes with those done, and with all of them.

    Raises:
        InputError: no samples.
        UsageError: fewer than 2 repeats, a confidence outside (0, 1), a target that is not positive, or counts that do not fit.
    """
    _check(samples, repeats, confidence, min_speedup)
    if not callable(counts):
        _fit(samples, flops, counts)
    with pinned(threads) as cpus:
        cold, warm = measure((dense, pruned), len(samples), repeats, threads=threads, progress=progress)
    counted = counts() if callable(counts) else counts
    _fit(samples, flops, counted)
    work = saving(flops, counted) if flops is not None and flops.tokens else None
    totals = warm.ruler.sum(axis=2)
    noise = {name: spread(one) for name, one in (("dense", totals[0]), ("pruned", totals[1]), ("ratio", totals[0] / totals[1]))}
    found: dict[PhaseName, Phase] = {
        "cold": _phase(cold, work, confidence, seed),
        "warm": _phase(warm, work, confidence, seed),
    }
    judged = [_judge(name, found[name], confidence, min_speedup, slo) for name in phases]
    verdict, reason = worst([entry for entries in judged for entry in entries])
    calls = sum(len(next(iter(sample.inputs.values()))) for sample in samples)
    tokens = tuple(sample.length for sample in samples)
    return Latency(
        verdict=verdict,
        reason=reason,
        exit_code=VERDICTS[verdict],
        tokens=tokens,
        shapes=len(set(tokens)),
        by_shape=_by_shape(tokens, cold, warm),
        cold=found["cold"],
        warm=found["warm"],
        noise=noise,
        drift=drift(totals.sum(axis=0)),
        ruler=found["warm"].ruler,
        waited=warm.waited,
        cpus=cpus,
        effect=min_effect,
        per_second={name: 1e3 * calls / found["warm"].side(name).total for name in ("dense", "pruned")},
        load=None,
        memory=dict(zip(("dense", "pruned"), warm.peaks, strict=False)),
        saving=work,
        seed=seed,
    )


def _phase(times: Times, work: Saving | None, confidence: float, seed: int) -> Phase:
    ruler = times.ruler
    a, b = np.median(ruler, axis=1)
    speedup = paired_ratio(ruler[0], ruler[1], confidence, seed)
    ratios = {"paper": work.paper, "graph": work.graph} if work else {}
    return Phase(
        dense_ms=times.wall[0],
        pruned_ms=times.wall[1],
        dense_cpu_ms=times.cpu[0],
        pruned_cpu_ms=times.cpu[1],
        ruler="cpu" if times.own else "wall",
        dense=summarise(a),
        pruned=summarise(b),
        speedup=speedup,
        realisation={name: speedup.value / ratio for name, ratio in ratios.items() if ratio},
        slower=int((b > a).sum()),
    )


def _by_shape(tokens: Sequence[int], cold: Times, warm: Times) -> tuple[Shape, ...]:
    """A row per length, or per range of lengths with about as many samples each."""
    lengths = np.array(tokens)
    known = np.unique(lengths)
    edges = known if len(known) <= SHAPES else np.unique(np.quantile(lengths, np.arange(SHAPES) / SHAPES, method="lower"))
    row = np.searchsorted(edges, lengths, side="right") - 1
    first, later = np.median(cold.ruler, axis=1), np.median(warm.ruler, axis=1)
    found = []
    for number in range(len(edges)):
        here = row == number
        (a, b), (c, d) = first[:, here].sum(axis=1), later[:, here].sum(axis=1)
        dense, pruned = (float(value) for value in np.median(later[:, here], axis=1))
        low, high = int(lengths[here].min()), int(lengths[here].max())
        found.append(Shape(low, high, int(here.sum()), dense, pruned, float(a / b), float(c / d)))
    return tuple(found)


def _judge(name: str, phase: Phase, confidence: float, min_speedup: float | None, slo: Slo | None) -> list[Judged]:
    """A verdict with its reason for each target."""
    found = []
    if min_speedup is not None:
        found.append(judge_speedup(name, phase.speedup, min_speedup, phase.pruned.count))
    if slo is not None:
        found.append(slo.judge(name, phase.times.wall[1], phase.times.ruler[1], confidence))
    return found


def _figures(name: str, figures: Summary) -> str:
    known = [(label, value) for label in ("p50", "p90", "p95", "p99") if (value := getattr(figures, label)) is not None]
    return f"{name:<12} sum {figures.total:.0f} ms" + "".join(f", {label} {value:.2f}" for label, value in known)


def _shape_line(row: Shape) -> str:
    length = f"{row.low}" if row.low == row.high else f"{row.low} to {row.high}"
    times = f"dense {row.dense:.2f} ms, pruned {row.pruned:.2f} ms, speed-up {row.cold:.2f} cold, {row.warm:.2f} warm"
    return f"{length:>12} tokens, {row.count} samples: {times}"


def _sentence(name: str, phase: Phase, effect: float) -> str:
    ratio = phase.speedup
    totals = f"{phase.dense.total:.0f} ms dense, {phase.pruned.total:.0f} ms pruned over {phase.dense.count} samples"
    spanned = f"{ratio.low:.2f} to {ratio.high:.2f}"
    side = ratio.differs(effect)
    if side < 0:
        text = f"{name}: pruned is SLOWER than dense, {1 / ratio.value:.2f}x the time (speed-up {spanned}): {totals}"
    elif side > 0:
        text = f"{name}: pruned is {ratio.value:.2f}x faster ({spanned}): {totals}"
    else:
        text = f"{name}: no clear difference, speed-up {ratio.value:.2f} ({spanned}): {totals}"
    return text + (f"; slower on {phase.slower} samples" if phase.slower else "")


def _check(
    samples: Sequence[Sample],
    repeats: int,
    confidence: float,
    min_speedup: float | None,
) -> None:
    if not samples:
        raise InputError("no samples to time", fix="pass data with at least one text")
    if repeats < 2:
        raise UsageError(f"{repeats} passes cannot show the noise", fix="use 2 or more")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence is {confidence}", fix="give a share between 0 and 1, such as 0.95")
    if min_speedup is not None and not min_speedup > 0:
        raise UsageError(f"min_speedup is {min_speedup}", fix="give a positive ratio, such as 1.3")


def _fit(samples: Sequence[Sample], flops: Formulas | None, counts: Sequence[Counts]) -> None:
    if flops is not None and flops.tokens and len(counts) < len(samples):
        raise UsageError(f"{len(counts)} counts for {len(samples)} samples", fix="run engine.kept on every sample")
