"""The journey as straight lines: lower, export, load, validate, bench."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from tpcompile import bundle as bundles
from tpcompile.backends import backend, copier
from tpcompile.backends.base import Backend, Profiler
from tpcompile.build import compile_subject, fill
from tpcompile.bundle import Bundle
from tpcompile.calibration import calibration
from tpcompile.capture import Dynamic, capture
from tpcompile.compat import sparing_collector
from tpcompile.data.feeds import batch_of, samples_of
from tpcompile.data.samples import Sample, batches, collate
from tpcompile.engine import load
from tpcompile.errors import BackendUnavailable, UsageError
from tpcompile.flops import Counts
from tpcompile.operating import check_target
from tpcompile.operating import fit as fit_subject
from tpcompile.passes import Canonicalize, Dump, Impose, pipeline
from tpcompile.plan import Data, Wish
from tpcompile.program import Program
from tpcompile.proof.proving import Progress, validate
from tpcompile.recipe import Recipe
from tpcompile.report import overview, spectrogram
from tpcompile.report.page import EngineRun, PatchTrace, ReportData, WordTrace, trace_patches, trace_words
from tpcompile.report.page import write as write_report
from tpcompile.subject import Subject, subject_of
from tpcompile.timing.alone import apart
from tpcompile.timing.attribution import attribute as find_attribution
from tpcompile.timing.latency import EFFECT, Latency
from tpcompile.timing.latency import bench as measure_latency
from tpcompile.timing.targets import Slo
from tpcompile.timing.workers import crowd

Model = nn.Module | ExportedProgram | Program | str | Path

__all__ = ["bench", "export", "fit", "impose", "load", "lower", "report", "validate"]

SHOWN = 6
"""Samples that a report draws."""
LEGIBLE = (80, 140)
"""Tokens of a text that shows something and fits."""
STEPS = 9
"""Steps of an export, for progress."""


def lower(model: Model, inputs: Mapping[str, Tensor] | None = None, *, dynamic: Dynamic | None = None, batch: str = "one",
          method: str | None = None, parameters: Mapping[str, Any] | None = None, checkpoint: str | Path | None = None,
          assume_masked: Sequence[str] = (), dump_ir: str | Path | None = None) -> Program:  # fmt: skip
    """Capture a model and run every pass.

    Args:
        model: a pruned module, an ExportedProgram, a ``.pt2`` file, what ``impose`` made, or a model directory with ``method``.
        inputs: example tensors by parameter name; a model directory brings its own.
        dynamic: per input, dim -> name, such as ``{"input_ids": {1: "seq"}}``.
        batch: ``one``, or ``ragged``: any number of samples, each with its own counts, padded to the batch's largest.
        method: pruning method to wrap the model with.
        parameters: of the method.
        checkpoint: weights for a ``timm/NAME``.
        assume_masked: sites (``site0``) whose dropped tokens are taken to be masked where that cannot be proved; recorded.
        dump_ir: folder for the text of every stage.

    Returns:
        The compact program; ``program(**inputs)`` runs it, ``str(program)`` reads it.

    Raises:
        TpcompileError: see ``tpcompile.errors``; the pass and the user's line are in the message.
    """
    subject = subject_of(model, inputs, dynamic, method, parameters, batch=batch, checkpoint=_path(checkpoint))
    captured = capture(subject.model, subject.inputs, subject.dynamic, subject.ranges)
    with Dump(Path(dump_ir)) if dump_ir else nullcontext() as hook:
        return pipeline(batch, assume_masked)(captured, hook)


def impose(model: nn.Module | ExportedProgram, inputs: Mapping[str, Tensor], *, dynamic: Dynamic | None = None,
           threshold: float = 0.5, prefix: int = 1, blocks: Sequence[int] = (), memory: bool = False) -> Program:  # fmt: skip
    """Make a dense model a masked one, without training: in each block, tokens that receive little attention are dropped.

    For any encoder with softmax attention over its own tokens; no part of it needs a name.

    Args:
        model: dense, in eval mode.
        inputs: example tensors by parameter name.
        dynamic: per input, dim -> name.
        threshold: share of the mean attention below which a token falls: 1 is what a token receives on average, whatever the length.
        prefix: leading tokens that fall only where they are padding: class, distillation and register tokens.
        blocks: the attentions that decide, counted from 0; default: all.
        memory: leave dropped tokens out of the outputs, for a decoder that reads them: an output ``memory_mask`` says which rows live.

    Returns:
        The masked program: it runs (``program(**inputs)``), and ``lower`` and ``export`` take it as a model.

    Raises:
        CaptureError: torch.export failed.
        MarkError: the model has no self-attention, or nothing but hidden states behind none.
    """
    step = Impose(threshold, prefix, "+".join(map(str, blocks)), memory)
    return step(Canonicalize()(capture(model, inputs, dynamic)))


def export(model: Model, inputs: Mapping[str, Tensor] | None = None, out: str | Path = "out", *, target: str = "onnx",
           dynamic: Dynamic | None = None, method: str | None = None, parameters: Mapping[str, Any] | None = None,
           pooling: str = "auto", lowering: str = "auto", form: str = "auto", buckets: Sequence[int] = (),
           calibrate: Data | None = None, flops: float | None = None, static_quantile: float = 1.0, tune: bool = False,
           lengths: Sequence[int] = (), prime: bool = False, copies: int = 1, batch: str = "one", precision: str = "fp32",
           dense: nn.Module | None = None, checkpoint: str | Path | None = None, assume_masked: Sequence[str] = (),
           skip_below: float = 0.0, dims: Mapping[str, tuple[int, int, int]] | None = None, capabilities: Sequence[str] = (),
           force: bool = False, dump_ir: str | Path | None = None, progress: Progress | None = None) -> Bundle:  # fmt: skip
    """Compile a model into a bundle: engine, dense baseline, masked reference and test vectors.

    Args:
        model: as ``lower`` takes it.
        inputs: example tensors by parameter name; a model directory brings its own.
        out: the folder to write; written whole or not at all.
        target: ``onnx``, ``openvino``, ``tensorrt`` or ``tensorrt-rtx``.
        dynamic: per input, dim -> name.
        method: pruning method to wrap the model with.
        parameters: of the method.
        pooling: of a bare encoder directory: ``auto``, ``mean``, ``cls``.
        lowering: how many rows a site stores: ``dynamic``, what is kept; ``bucketed``, rounded up to a ladder; ``static``, a constant,
            and samples that keep more are approximate. ``auto`` takes the target's own; see docs/lowerings.md.
        form: ``single``, one graph; ``staged``, a graph for each stretch between sites, rows gathered by the host; or ``auto``.
        buckets: the ladder: ``(16,)`` for multiples of 16, or ``(32, 64, 128)``; default ``(4, 8, 12, 16)``, multiples of the last beyond.
        calibrate: data that ``static`` takes its counts from, ``tune`` times, and ``flops`` is fitted on; as for ``validate``, or a mapping
            of arrays a sample.
        flops: dense over pruned, above 1: the method's parameters are a shape, and one factor is found at which that data costs this ratio,
            without learning; the manifest's ``fitted`` says how. See docs/decisions/0027.
        static_quantile: the share of those samples that must fit.
        tune: build what lowering and form leave open, time it, and take the fastest; the figures stand in the manifest's ``measured``.
        lengths: a ladder, as ``buckets``, that the length of an input is rounded up to; refused where padding is not proved to change
            nothing.
        prime: put inputs of that data into the bundle that ``load`` runs, so that shapes like theirs are not new to the runtime later.
        copies: of the engine, opened by ``load``, each for inputs of other lengths: faster where a change of shape costs, for their memory.
        batch: ``one`` or ``ragged``, see ``lower``.
        precision: ``fp32``; a backend may have more.
        dense: the unpruned model, where the pruned one does not bring its own.
        checkpoint: weights for a ``timm/NAME``.
        assume_masked: as ``lower`` takes it.
        skip_below: leave sites masked that save less than this share of the cost (docs/optimize.md); 0 keeps every site.
        dims: dim name -> least, usual and largest size the engine must take, such as ``{"seq": (4, 64, 128)}``; default: what the
            model takes.
        capabilities: GPUs to build for, such as ``("sm86", "sm89")``; for ``tensorrt-rtx``.
        force: replace an existing bundle.
        dump_ir: folder for the text of every stage.
        progress: called before every step.

    Raises:
        TpcompileError: see ``tpcompile.errors``.
    """
    runtime = backend(target)
    wish = Wish(
        lowering=lowering, form=form, buckets=tuple(buckets), calibrate=calibrate, quantile=static_quantile, tune=tune,
        lengths=tuple(lengths), prime=prime, copies=copies, dims=dict(dims or {}), profiled=runtime.profiled, fits=flops is not None,
    )  # fmt: skip
    if copies > 1:
        copier(target)
    if flops is not None:
        check_target(flops)
    named = runtime.targets(precision, capabilities)
    if dump_ir is not None and Path(dump_ir).resolve().is_relative_to(Path(out).resolve()):
        raise UsageError(f"the dump {dump_ir} would lie inside the bundle {out}", fix="dump to another folder")
    say = _Steps(progress)
    _demand(runtime)
    with bundles.stage(out, force) as folder:  # first: an existing output is refused before any work
        say("load")
        subject = subject_of(model, inputs, dynamic, method, parameters, pooling, dense, batch, _path(checkpoint))
        subject = replace(subject, assume_masked=tuple(assume_masked), skip_below=skip_below)
        if flops is not None:
            subject = _fitted(folder, subject, flops, calibrate, wish.dims, progress)
        with sparing_collector():
            fill(folder, compile_subject(subject, dump_ir, say), target, precision, say, wish, named)
    return bundles.read(out)


def fit(model: Model, flops: float, data: Data | None = None, inputs: Mapping[str, Tensor] | None = None, *,
        dynamic: Dynamic | None = None, method: str | None = None, parameters: Mapping[str, Any] | None = None, pooling: str = "auto",
        batch: str = "one", checkpoint: str | Path | None = None, assume_masked: Sequence[str] = (),
        progress: Progress | None = None) -> Recipe:  # fmt: skip
    """Fit a method to a FLOPs ratio without exporting: the recipe that ``export`` with ``flops`` would come to.

    Args:
        model: dense, with ``method``, or what ``tpcompile.models.prune`` made.
        flops: dense over pruned, above 1; see ``export``.
        data: what ``export`` calls ``calibrate``.
        inputs: example tensors by parameter name; a model directory brings its own.
        dynamic: per input, dim -> name.
        method: the pruning method.
        parameters: of the method: the shape.
        pooling: of a bare encoder directory.
        batch: ``one`` or ``ragged``; samples are run one by one either way.
        checkpoint: weights for a ``timm/NAME``.
        assume_masked: as ``lower`` takes it.
        progress: called before every run of the data.

    Raises:
        UsageError: the method has no dial, the ratio cannot be reached, or there is no data.
    """
    check_target(flops)
    subject = subject_of(model, inputs, dynamic, method, parameters, pooling, batch=batch, checkpoint=_path(checkpoint))
    subject = replace(subject, assume_masked=tuple(assume_masked))
    with TemporaryDirectory() as folder:
        subject = _fitted(Path(folder), subject, flops, data, {}, progress)
    pruned, facts = subject.pruned, subject.fitted
    note = f"Fitted, not learned: {facts.text()}." if facts is not None else None
    return Recipe(method=pruned.method, parameters=pruned.method_parameters, model=subject.info.id, note=note)


def _fitted(folder: Path, subject: Subject, flops: float, data: Data | None, dims: Mapping[str, tuple[int, int, int]],
            progress: Progress | None) -> Subject:  # fmt: skip
    """The subject at an operating point; its data is read by way of a folder that takes tokenizer and preprocessing."""
    moved = subject.pruned.moves[0].partition(".")[0]
    subject.carry(folder)
    takes = replace(subject.takes, dims={**subject.ranges, **{dim: (least, most) for dim, (least, _, most) in dims.items()}})
    fix = f"give real inputs (--calibrate F or --data F; in Python, also a mapping of arrays a sample), or {moved} of your own and no ratio"
    name, rows = calibration(folder, subject, data, takes, "a FLOPs ratio is fitted on data", fix)
    return fit_subject(subject, flops, rows, name, progress)


def bench(path: str | Path, against: str | Path = "dense", data: str | Path | None = None, samples: int | None = None,
          repeats: int = 4, threads: int = 1, slo: str | None = None, min_speedup: float | None = None, min_effect: float = EFFECT,
          confidence: float = 0.95, truncate: bool = False, batch: int | None = None, group: str = "stream", workers: int = 1,
          attribute: bool = False, progress: Progress | None = None) -> Latency:  # fmt: skip
    """Time a bundle against its dense baseline or another bundle on real inputs, interleaved; see ``tpcompile.timing.latency``.

    Args:
        path: the bundle.
        against: ``dense``, or another bundle.
        data: see ``validate``.
        samples: at most this many.
        repeats: times that fresh engines, each in a process of its own, run the data cold and warm.
        threads: per engine.
        slo: such as ``p95<=8ms``.
        min_speedup: such as 1.3.
        min_effect: smallest difference, as a share, that is called faster or slower.
        confidence: of the verdict.
        truncate: as for ``validate``.
        batch: samples an inference, default 1: what is timed is the batch.
        group: how samples make batches: ``stream``, in their own order, or ``length``, similar lengths together.
        workers: callers at once; more than 1 measures that too.
        attribute: profile both engines: where the time goes, and from where on pruning should pay.
        progress: called per pass.
    """
    found = bundles.read(path)
    _choose("group", group, ("stream", "length"))
    size = batch_of(found, batch, 1)
    own = str(against) == "dense"
    other = found.dense if own else bundles.read(against)
    if other is None:
        raise UsageError(f"{path} has no dense baseline", fix="pass --against with another bundle")
    rows = samples_of(found, data, samples, "docstrings:stream", truncate)
    groups = [[rows[i] for i in indices] for indices in batches(rows, size, by_length=group == "length")]
    stream = [Sample("", collate(rows), tokens=max(row.length for row in rows)) for rows in groups]
    gate = None if slo is None else Slo.parse(slo)
    twin, kept = other.path, cache(lambda: counts(path, groups) if own else [])
    with apart([one.inputs for one in stream], threads) as opener:
        latency = measure_latency(
            opener(found.path), opener(twin), stream, repeats,
            confidence=confidence, min_speedup=min_speedup, min_effect=min_effect, slo=gate, threads=threads,
            flops=found.manifest.flops if own else None, counts=kept,
            progress=progress and (lambda done, total: progress(f"time {len(rows)} samples by {size}, passes", done, total)),
        )  # fmt: skip
    if workers > 1:
        both = (lambda: load(twin, threads=threads, callers=workers), lambda: load(path, threads=threads, callers=workers))
        latency = replace(latency, load=crowd(*both, stream, workers, threads, repeats, confidence))
    if attribute:
        times = (np.median(one, axis=0) for one in latency.warm.times.ruler)
        latency = replace(
            latency, attribution=find_attribution(found, other, stream, kept(), threads, (next(times), next(times)))
        )
    found.report("bench", latency.to_json())
    return latency


def report(path: str | Path, data: str | Path | None = None, samples: int | None = None, out: str | Path | None = None,
           truncate: bool = False, batch: int | None = None, threads: int = 1, progress: Progress | None = None) -> Path:  # fmt: skip
    """Validate and time a bundle, and show both in one HTML file, with what was kept of a few samples drawn over them.

    Args:
        path: the bundle; or a folder of bundles: each that has no reports yet gets them, and one page compares all.
        data: see ``validate``.
        samples: at most this many.
        out: the file to write; default ``reports/report.html`` in the bundle, ``overview.html`` in a folder of them.
        truncate: as for ``validate``.
        batch: samples an inference.
        threads: per engine, for the timing.
        progress: called per phase.

    Returns:
        The file.
    """
    if Path(path).is_dir() and not (Path(path) / overview.MANIFEST).exists():
        return _overview(
            Path(path), out, data=data, samples=samples, truncate=truncate, batch=batch, threads=threads, progress=progress
        )
    found = bundles.read(path)
    parity = validate(path, data, samples, truncate=truncate, batch=batch, progress=progress)
    told = isinstance(backend(found.manifest.target), Profiler)
    latency = bench(
        path, data=data, samples=samples, truncate=truncate, batch=batch, threads=threads, attribute=told, progress=progress
    )
    seen = traces(path, samples_of(found, data, samples, "docstrings:report", truncate))
    page = ReportData(
        found.manifest.model.id, (EngineRun(found.manifest, parity, latency),), seen, tuple(filter(None, [found.manifest.note]))
    )
    return write_report(page, Path(out) if out is not None else found.path / "reports" / "report.html")


def _overview(folder: Path, out: str | Path | None, **options: Any) -> Path:
    """A page for a folder of bundles."""
    found = overview.bundles_in(folder)
    for one in found:
        if not overview.measured(one):
            report(one.path, **options)
    page = Path(out) if out is not None else folder / "overview.html"
    return overview.write_overview([overview.entry(one, folder) for one in found], page, f"Bundles in {folder.resolve().name}")


def traces(path: str | Path, rows: Sequence[Sample]) -> tuple[WordTrace, ...] | tuple[PatchTrace, ...]:
    """What every site kept of the first few samples that can be drawn: texts of moderate length, images, or spectrograms."""
    found = bundles.read(path)
    patches = found.manifest.patches
    with load(path) as engine:
        if patches is not None:
            pictured = (row if row.picture is not None else replace(row, picture=spectrogram.picture(row.inputs)) for row in rows)
            shown = [row for row in pictured if row.picture is not None][:SHOWN]
            return tuple(trace_patches(row, engine.kept(**row.inputs)[1], patches.spec) for row in shown)
        texts = [row for row in rows if row.text and row.length <= LEGIBLE[1]]
        longer = [row for row in texts if row.length >= LEGIBLE[0]] or texts
        return tuple(trace_words(row, engine.kept(**row.inputs)[1]) for row in longer[:SHOWN])


def counts(path: str | Path, groups: Sequence[Sequence[Sample]]) -> list[Counts]:
    """What the engine keeps of every sample of every batch; asked after the timing, so that neither engine has seen a shape before."""
    found = []
    with load(path) as engine:
        for group in groups:
            _, kept = engine.kept_each(**collate(group))
            held = max(row.length for row in group)
            found += [Counts(row.length, k.counts, k.stored, held) for row, k in zip(group, kept, strict=True)]
    return found


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}", fix=f"use one of: {', '.join(known)}")


def _demand(runtime: Backend) -> None:
    found = runtime.probe()
    if not found.ok:
        raise BackendUnavailable(found.reason, fix=found.fix)


class _Steps:
    """Passes the steps of an export on, numbered."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done = progress, 0

    def __call__(self, step: str) -> None:
        if self.progress is not None:
            self.progress(step, self.done, STEPS)
        self.done += 1
