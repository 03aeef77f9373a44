"""Where does an engine leave its model? By layer for a bundle, by pass for a model; see ``layers`` and ``passwise``."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from tpcompile import bundle as bundles
from tpcompile.bundle import MANIFEST, Bundle
from tpcompile.capture import Dynamic, capture
from tpcompile.compare.cutout import cut_out
from tpcompile.compare.findings import FOUND, UNCLEAR, Bisection, Culprit, Step, notes, nothing, off, worst
from tpcompile.compare.layers import Found, locate
from tpcompile.compare.passwise import bisect_passes
from tpcompile.compare.watch import Batch, Law, Seen, Side, engine_side, judge, observe, reference_side
from tpcompile.data.feeds import wants
from tpcompile.data.probes import Wants, apart, gather, groups
from tpcompile.data.samples import Sample
from tpcompile.data.tensors import vacant
from tpcompile.engine import check
from tpcompile.errors import UsageError
from tpcompile.manifest import Manifest
from tpcompile.passes import Pipeline, pipeline
from tpcompile.proof.difference import NOISE, TOLERANCE
from tpcompile.subject import Subject, subject_of

Progress = Callable[[str, int, int], None]
Model = nn.Module | ExportedProgram | str | Path
MODES = ("auto", "layer", "stage", "pass")
SAMPLES = 8
TOGETHER = 4
"""Samples an inference where the batch is ragged: enough for lengths and counts to differ."""


def bisect(subject: Model, inputs: Mapping[str, Tensor] | None = None, *, mode: str = "auto", against: str | Path = "masked",
           data: str | Path | None = None, samples: int = SAMPLES, atol: float | None = None, truncate: bool = False,
           batch_size: int | None = None, out: str | Path | None = None, dynamic: Dynamic | None = None,
           method: str | None = None, parameters: Mapping[str, Any] | None = None, pooling: str = "auto", batch: str = "one",
           checkpoint: str | Path | None = None, assume_masked: Sequence[str] = (),
           passes: Pipeline | None = None, progress: Progress | None = None) -> Bisection:  # fmt: skip
    """Find where a bundle's engine leaves its reference by layer, or after which pass a model's program leaves the captured one.

    Args:
        subject: a bundle; or a model as ``tpcompile.lower`` takes it.
        inputs: of a module, example tensors by name.
        mode: ``layer`` for a bundle, ``stage`` for one in stages, ``pass`` for a model; ``auto`` is the one that fits.
        against: of a bundle: ``masked``, its reference, or another bundle of the same model.
        data: see ``tpcompile.data.load.load_data``; default: what ``tpcompile.data.probes`` finds or makes up, of several lengths.
        samples: at most this many.
        atol: tolerance instead of the bundle's own, or of 1e-5.
        truncate: cut texts that are too long.
        batch_size: samples an inference; default 1, or 4 where the batch is ragged.
        out: of a bundle: a folder to write the part at fault to, as a model of its own with a script.
        dynamic: of a module: per input, dim -> name.
        method: of a model: pruning method.
        parameters: of the method.
        pooling: of a model directory.
        batch: of a model: ``one`` or ``ragged``.
        checkpoint: weights for a ``timm/NAME``.
        assume_masked: as ``tpcompile.lower`` takes it.
        passes: instead of the whole pipeline.
        progress: called per step, with its name, number, and how many there are.

    Raises:
        UsageError: options that do not belong together, nothing there, data that does not fit.
        IntegrityError: a bundle's file is not what its manifest says.
        TpcompileError: a pass refuses the model, and none before it is at fault.
    """
    if mode not in MODES:
        raise UsageError(f"unknown mode {mode!r}", fix=f"use one of: {', '.join(MODES)}")
    if isinstance(subject, (str, Path)) and (Path(subject) / MANIFEST).exists():
        if mode == "pass":
            fix = "tpcompile bisect -m MODEL --method M ..., or leave --mode out"
            raise UsageError("a bundle holds no module to run the passes on", fix=fix)
        if method or parameters or checkpoint or assume_masked:
            raise UsageError(
                "a method, its parameters and a checkpoint describe a model; a bundle needs none", fix="leave them out"
            )
        return bisect_bundle(subject, against, data, samples, atol, truncate, batch_size, out, mode, progress)
    if mode in ("layer", "stage") or out is not None or str(against) != "masked":
        raise UsageError("layers are compared in a bundle's engine", fix="tpcompile export ... -o DIR, then tpcompile bisect DIR")
    found = subject_of(
        subject, inputs, dynamic, method, parameters, pooling, None, batch, None if checkpoint is None else Path(checkpoint)
    )
    steps = passes if passes is not None else pipeline(batch, assume_masked)
    name = str(subject) if isinstance(subject, (str, Path)) else found.info.id
    return bisect_model(name, found, steps, data, samples, atol, truncate, batch_size, progress)


# --- by pass ----------------------------------------------------------------------------------------------------------------


def bisect_model(
    name: str, subject: Subject, passes: Pipeline, data: str | Path | None = None, samples: int = SAMPLES, atol: float | None = None,
    truncate: bool = False, batch_size: int | None = None, progress: Progress | None = None,
) -> Bisection:  # fmt: skip
    """Find the first pass after which a model's program differs from the captured one; see ``bisect``."""
    captured = capture(subject.model, subject.inputs, subject.dynamic, subject.ranges)
    ragged = subject.batch == "ragged"
    examples = apart({spec.name: subject.inputs[spec.name].numpy() for spec in captured.inputs}, ragged)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subject.carry(folder)
        wants = Wants(captured.inputs, captured.dims, subject.values, folder, subject.patches, examples)
        rows = gather(wants, samples, data, truncate)
    batches = _batches(rows, ragged, batch_size)
    return bisect_passes(name, captured, passes, rows, batches, Law(TOLERANCE if atol is None else atol, NOISE), progress)


def _batches(rows: Sequence[Sample], ragged: bool, size: int | None) -> list[Batch]:
    if size is not None and size > 1 and not ragged:
        raise UsageError("the program takes one sample an inference", fix="use --batch ragged, or leave --batch-size out")
    cuts = groups(rows, size or (TOGETHER if ragged else 1))
    return [Batch(tuple(cut), tuple(rows[i] for i in cut)) for cut in cuts]


# --- by layer ---------------------------------------------------------------------------------------------------------------


def bisect_bundle(
    path: str | Path, against: str | Path = "masked", data: str | Path | None = None, samples: int = SAMPLES, atol: float | None = None,
    truncate: bool = False, batch_size: int | None = None, out: str | Path | None = None, mode: str = "auto",
    progress: Progress | None = None,
) -> Bisection:  # fmt: skip
    """Find the first layer of a bundle's engine that differs from the reference; see ``bisect``."""
    found = bundles.read(path)
    found.verify()
    target = None if out is None else Path(out)
    if target is not None:
        vacant(target)
    other = None if str(against) == "masked" else _other(found, Path(against))
    manifest, ragged = found.manifest, found.manifest.batch == "ragged"
    if mode == "stage" and manifest.form != "staged":
        raise UsageError(f"{path} is one graph, without stages", fix="leave --mode out")
    rows = gather(wants(found), samples, data, truncate)
    for row in rows:
        check(row.inputs, manifest)
    batches = _batches(rows, ragged, batch_size)
    law = _law([manifest] if other is None else [manifest, other.manifest], atol)
    sides = engine_side(found), reference_side(found) if other is None else engine_side(other)
    kind = "stage" if manifest.form == "staged" and mode != "layer" else "layer"
    return _layers(found, sides, rows, batches, law, target, kind, progress or (lambda what, done, total: None))


def _law(manifests: Sequence[Manifest], atol: float | None) -> Law:
    """The tolerances that every one of these engines keeps."""
    tolerance, noise = (max(m.tolerance.get(k, v) for m in manifests) for k, v in (("parity", TOLERANCE), ("noise", NOISE)))
    return Law(tolerance if atol is None else atol, noise)


def _other(found: Bundle, path: Path) -> Bundle:
    """Another bundle of the same model.

    Raises:
        UsageError: it takes other inputs, or has other sites.
    """
    other = bundles.read(path)
    other.verify()
    for what in ("inputs", "outputs", "sites"):
        if [one.name for one in getattr(found.manifest, what)] != [one.name for one in getattr(other.manifest, what)]:
            raise UsageError(f"{path} has other {what} than {found.path}", fix="compare two bundles of one model")
    return other


def _layers(
    found: Bundle, sides: tuple[Side, Side], rows: Sequence[Sample], batches: Sequence[Batch], law: Law, out: Path | None, mode: str,
    progress: Progress,
) -> Bisection:  # fmt: skip
    along, seen = found.manifest.along, []
    for number, side in enumerate(sides):
        progress("run samples", number, len(sides))
        seen.append(observe(side, batches, along))
    progress("run samples", len(sides), len(sides))
    judged = judge(batches, seen[0], seen[1], seen[1], law)
    name, against, bad = str(found.path), sides[1].name, worst(judged)
    records = notes(rows, judged)
    if bad is None:
        return nothing(name, mode, against, law.tolerance, records)
    what = f"{off(bad)} in sample {bad.number}"
    blind = next((side.blind for side in sides if side.blind), "")
    if blind:
        return Bisection(name, mode, against, "INCONCLUSIVE", f"{what}, and {blind}", UNCLEAR, law.tolerance, records)
    numbers = {one.number for one in judged if one.verdict == "differs"}
    chosen = [i for i, batch in enumerate(batches) if numbers & {*batch.numbers}]
    picked = [batches[i] for i in chosen], ([seen[0][i] for i in chosen], [seen[1][i] for i in chosen])
    inner = locate(*sides, *picked, law, partial(progress, "compare values"))
    reason = _unclear(inner, sides[0])
    if reason:
        return Bisection(
            name, mode, against, "INCONCLUSIVE", f"{what}, {reason}", UNCLEAR, law.tolerance, records,
            compared=inner.compared, skipped=inner.skipped,
        )  # fmt: skip
    homes = sides[0].homes if mode == "stage" else {}
    culprit, *others = (Culprit.of(root, homes.get(root.name, "")) for root in inner.roots)
    if out is not None:
        _write(out, sides, inner, batches, (seen[0], seen[1]))
    blame = f"; of its weights {', '.join(culprit.weights)}" if culprit.weights else ""
    return Bisection(
        name, mode, against, "FAILED", f"{what}; first inner value that differs: {culprit}{blame}", FOUND, law.tolerance, records,
        tuple(_stages(homes, inner, law)), culprit, tuple(others), inner.compared, inner.skipped, str(out or ""),
    )  # fmt: skip


def _stages(homes: Mapping[str, str], inner: Found, law: Law) -> Iterator[Step]:
    """Each stage, and the gathers before it, with the value in it that differs most."""
    for home in dict.fromkeys(homes.values()):
        inside = {name: gap for name, gap in inner.gaps.items() if homes.get(name) == home}
        far = max(inside, key=lambda name: inside[name].required, default="")
        if far:
            gap = inside[far]
            yield Step(home, "differs" if gap.required > law.tolerance else "equal", gap.sample, far, gap.max_abs)


def _unclear(inner: Found, side: Side) -> str:
    """Why the fault cannot be found inside; empty where it is."""
    if not inner.roots:
        return "but the engine agrees as soon as its inner values are watched: the runtime computes it otherwise when nothing watches"
    if inner.compared <= len(side.outputs) + len(side.taps):
        return "and no inner value has a name that both sides know: export the bundle again with this version of tpcompile"
    return ""


def _write(
    out: Path,
    sides: tuple[Side, Side],
    inner: Found,
    batches: Sequence[Batch],
    seen: tuple[Sequence[Seen], Sequence[Seen]],
) -> None:
    root = inner.roots[0]
    number = next(i for i, batch in enumerate(batches) if root.gap.sample in batch.numbers)
    cut_out(out, root, inner.dims[root.name], sides, batches[number], (seen[0][number], seen[1][number]))
