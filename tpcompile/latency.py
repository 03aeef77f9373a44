"""Is the pruned engine faster on real inputs? Paired, interleaved, cold and warm apart, with a verdict that can be trusted.

Protocol (design.md 9): the inputs come in their real order, each once a pass, so that counts and shapes change as in use. Dense
and pruned alternate within a pass in the order A B, B A, A B, ... (ABBA over neighbours), the next pass the other way round. The
first pass of fresh sessions is *cold*: shapes are new; the passes after it are *warm*. A time is ``perf_counter_ns`` around one
call of the engine.

Figures are sums over the stream, percentiles only where the number of samples supports them, and the ratio dense / pruned with a
paired bootstrap interval over samples. Noise is what warm passes over the same inputs differ by (A-A): of each engine's
total, and of the ratio of the totals, from which a drift of the whole machine cancels; it widens an interval before any verdict.
"""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tpcompile.data import Sample
from tpcompile.errors import Inconclusive, InputError, TargetMissed, UsageError
from tpcompile.flops import Counts, Formulas, Saving, saving
from tpcompile.stats import Interval, Summary, as_json, bounds, least, paired_ratio, spread, summarise

SLO = re.compile(r"p(50|90|95|99)\s*<=?\s*(\d+(?:\.\d+)?)\s*(us|ms|s)")
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
VERDICTS = {"PASSED": 0, "INCONCLUSIVE": Inconclusive.exit_code, "FAILED": TargetMissed.exit_code}
"""Verdict to exit code, best first."""

PhaseName = Literal["cold", "warm"]


class Opened(Protocol):
    """An engine that was opened for this measurement and is closed after it."""

    def __call__(self, **inputs: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Compute."""
        ...

    def close(self) -> None:
        """Give its memory and threads back."""
        ...


@dataclass(frozen=True, slots=True)
class Slo:
    """A latency target for one percentile of the pruned engine, such as ``p95<=8ms``."""

    quantile: float
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read ``p95<=8ms``; percentiles 50, 90, 95, 99; units us, ms, s.

        Raises:
            UsageError: another form.
        """
        match = SLO.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"{text!r} is not a latency target", fix="write p95<=8ms: p50, p90, p95 or p99, and us, ms or s")
        return cls(int(match[1]) / 100, float(match[2]) * UNITS[match[3]])

    def __str__(self) -> str:
        return f"p{self.quantile * 100:.0f}<={self.limit:g}ms"


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """Cold or warm: both engines on the same stream.

    Attributes:
        dense_ms: ``[passes, n]`` raw times in real order.
        pruned_ms: ``[passes, n]``.
        dense: figures of the per-sample medians over passes.
        pruned: the same for the pruned engine.
        speedup: total dense time over total pruned time; below 1 pruning made it slower.
        realisation: speed-up / FLOPs ratio by ``paper`` and by ``graph``; empty where the formulas are not known.
        slower: number of samples on which the pruned engine was slower.
    """

    dense_ms: NDArray[np.float64]
    pruned_ms: NDArray[np.float64]
    dense: Summary
    pruned: Summary
    speedup: Interval
    realisation: Mapping[str, float]
    slower: int


@dataclass(frozen=True, eq=False)
class Latency:
    """The result of ``bench``.

    Attributes:
        verdict: ``PASSED``, ``FAILED`` or ``INCONCLUSIVE``; PASSED where no target was set.
        reason: one sentence.
        exit_code: 0, 8 or 10.
        tokens: length of every sample, in stream order.
        shapes: number of distinct lengths among them.
        cold: the first pass of fresh sessions.
        warm: the passes after it.
        noise: how far warm passes are apart, as a share: totals of ``dense`` and ``pruned``, and their ``ratio``.
        saving: work of dense and pruned on these samples; None where it is not known.
        seed: of the bootstrap.
    """

    verdict: str
    reason: str
    exit_code: int
    tokens: tuple[int, ...]
    shapes: int
    cold: Phase
    warm: Phase
    noise: Mapping[str, float]
    saving: Saving | None
    seed: int

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
        apart = ", ".join(f"{name} {share:.1%}" for name, share in self.noise.items())
        return "\n".join([*rows, f"{self.shapes} distinct lengths; warm passes differ by: {apart}"])

    def sentences(self) -> tuple[str, ...]:
        """What was found, in words. Slower is called slower."""
        return tuple(_sentence(name, phase, self.noise["ratio"]) for name, phase in (("cold", self.cold), ("warm", self.warm)))


def bench(
    pruned: Callable[[], Opened],
    dense: Callable[[], Opened],
    samples: Sequence[Sample],
    repeats: int = 3,
    seed: int = 0,
    *,
    confidence: float = 0.95,
    min_speedup: float | None = None,
    slo: Slo | None = None,
    phases: Sequence[PhaseName] = ("cold", "warm"),
    flops: Formulas | None = None,
    counts: Sequence[Counts] | Callable[[], Sequence[Counts]] = (),
) -> Latency:
    """Time both engines on the stream and judge.

    Args:
        pruned: opens a fresh pruned engine.
        dense: opens a fresh dense engine with the same threads and precision.
        samples: real inputs in their real order.
        repeats: warm passes, at least 2: noise is what they differ by.
        seed: of the bootstrap.
        confidence: of the interval a verdict needs.
        min_speedup: least dense time / pruned time.
        slo: target for a percentile of the pruned engine.
        phases: phases that the targets apply to; all of them must hold.
        flops: the pruned bundle's formulas.
        counts: what the pruned engine kept of each sample, for the formulas; a function is called after the timing. Where
            ``samples`` are batches, one entry per sample in them.

    Raises:
        InputError: no samples.
        UsageError: fewer than 2 repeats, a confidence outside (0, 1), a target that is not positive, or counts that do not fit.
    """
    _check(samples, repeats, confidence, min_speedup)
    if not callable(counts):
        _fit(samples, flops, counts)
    cold, warm = _measure(pruned, dense, samples, repeats)
    counted = counts() if callable(counts) else counts
    _fit(samples, flops, counted)
    work = saving(flops, counted) if flops is not None and flops.tokens else None
    noise = {"dense": spread(warm[0].sum(axis=1)), "pruned": spread(warm[1].sum(axis=1))}
    noise["ratio"] = spread(warm[0].sum(axis=1) / warm[1].sum(axis=1))
    found: dict[PhaseName, Phase] = {
        "cold": _phase(*cold, work, confidence, seed),
        "warm": _phase(*warm, work, confidence, seed),
    }
    judged = [_judge(name, found[name], noise, confidence, min_speedup, slo) for name in phases if min_speedup or slo]
    verdict, reason = _worst([entry for entries in judged for entry in entries])
    return Latency(
        verdict=verdict,
        reason=reason,
        exit_code=VERDICTS[verdict],
        tokens=tuple(sample.length for sample in samples),
        shapes=len({sample.length for sample in samples}),
        cold=found["cold"],
        warm=found["warm"],
        noise=noise,
        saving=work,
        seed=seed,
    )


Times = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Dense and pruned, ``[passes, n]`` ms each."""


def _measure(
    pruned: Callable[[], Opened], dense: Callable[[], Opened], samples: Sequence[Sample], repeats: int
) -> tuple[Times, Times]:
    """One cold pass and ``repeats`` warm ones, in sessions of their own."""
    engines: list[Opened] = []
    try:
        engines += [dense()]
        engines += [pruned()]
        passes = [_pass(engines, samples, number) for number in range(repeats + 1)]
    finally:
        for engine in engines:
            engine.close()
    times = np.array(passes, dtype=np.float64) / 1e6
    return (times[:1, 0], times[:1, 1]), (times[1:, 0], times[1:, 1])


def _pass(engines: Sequence[Opened], samples: Sequence[Sample], number: int) -> list[list[int]]:
    """Nanoseconds per engine and sample; which engine goes first alternates with the sample and with the pass."""
    times: list[list[int]] = [[], []]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index, sample in enumerate(samples):
            first = (index + number) % 2
            for which in (first, 1 - first):
                start = perf_counter_ns()
                engines[which](**sample.inputs)
                times[which].append(perf_counter_ns() - start)
    finally:
        if collecting:
            gc.enable()
    return times


def _phase(dense: NDArray[np.float64], pruned: NDArray[np.float64], work: Saving | None, confidence: float, seed: int) -> Phase:
    a, b = np.median(dense, axis=0), np.median(pruned, axis=0)
    speedup = paired_ratio(a, b, confidence, seed)
    ratios = {"paper": work.paper, "graph": work.graph} if work else {}
    return Phase(
        dense_ms=dense,
        pruned_ms=pruned,
        dense=summarise(a),
        pruned=summarise(b),
        speedup=speedup,
        realisation={name: speedup.value / ratio for name, ratio in ratios.items() if ratio},
        slower=int((b > a).sum()),
    )


def _judge(
    name: str, phase: Phase, noise: Mapping[str, float], confidence: float, min_speedup: float | None, slo: Slo | None
) -> list[tuple[str, str]]:
    """A verdict with its reason for each target."""
    found = []
    if min_speedup is not None:
        ratio = phase.speedup.widened(noise["ratio"])
        text = f"{name} speed-up {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), asked for {min_speedup:g}"
        if not np.isfinite(ratio.high):
            text += f"; too few samples to bound it: {phase.pruned.count}"
        found.append((_side(ratio.low >= min_speedup, ratio.high < min_speedup), text))
    if slo is not None:
        slack = 1 + noise["pruned"]
        low, high = bounds(np.median(phase.pruned_ms, axis=0), slo.quantile, confidence)
        text = f"{name} p{slo.quantile * 100:.0f} between {low:.2f} and {high:.2f} ms, asked for {slo}"
        if not np.isfinite(high):
            text += f"; it needs {least(slo.quantile, confidence)} samples, there are {phase.pruned.count}"
        found.append((_side(high * slack <= slo.limit, low / slack > slo.limit), text))
    return found


def _side(passed: bool, failed: bool) -> str:
    return "PASSED" if passed else "FAILED" if failed else "INCONCLUSIVE"


def _worst(judged: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The worst verdict and its reasons."""
    if not judged:
        return "PASSED", "measured; no target was set"
    order = list(VERDICTS)
    verdict = max((entry[0] for entry in judged), key=order.index)
    return verdict, "; ".join(reason for entry, reason in judged if entry == verdict)


def _figures(name: str, figures: Summary) -> str:
    known = [(label, value) for label in ("p50", "p90", "p95", "p99") if (value := getattr(figures, label)) is not None]
    return f"{name:<12} sum {figures.total:.0f} ms" + "".join(f", {label} {value:.2f}" for label, value in known)


def _sentence(name: str, phase: Phase, noise: float) -> str:
    ratio = phase.speedup.widened(noise)
    totals = f"{phase.dense.total:.0f} ms dense, {phase.pruned.total:.0f} ms pruned over {phase.dense.count} samples"
    spanned = f"{ratio.low:.2f} to {ratio.high:.2f}"
    if ratio.high < 1:
        text = f"{name}: pruned is SLOWER than dense, {1 / ratio.value:.2f}x the time (speed-up {spanned}): {totals}"
    elif ratio.low > 1:
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
        raise UsageError(f"{repeats} warm passes cannot show the noise", fix="use 2 or more")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence is {confidence}", fix="give a share between 0 and 1, such as 0.95")
    if min_speedup is not None and not min_speedup > 0:
        raise UsageError(f"min_speedup is {min_speedup}", fix="give a positive ratio, such as 1.3")


def _fit(samples: Sequence[Sample], flops: Formulas | None, counts: Sequence[Counts]) -> None:
    if flops is not None and flops.tokens and len(counts) < len(samples):
        raise UsageError(f"{len(counts)} counts for {len(samples)} samples", fix="run engine.kept on every sample")
