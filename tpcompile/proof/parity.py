"""Is the engine the model? Engine against masked reference by the law of design.md 4.7, pruned against dense on data.

Kept sets are compared as sets, site by site. A token may be kept by one side only where its score lies within float32 noise of
the threshold; such a sample is counted and left out of the law, every other difference fails.

Nothing raises here because a gate failed: the verdict and its exit code are in the result.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample, batches, collate, split
from tpcompile.errors import InputError, UsageError
from tpcompile.proof.agreement import CONFIDENCE, Task, cosine, measure
from tpcompile.proof.coverage import Coverage
from tpcompile.proof.difference import NOISE, TOLERANCE, Allowed, Difference, Tolerances, compare_outputs, worst
from tpcompile.proof.float64 import Floor
from tpcompile.proof.judgement import Demands, SampleParity, badness, judge, judge_all
from tpcompile.proof.keptsets import KeptSets, compare_kept, margins
from tpcompile.timing.stats import as_json


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


@dataclass(frozen=True)
class Parity:
    """The result of ``validate``.

    Attributes:
        verdict: ``PASSED``, ``FAILED`` or ``INCONCLUSIVE``.
        reason: one sentence.
        exit_code: 0, 5 (parity), 6 (accuracy) or 10.
        tolerance: of the law, for outputs without one of their own.
        noise: of a score, relative.
        samples: one record per sample of the data.
        outputs: the worst of each output over the samples the law judged, probes too.
        flipped: number of samples with flips inside noise.
        overflow: number of samples that keep more than a constant count holds.
        overflow_gap: the tolerance that those would need.
        score_noise: largest score difference seen, relative to its site's largest score, where the kept sets agree so far.
        tap_gap: largest difference between the engine's outputs with and without taps.
        task: dense against pruned; None without a dense model, or where an output is missing or not finite, be it the dense one's.
        worst: index of the sample with the largest required tolerance.
        worst_inputs: that sample's inputs, as nested lists.
        tolerances: what each output may be off by.
        probes: one record per made-up sample: they are judged by the law like the data, and count for nothing else.
        floor: how far the float32 reference itself is from float64.
        coverage: the lengths, batch mixes and buckets that were run.
        saved: the folder with the worst samples; empty where none was asked for.
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
    tolerances: Mapping[str, Allowed] = field(default_factory=dict)
    probes: tuple[SampleParity, ...] = ()
    floor: Floor = field(default_factory=Floor)
    coverage: Coverage = field(default_factory=Coverage)
    saved: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON document; values that are not finite are written as None."""
        return dict(as_json(self))

    @property
    def margins(self) -> tuple[float, ...]:
        """Per site, the smallest margin of any sample; NaN where none is known."""
        columns = zip(*(record.margins for record in (*self.samples, *self.probes)), strict=True)
        return tuple(min((m for m in column if not math.isnan(m)), default=math.nan) for column in columns)

    def text(self) -> str:
        """The result as a few plain lines."""
        return "\n".join([*self._outputs(), *self._samples()])

    def _outputs(self) -> Iterator[str]:
        columns = f"{'max abs':>10}{'max rel':>10}{'mean abs':>10}{'cosine':>12}{'needs':>10}{'allowed':>10}{'float64':>10}"
        yield f"{'engine vs masked reference':<28}{columns}"
        for name, d in self.outputs.items():
            known = f"{self.floor.outputs[name].required:.1e}" if name in self.floor.outputs else "-"
            allowed = self.tolerances[name].atol if name in self.tolerances else self.tolerance
            figures = f"{d.max_abs:>10.1e}{d.max_rel:>10.1e}{d.mean_abs:>10.1e}{d.cosine:>12.8f}{d.required:>10.1e}"
            yield f"  {name:<26}{figures}{allowed:>10.1e}{known:>10}"

    def _samples(self) -> Iterator[str]:
        equal = sum(record.verdict == "equal" for record in self.samples)
        yield f"samples {len(self.samples)}: {equal} equal, {self.flipped} with a token inside float noise of its threshold"
        if self.probes:
            yield f"probes {len(self.probes)}: {sum(record.verdict == 'equal' for record in self.probes)} equal"
        if self.coverage.lengths:
            yield f"covered: {self.coverage}"
        if self.floor.samples:
            other = f", which keeps other tokens of {self.floor.flipped}" if self.floor.flipped else ""
            yield f"float64: the reference itself, on {len(self.floor.samples)} samples{other}; scores off by {self.floor.score_noise:.1e}"
        if known := [f"site {i} {margin:.1e}" for i, margin in enumerate(self.margins) if not math.isnan(margin)]:
            yield f"closest kept and dropped scores, of the largest: {', '.join(known)}"
        if self.overflow:
            yield f"{self.overflow} keep more than the constant counts hold: approximate, off by up to {self.overflow_gap:.1e}"
        if self.task is not None:
            yield f"pruned vs dense: {self.task}"
        if self.saved:
            yield f"worst samples: {self.saved}"


def validate(
    engine: RunsAndTells,
    reference: Tells,
    dense: Runs | None,
    samples: Sequence[Sample],
    tolerance: float | Tolerances = TOLERANCE,
    *,
    noise: float = NOISE,
    min_agreement: float | None = None,
    max_drop: float | None = None,
    confidence: float | None = None,
    batch: int = 1,
    along: Mapping[str, int] | None = None,
    static: bool = False,
    probes: Sequence[Sequence[Sample]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Run every sample through engine, reference and dense, and judge.

    Args:
        engine: the compiled engine.
        reference: the masked program.
        dense: the unpruned model, or None to compare with the reference alone.
        samples: real inputs, of several lengths.
        tolerance: of the law; one number, or one for each output.
        noise: how close to the threshold a flipped token's score must be, relative to the site's largest score.
        min_agreement: least share of cases in which dense and pruned agree.
        max_drop: largest drop of accuracy or recall, as a share (0.005 is half a point).
        confidence: with which the drop must be known to lie on one side of ``max_drop``; None: the measured drop decides.
        batch: samples an inference; more than one are padded to the longest, and every sample is judged by itself.
        along: output name -> the dim that runs over tokens: what belongs to padding is not compared.
        static: the sites store constant counts: samples that keep more are counted, not judged.
        probes: further batches, made up, for engine and reference only: the law holds for any input.
        progress: called with the samples done, and with all of them.

    Raises:
        InputError: no samples.
        UsageError: a gate that the data cannot answer, a tolerance that is not positive and finite, or one for an output that is not there.
    """
    law = tolerance if isinstance(tolerance, Tolerances) else Tolerances(tolerance)
    _check(dense, samples, noise, min_agreement, max_drop, confidence)
    groups = [[samples[i] for i in group] for group in batches(samples, batch)]
    total = len(samples) + sum(map(len, probes))
    records: list[SampleParity] = []
    ours, theirs, seen_noise, tap_gap = [], [], 0.0, 0.0
    law.check(())
    for group in (*groups, *probes):
        full_of = dense if len(records) < len(samples) else None
        for sample, run in _runs(engine, reference, full_of, group, along or {}):
            if not records:
                law.check(run.expected)
            number = len(records) - (len(samples) if len(records) >= len(samples) else 0)
            record, heard = _record(number, sample, run, law, noise, static)
            records.append(record)
            seen_noise = max(seen_noise, heard)
            tap_gap = max([tap_gap, *(difference.max_abs for difference in compare_outputs(run.tapped, run.plain).values())])
            ours.append(run.plain)
            theirs.append(run.full)
        if progress is not None:
            progress(len(records), total)
    data, made_up = records[: len(samples)], records[len(samples) :]
    sound = all(math.isfinite(record.required) for record in data) and all(
        np.isfinite(value).all() for full in theirs for value in full.values()
    )
    task = measure(samples, theirs[: len(data)], ours[: len(data)], confidence or CONFIDENCE) if dense is not None and sound else None
    verdict, reason, code = judge_all(data, made_up, task, law, Demands(min_agreement, max_drop, confidence))
    first = max(data, key=badness)
    return Parity(
        verdict=verdict,
        reason=reason,
        exit_code=code,
        tolerance=law.allowed("").atol,
        noise=noise,
        samples=tuple(data),
        outputs=_worst_outputs(records),
        flipped=sum(record.verdict == "noise" for record in data),
        score_noise=seen_noise,
        tap_gap=tap_gap,
        task=task,
        worst=first.index,
        worst_inputs={name: value.tolist() for name, value in samples[first.index].inputs.items()},
        overflow=sum(record.verdict == "overflow" for record in data),
        overflow_gap=max((record.required for record in data if record.verdict == "overflow"), default=0.0),
        tolerances={name: law.allowed(name) for name in data[0].outputs},
        probes=tuple(made_up),
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


def _record(
    index: int, sample: Sample, run: _Run, law: Tolerances, noise: float, static: bool
) -> tuple[SampleParity, float]:
    """One sample's comparison, and the score noise that was seen."""
    plain, _, kept, expected, truth, full = run
    flips, heard = compare_kept(kept, truth, len(truth.scores[0]) if truth.scores else sample.length)
    outputs = compare_outputs(plain, expected, law)
    verdict, reason = judge(outputs, flips, law, noise, _crowded_out(kept) if static else ())
    to_dense = {name: cosine(plain[name], full[name]) for name in full if name in plain and plain[name].shape == full[name].shape}
    record = SampleParity(
        index, sample.length, kept.counts, kept.stored, verdict, reason, flips, outputs, to_dense, margins(truth)
    )
    return record, heard


def _crowded_out(kept: KeptSets) -> tuple[int, ...]:
    """Per site, tokens that found no room; none where rows are free: those were dropped by mistake."""
    return tuple(n if alive >= rows else 0 for n, alive, rows in zip(kept.lost, kept.counts, kept.stored, strict=True))


def _check(
    dense: Runs | None,
    samples: Sequence[Sample],
    noise: float,
    min_agreement: float | None,
    max_drop: float | None,
    confidence: float | None,
) -> None:
    if not samples:
        raise InputError("no samples to validate on", fix="pass data with at least one text")
    if not 0 <= noise < math.inf:
        raise UsageError(f"the noise {noise} is no finite number from 0 on", fix="the law's own is 1e-6")
    for name, value in (("min_agreement", min_agreement), ("max_drop", max_drop)):
        if value is not None and math.isnan(value):
            raise UsageError(f"{name} is no number", fix="give a share, such as 0.99 of agreement or a drop of 0.005")
    if confidence is not None and not 0 < confidence < 1:
        raise UsageError(f"the confidence {confidence} is not between 0 and 1", fix="0.95 is usual")
    if dense is None and (min_agreement is not None or max_drop is not None):
        raise UsageError(
            "min_agreement and max_drop compare with the dense model, and there is none", fix="export with the dense baseline"
        )
    answerable = {sample.role for sample in samples} >= {"query", "target"} or any(sample.answerable for sample in samples)
    if max_drop is not None and not answerable:
        raise UsageError("max_drop needs data with right answers", fix="give labels, retrieval pairs, or docstrings:pairs")


def _worst_outputs(records: Sequence[SampleParity]) -> dict[str, Difference]:
    """The worst figure of each kind over the samples whose kept sets are equal (over all, where none is)."""
    return worst(record.outputs for record in [record for record in records if not record.flips] or records)
