"""Is the engine the model? Engine against masked reference by the law of design.md 4.7, pruned against dense on data.

Kept sets are compared as sets, site by site. A token may be kept by one side only where its score lies within float32 noise of
the threshold; such a sample is counted and left out of the law, every other difference fails.

Nothing raises here because a gate failed: the verdict and its exit code are in the result.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tpcompile.agreement import Task, cosine, measure
from tpcompile.errors import AccuracyError, Inconclusive, InputError, ParityError, UsageError
from tpcompile.keptsets import Flip, KeptSets, compare_kept
from tpcompile.samples import Sample, batches, collate, split
from tpcompile.stats import as_json

TOLERANCE = 1e-5
"""The law: ``|engine - masked| <= TOLERANCE * max(1, max|masked|)`` in float32, given equal kept sets."""

NOISE = 1e-6
"""Float32 noise of a score, relative to the largest score of its site."""


class Runs(Protocol):
    """Anything that maps inputs by name to outputs by name."""

    def __call__(self, **inputs: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Compute."""
        ...


class Tells(Protocol):
    """A reference: inputs by name to outputs by name and, for each sample of the batch, the kept sets behind them."""

    def __call__(self, **inputs: NDArray[Any]) -> tuple[Mapping[str, NDArray[Any]], Sequence[KeptSets]]:
        """Compute and tell."""
        ...


class RunsAndTells(Runs, Protocol):
    """An engine that runs plainly, and on request also tells what it kept."""

    @property
    def kept_each(self) -> Tells:
        """The slower call that also tells."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one output is from the reference.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: largest difference relative to the reference's own value, where that is not 0.
        cosine: of the flattened outputs; 1 for two zero vectors.
        required: the smallest tolerance under which the law holds; infinite when a value is not finite or a shape differs.
    """

    max_abs: float
    max_rel: float
    cosine: float
    required: float


@dataclass(frozen=True, slots=True)
class SampleParity:
    """One sample's comparison.

    Attributes:
        index: its number in the data.
        tokens: its length.
        alive: tokens the engine kept, per site.
        stored: rows the engine held, per site.
        verdict: ``equal``, ``noise`` (flips inside noise, not judged by the law), ``overflow`` (more tokens than a constant count
            holds: approximate, not judged either) or ``failed``.
        reason: why it failed; empty otherwise.
        flips: where the kept sets first differ.
        outputs: per output, against the reference.
        dense: cosine to the dense model, per output; empty without a dense model.
    """

    index: int
    tokens: int
    alive: tuple[int, ...]
    stored: tuple[int, ...]
    verdict: str
    reason: str
    flips: tuple[Flip, ...]
    outputs: Mapping[str, Difference]
    dense: Mapping[str, float]


@dataclass(frozen=True)
class Parity:
    """The result of ``validate``.

    Attributes:
        verdict: ``PASSED``, ``FAILED`` or ``INCONCLUSIVE``.
        reason: one sentence.
        exit_code: 0, 5 (parity), 6 (accuracy) or 10.
        tolerance: of the law.
        noise: of a score, relative.
        samples: one record per sample.
        outputs: the worst of each output over the samples the law judged.
        flipped: number of samples with flips inside noise.
        overflow: number of samples that keep more than a constant count holds.
        overflow_gap: the tolerance that those would need.
        score_noise: largest score difference seen, relative to its site's largest score, where the kept sets agree so far.
        tap_gap: largest difference between the engine's outputs with and without taps.
        task: dense against pruned; None without a dense model, or where an output is missing or not finite.
        worst: index of the sample with the largest required tolerance.
        worst_inputs: that sample's inputs, as nested lists.
    """

    verdict: str
    reason: str
    exit_code: int
    tolerance: float
    noise: float
    samples: tuple[SampleParity, ...]
    outputs: Mapping[str, Difference]
    flipped: int
    score_noise: float
    tap_gap: float
    task: Task | None
    worst: int
    worst_inputs: Mapping[str, Any] = field(default_factory=dict)
    overflow: int = 0
    overflow_gap: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON document; values that are not finite are written as None."""
        return dict(as_json(self))

    def text(self) -> str:
        """The result as a few plain lines."""
        rows = [f"{'engine vs masked reference':<28}{'max abs':>10}{'max rel':>10}{'cosine':>12}{'needs':>10}"]
        rows += [
            f"  {name:<26}{d.max_abs:>10.1e}{d.max_rel:>10.1e}{d.cosine:>12.8f}{d.required:>10.1e}"
            for name, d in self.outputs.items()
        ]
        equal = sum(record.verdict == "equal" for record in self.samples)
        rows.append(
            f"samples {len(self.samples)}: {equal} equal, {self.flipped} with a token inside float noise of its threshold"
        )
        if self.overflow:
            rows.append(
                f"{self.overflow} keep more than the constant counts hold: approximate, off by up to {self.overflow_gap:.1e}"
            )
        if self.task is not None:
            rows.append(f"pruned vs dense: {self.task}")
        return "\n".join(rows)


def validate(
    engine: RunsAndTells,
    reference: Tells,
    dense: Runs | None,
    samples: Sequence[Sample],
    tolerance: float = TOLERANCE,
    *,
    rtol: float | None = None,
    noise: float = NOISE,
    thresholds: Sequence[float] | None = None,
    min_agreement: float | None = None,
    max_drop: float | None = None,
    batch: int = 1,
    along: Mapping[str, int] | None = None,
    static: bool = False,
) -> Parity:
    """Run every sample through engine, reference and dense, and judge.

    Args:
        engine: the compiled engine.
        reference: the masked program.
        dense: the unpruned model, or None to compare with the reference alone.
        samples: real inputs, of several lengths.
        tolerance: absolute tolerance of the law.
        rtol: tolerance relative to the largest reference value; the larger of the two allows. Default: the same, which is the law.
        noise: how close to the threshold a flipped token's score must be, relative to the site's largest score.
        thresholds: the score each site compares with, where the method has fixed ones.
        min_agreement: least share of cases in which dense and pruned agree.
        max_drop: largest drop of accuracy or recall, as a share (0.005 is half a point).
        batch: samples an inference; more than one are padded to the longest, and every sample is judged by itself.
        along: output name -> the dim that runs over tokens: what belongs to padding is not compared.
        static: the sites store constant counts: samples that keep more are counted, not judged.

    Raises:
        InputError: no samples.
        UsageError: a gate that the data cannot answer, or a tolerance that is not positive.
    """
    _check(dense, samples, min(tolerance, rtol or tolerance), noise, min_agreement, max_drop)
    relative = 1.0 if rtol is None else rtol / tolerance
    records, ours, theirs, seen_noise, tap_gap = [], [], [], 0.0, 0.0
    groups = ([samples[i] for i in group] for group in batches(samples, batch))
    for index, (sample, run) in enumerate(run for group in groups for run in _runs(engine, reference, dense, group, along or {})):
        plain, tapped, kept, expected, truth, full = run
        flips, heard = compare_kept(kept, truth, len(truth.scores[0]) if truth.scores else sample.length, thresholds)
        outputs = compare_outputs(plain, expected, relative)
        verdict, reason = _judge(outputs, flips, tolerance, noise, kept.lost if static else ())
        to_dense = {
            name: cosine(plain[name], full[name]) for name in full if name in plain and plain[name].shape == full[name].shape
        }
        records.append(SampleParity(index, sample.length, kept.counts, kept.stored, verdict, reason, flips, outputs, to_dense))
        seen_noise = max(seen_noise, heard)
        tap_gap = max([tap_gap, *(difference.max_abs for difference in compare_outputs(tapped, plain).values())])
        ours.append(plain)
        theirs.append(full)
    sound = all(math.isfinite(_required(record)) for record in records)
    task = measure(samples, theirs, ours) if dense is not None and sound else None
    verdict, reason, code = _verdict(records, task, tolerance, min_agreement, max_drop)
    worst = max(records, key=lambda record: (record.verdict == "failed", _required(record)))
    return Parity(
        verdict=verdict,
        reason=reason,
        exit_code=code,
        tolerance=tolerance,
        noise=noise,
        samples=tuple(records),
        outputs=_worst_outputs(records),
        flipped=sum(record.verdict == "noise" for record in records),
        score_noise=seen_noise,
        tap_gap=tap_gap,
        task=task,
        worst=worst.index,
        worst_inputs={name: value.tolist() for name, value in samples[worst.index].inputs.items()},
        overflow=sum(record.verdict == "overflow" for record in records),
        overflow_gap=max((_required(record) for record in records if record.verdict == "overflow"), default=0.0),
    )


class _Run(NamedTuple):
    """What one sample gave: the engine without and with taps, the reference, and the dense model."""

    plain: Mapping[str, NDArray[Any]]
    tapped: Mapping[str, NDArray[Any]]
    kept: KeptSets
    expected: Mapping[str, NDArray[Any]]
    truth: KeptSets
    full: Mapping[str, NDArray[Any]]


def _runs(
    engine: RunsAndTells, reference: Tells, dense: Runs | None, group: Sequence[Sample], along: Mapping[str, int]
) -> Iterator[tuple[Sample, _Run]]:
    """Run one batch through everything, and take it apart by sample."""
    feeds = collate(group)
    (tapped, kept), (expected, truth) = engine.kept_each(**feeds), reference(**feeds)
    full = dense(**feeds) if dense is not None else {}
    each = [split(outputs, group, along) for outputs in (engine(**feeds), tapped, expected, full)]
    yield from zip(group, map(_Run, each[0], each[1], kept, each[2], truth, each[3]), strict=True)


def compare_outputs(
    got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], relative: float = 1.0
) -> dict[str, Difference]:
    """Every output of ``expected``; one that is missing, of another shape or not finite requires an infinite tolerance.

    Args:
        got: what the engine gave.
        expected: what the reference gave.
        relative: relative tolerance over absolute tolerance; 1 is the law.
    """
    return {name: _difference(got.get(name), value, relative) for name, value in expected.items()}


def _difference(got: NDArray[Any] | None, expected: NDArray[Any], scale: float) -> Difference:
    hopeless = Difference(math.inf, math.inf, math.nan, math.inf)
    if got is None or got.shape != expected.shape:
        return hopeless
    a, b = got.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return hopeless
    gap, size = np.abs(a - b), np.abs(b)
    max_abs = float(gap.max(initial=0.0))
    relative = gap[size > 0] / size[size > 0]
    required = max_abs / max(1.0, scale * float(size.max(initial=0.0)))
    return Difference(max_abs, float(relative.max(initial=0.0)), cosine(a, b), required)


def _check(
    dense: Runs | None,
    samples: Sequence[Sample],
    tolerance: float,
    noise: float,
    min_agreement: float | None,
    max_drop: float | None,
) -> None:
    if not samples:
        raise InputError("no samples to validate on", fix="pass data with at least one text")
    if not (tolerance > 0 and noise >= 0):
        raise UsageError(f"tolerance {tolerance} and noise {noise} must be positive", fix="the law's own is 1e-5, noise 1e-6")
    if dense is None and (min_agreement is not None or max_drop is not None):
        raise UsageError(
            "min_agreement and max_drop compare with the dense model, and there is none", fix="export with the dense baseline"
        )
    answerable = {sample.role for sample in samples} >= {"query", "target"} or any(sample.label is not None for sample in samples)
    if max_drop is not None and not answerable:
        raise UsageError("max_drop needs data with right answers", fix="give labels, retrieval pairs, or docstrings:pairs")


def _judge(
    outputs: Mapping[str, Difference], flips: Sequence[Flip], tolerance: float, noise: float, lost: Sequence[int] = ()
) -> tuple[str, str]:
    """One sample's verdict and reason."""
    for name, difference in outputs.items():
        if math.isinf(difference.required):
            return "failed", f"{name} is missing, has another shape, or holds NaN or infinity"
    full = next((site for site, count in enumerate(lost) if count), -1)
    odd = [flip for flip in flips if flip.site != full or flip.kept_by == "engine"]
    if any(flip.margin > noise for flip in odd):
        worst = max(odd, key=lambda flip: flip.margin)
        side = "kept" if worst.kept_by == "engine" else "dropped"
        return (
            "failed",
            f"site {worst.site}: the engine {side} token {worst.position}, its score up to {worst.margin:.1e} from the threshold",
        )
    if flips:
        return "noise" if len(odd) == len(flips) else "overflow", ""
    for name, difference in outputs.items():
        if difference.required > tolerance:
            return "failed", f"{name} needs a tolerance of {difference.required:.1e}, allowed is {tolerance:.1e}"
    return "equal", ""


def _verdict(
    records: Sequence[SampleParity], task: Task | None, tolerance: float, min_agreement: float | None, max_drop: float | None
) -> tuple[str, str, int]:
    failed = [record for record in records if record.verdict == "failed"]
    judged = sum(record.verdict == "equal" for record in records)
    if failed:
        return (
            "FAILED",
            f"{len(failed)} of {len(records)} samples differ; sample {failed[0].index}: {failed[0].reason}",
            ParityError.exit_code,
        )
    others = _others(records)
    if not judged:
        return "INCONCLUSIVE", f"the law judged no sample: {others}", Inconclusive.exit_code
    if 2 * judged < len(records):
        return "INCONCLUSIVE", f"only {judged} of {len(records)} samples could be judged: {others}", Inconclusive.exit_code
    if task and min_agreement is not None and task.agreement < min_agreement:
        return (
            "FAILED",
            f"agreement with dense ({task.name}) is {task.agreement:.4f}, asked for {min_agreement}",
            AccuracyError.exit_code,
        )
    if task and max_drop is not None and task.drop is None:
        return "INCONCLUSIVE", f"the outputs give no right answers to compare ({task.name})", Inconclusive.exit_code
    if task and max_drop is not None and task.drop is not None and task.drop > max_drop:
        return (
            "FAILED",
            f"{task.name} falls from {task.dense:.4f} to {task.pruned:.4f}, allowed is {max_drop:.4f}",
            AccuracyError.exit_code,
        )
    inside = f"; left out: {others}" if others else ""
    return "PASSED", f"{judged} of {len(records)} samples within {tolerance:.0e} of the masked reference{inside}", 0


def _others(records: Sequence[SampleParity]) -> str:
    """Why samples were not judged; empty where all were."""
    reasons = {"noise": "a token within float noise of its threshold", "overflow": "more tokens than the constant counts hold"}
    counts = {verdict: sum(record.verdict == verdict for record in records) for verdict in reasons}
    return ", ".join(f"{count} with {reasons[verdict]}" for verdict, count in counts.items() if count)


def _required(record: SampleParity) -> float:
    return max((difference.required for difference in record.outputs.values()), default=0.0)


def _worst_outputs(records: Sequence[SampleParity]) -> dict[str, Difference]:
    """The worst figure of each kind over the samples whose kept sets are equal (over all, where none is)."""
    judged = [record for record in records if not record.flips] or list(records)
    worst = {}
    for name in judged[0].outputs:
        each = [record.outputs[name] for record in judged]
        worst[name] = Difference(
            max(d.max_abs for d in each), max(d.max_rel for d in each), min(d.cosine for d in each), max(d.required for d in each)
        )
    return worst
