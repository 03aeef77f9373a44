"""From a subject to a sealed bundle: compile once, build any number of targets from it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tpcompile import bundle as bundles
from tpcompile.backends import Backend, Extent, backend
from tpcompile.bundle import Vector
from tpcompile.calibration import TOKENS, calibration, grouped
from tpcompile.capture import capture
from tpcompile.compat import return_memory
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample, collate
from tpcompile.errors import AxisError, UsageError
from tpcompile.kept import compose
from tpcompile.manifest import StageInfo
from tpcompile.onnx.emit import OnnxModel, emit
from tpcompile.onnx.quant import GRIDS
from tpcompile.onnx.quantised import Feeds, write_quantised
from tpcompile.onnx.stages import Chain, cut
from tpcompile.passes import SQUARE, Canonicalize, Dump, Hoist, Place, Recognise, pipeline
from tpcompile.passes.base import GraphPass, Hook
from tpcompile.passes.cost import Polynomial, polynomial
from tpcompile.passes.dense import KeepAll
from tpcompile.passes.optimize.narrow import Trim
from tpcompile.passes.padding import Padding, prove_padding
from tpcompile.plan import AUTO, Plan, Wish, behind_sites, candidates, narrow, settle
from tpcompile.prime import prime
from tpcompile.program import Program
from tpcompile.record import accepted, record, record_dense
from tpcompile.spec import TensorSpec
from tpcompile.subject import Subject
from tpcompile.tune import MARGIN, Trial, choose, tune

OBSERVED = 32
"""Samples that show the range of activations, for 8 bits."""
TUNED = 40
"""Samples that candidates are timed on."""
Calibration = Callable[[], tuple[str, list[Sample]]]
"""Gives data of the kind the engine will meet, with its name."""


@dataclass(frozen=True)
class Compiled:
    """One model as everything a bundle holds; any number of targets can be built from it.

    Attributes:
        subject: what was compiled.
        placed: masked form, the reference.
        compact: gathered form, the engine.
        dense: the baseline.
        work: FLOPs of the dense model as the library has it; empty where ``placed`` tells them.
        found: captured form with its sites.
        saved: ``placed`` with what saves work, rows not fetched yet.
        dump: told every step of what is made of it.
        written: engines that store exactly what is kept, as ONNX: with every op on one count, and without.
    """

    subject: Subject
    placed: Program
    compact: Program
    dense: Program
    work: Polynomial = ()
    found: Program | None = None
    saved: Program | None = None
    dump: Hook | None = None
    written: dict[bool, OnnxModel] = field(default_factory=dict, repr=False)

    @cached_property
    def square(self) -> Program:
        """``compact`` with every op on one count, where it can be (docs/decisions/0029)."""
        return self.compact if self.saved is None or self.compact.gathered else SQUARE(self.saved, self.dump)

    def compacted(self, plan: Plan) -> Program:
        """What a plan is made of, before it says how many rows a site stores."""
        return self.square if plan.square else self.compact

    def lowered(self, plan: Plan) -> Program:
        """What is built of it."""
        return plan.step(self.compacted(plan))

    def engine(self, plan: Plan) -> OnnxModel:
        """The same as ONNX; without ladder and constant counts it is kept, for all targets."""
        if plan.buckets or plan.counts:
            return emit(self.lowered(plan))
        if plan.square not in self.written:
            self.written[plan.square] = emit(self.lowered(plan))
        return self.written[plan.square]

    @cached_property
    def padding(self) -> Padding:
        """The proof that inputs may be padded.

        Raises:
            UsageError: the model has no attention mask, or gathers by itself.
            AxisError: there is no proof; the reason, at the user's line.
        """
        if self.found is None or self.found.gathered:
            raise UsageError("a model that gathers by itself: its padding is not looked into", fix="leave the lengths out")
        return prove_padding(self.found, self.subject.batch)

    @property
    def padded(self) -> bool:
        """Whether there is that proof."""
        try:
            return bool(self.padding.mask)
        except (AxisError, UsageError):
            return False

    @cached_property
    def twin(self) -> OnnxModel:
        """``dense`` as ONNX."""
        return emit(self.dense)

    @cached_property
    def reference(self) -> OnnxModel:
        """``placed`` as ONNX."""
        return emit(self.placed)


def compile_subject(
    subject: Subject, dump_ir: str | Path | None = None, say: Callable[[str], None] = lambda step: None
) -> Compiled:
    """Capture, prove and compact: all that does not depend on a target.

    Args:
        subject: see ``tpcompile.subject.subject_of``.
        dump_ir: folder for the text of every stage.
        say: called before every step with its name.
    """
    say("capture")
    captured = capture(subject.model, subject.inputs, subject.dynamic, subject.ranges)
    after_pass: dict[str, Program] = {}

    say("prove and compact")
    with Dump(Path(dump_ir)) if dump_ir else nullcontext() as dump:

        def watch(step: GraphPass, before: Program, after: Program, seconds: float) -> None:
            after_pass[step.name] = after
            if dump is not None:
                dump(step, before, after, seconds)

        compact = pipeline(subject.batch, subject.assume_masked, skip_below=subject.skip_below)(captured, watch)
    say("dense baseline")
    work: Polynomial = ()
    if subject.dense is not None:
        plain = capture(subject.dense, subject.inputs, subject.dynamic, subject.ranges)
        dense = Canonicalize("whole")(plain)
        if compact.gathered:  # what merging costs is no work of the dense model; attention that is one op counts as its products
            work = polynomial(Canonicalize()(plain))
    else:
        dense = KeepAll()(after_pass[Recognise.name])
        work = polynomial(dense) if compact.gathered else ()
    dense = Trim()(dense)
    if dense.output_names != compact.output_names:
        raise UsageError(
            f"dense gives {', '.join(dense.output_names)}, pruned gives {', '.join(compact.output_names)}",
            fix="pass a dense model with the same outputs",
        )
    placed = after_pass[Place.name]  # as the method has it: later passes save more than the paper counts
    return Compiled(subject, placed, compact, dense, work, after_pass[Recognise.name], after_pass[Hoist.name], dump)


def fill(
    folder: Path,
    compiled: Compiled,
    target: str,
    precision: str = "fp32",
    say: Callable[[str], None] = lambda step: None,
    wish: Wish = AUTO,
    capabilities: Sequence[str] = (),
) -> Plan:
    """Build a target's engines into a staged folder and seal it.

    Args:
        folder: from ``tpcompile.bundle.stage``.
        compiled: the model.
        target: of the engines.
        precision: of the engine.
        say: called before every step with its name.
        wish: the lowering and form asked for.
        capabilities: compute capabilities to build for; none: the backend's own choice.

    Returns:
        What was built, and why.
    """
    runtime, subject = backend(target), compiled.subject
    sizes = _sizes(subject)
    extent = Extent(narrow(compiled.compact.dims, wish.dims, sizes), tuple(capabilities))
    _admit(sizes, extent)
    for part in (folder, folder / "dense"):
        part.mkdir(exist_ok=True)
        subject.carry(part)
    found = cache(lambda: _calibration(folder, compiled, wish, precision, extent, say))
    if wish.copies > 1 and not compiled.compact.dims:
        raise UsageError("copies are for inputs of several lengths, and this model takes one", fix="leave the copies out")
    if wish.lengths:
        say("prove that padding changes nothing")
        _ = compiled.padding
    takes = accepted(compiled, extent)
    shown = [takes.check(feed) for feed in grouped(found()[1], subject.batch)] if wish.prime else []  # before anything is built
    say("write ONNX")
    twin, reference = compiled.twin, compiled.reference
    plan, trials = _plan(folder, compiled, target, precision, say, wish, found, extent, shown)
    feeds = _observed(precision, found, subject)
    lowered = compiled.lowered(plan)
    say("build dense")  # first: with constant sizes a runtime needs the most memory, and now the least is held
    _build(runtime, twin, folder / "dense", precision, extent, feeds)
    say("build engine")
    outputs, stages = _engine(runtime, compiled, plan, folder, precision, extent, feeds)
    (folder / "reference").mkdir()
    reference.save(folder / "reference" / "model.onnx")
    say("test vectors")
    truth = lowered if plan.counts else compiled.placed  # beyond constant counts the masked program says something else
    bundles.write_vectors(folder / "vectors" / "vectors.safetensors", _vectors(truth, folder, subject, extent))
    say("seal")
    measured: dict[str, Any] = {"tune": [trial.to_json() for trial in trials]} if trials else {}
    made = record(compiled, target, precision, plan, outputs, extent)
    common = made.model_copy(update={"stages": stages, "measured": measured, "copies": wish.copies})
    common = prime(folder, lowered, common, shown, plan.square)
    bundles.seal(folder / "dense", record_dense(common, compiled.dense, twin))
    bundles.seal(folder, common)
    return plan


def _observed(precision: str, found: Calibration, subject: Subject) -> Feeds:
    """What shows the range of activations; nothing where no precision asks."""
    return grouped(found()[1][:OBSERVED], subject.batch) if precision in GRIDS else ()


def _plan(
    folder: Path,
    compiled: Compiled,
    target: str,
    precision: str,
    say: Callable[[str], None],
    wish: Wish,
    found: Calibration,
    extent: Extent,
    shown: Sequence[Mapping[str, np.ndarray]],
) -> tuple[Plan, list[Trial]]:
    """The plan, and what was measured to find it."""
    plans = (
        candidates(wish, target, compiled.compact, found, lambda: len({row.length for row in found()[1]}) > 1 and compiled.padded)
        if wish.tune
        else []
    )
    if len(plans) < 2:
        return settle(wish, target, compiled.compact, found), []
    name, rows = found()
    say("tune")
    timed = shown[1::2] or grouped(rows[:TUNED], compiled.subject.batch)  # what load runs shows nothing of inputs to come
    feeds = timed[:: -(-len(timed) // TUNED)]
    observed = _observed(precision, found, compiled.subject)

    def build(one: Plan, out: Path) -> None:
        trial(out, compiled, target, precision, one, extent, observed, wish.copies, shown[::2])

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        trials = tune(plans, build, Path(scratch), feeds)
    taken, count = choose(trials).plan, sum(len(next(iter(feed.values()))) for feed in feeds)
    reason = f"measured: of {len(plans)} what costs least, its load included, within {MARGIN:.0%}, on {count} samples of {name}"
    if taken == plans[0]:
        reason = f"measured: none of {len(plans) - 1} others costs {MARGIN:.0%} less, its load included, on {count} samples of {name}"
    return replace(taken, reason=reason), trials


def trial(
    folder: Path, compiled: Compiled, target: str, precision: str, plan: Plan, extent: Extent | None = None, feeds: Feeds = (),
    copies: int = 1, shown: Feeds = (),
) -> None:  # fmt: skip
    """Build an engine and nothing else into an empty folder, sealed: enough to load it and to time it.

    Args:
        folder: for the engine.
        compiled: the model.
        target: of the engine.
        precision: of the engine.
        plan: what is built.
        extent: what the engine must fit; none: all that the model takes.
        feeds: inputs that show the range of activations, for 8 bits.
        copies: of the engine, that are opened.
        shown: inputs that show the sizes to come, for what ``load`` runs.
    """
    extent = extent or Extent(narrow(compiled.compact.dims, {}, _sizes(compiled.subject)))
    outputs, stages = _engine(backend(target), compiled, plan, folder, precision, extent, feeds)
    made = record(compiled, target, precision, plan, outputs, extent)
    common = made.model_copy(update={"stages": stages, "copies": copies})
    bundles.seal(folder, prime(folder, compiled.lowered(plan), common, shown, plan.square))


def _sizes(subject: Subject) -> dict[str, int]:
    """The example's size of every dynamic dim."""
    return {str(size): subject.inputs[name].shape[dim] for name, dims in subject.dynamic.items() for dim, size in dims.items()}


def _admit(example: Mapping[str, int], extent: Extent) -> None:
    """Refuse a range of sizes that leaves out the example: what a model was traced with must fit its engine."""
    for name, (least, _, most) in extent.sizes.items():
        if not least <= example.get(name, least) <= most:
            raise UsageError(
                f"the example has {name} = {example[name]}; the range asked for is {least} to {most}",
                fix="give a range that holds the example, or another example",
            )


def _engine(
    runtime: Backend, compiled: Compiled, plan: Plan, folder: Path, precision: str, extent: Extent, feeds: Feeds
) -> tuple[tuple[TensorSpec, ...], tuple[StageInfo, ...]]:
    """Build the engine of a plan; what it gives, and its stages."""
    if plan.form == "staged":
        chain = cut(emit(compiled.lowered(plan), hosted=True))
        fitted = replace(extent, sizes={**extent.sizes, **_behind(chain, plan, extent)})
        _build_chain(runtime, chain, folder, precision, fitted, feeds)
        return chain.outputs, chain.stages
    model = compiled.engine(plan)
    _build(runtime, model, folder, precision, extent, feeds)
    return model.outputs, ()


def _behind(chain: Chain, plan: Plan, extent: Extent) -> dict[str, tuple[int, int, int]]:
    """The ranges of what sites store, as the stages name them."""
    keeps = [tensor for stage in chain.stages for tensor in stage.outputs if tensor.name.endswith(".keep")]
    size = keeps[0].shape[1]
    least, _, most = (size, size, size) if isinstance(size, int) else extent.sizes[size]
    return behind_sites((least, most), plan, len(keeps))


def _calibration(
    folder: Path, compiled: Compiled, wish: Wish, precision: str, extent: Extent, say: Callable[[str], None]
) -> tuple[str, list[Sample]]:
    """Data to calibrate on, and what it is called; see `calibration`."""
    say("calibrate")
    return calibration(folder, compiled.subject, wish.calibrate, accepted(compiled, extent), needed(wish, precision))


def needed(wish: Wish, precision: str) -> str:
    """What needs data; usual counts do not, they are taken from data that is given."""
    reasons = (
        (wish.tune, "tuning times real inputs"),
        (wish.lowering == "static", "constant counts are taken from data"),
        (precision in GRIDS, "8-bit ranges are taken from data"),
        (wish.prime, "priming runs real inputs"),
    )
    return next((text for asked, text in reasons if asked), "usual counts are taken from data")


def _tokens(extent: Extent) -> tuple[int, int] | None:
    """Least and most tokens of a text; None where the length is fixed."""
    sizes = extent.sizes.get("seq")
    return None if sizes is None else (sizes[0], sizes[2])


def _build(runtime: Backend, model: OnnxModel, out: Path, precision: str, extent: Extent, feeds: Feeds) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        path = Path(scratch) / "model.onnx"
        model.save(path)
        if precision in GRIDS:
            write_quantised(Path(scratch), (), model.outputs, feeds, precision)
        runtime.build(path, out, precision, extent=extent)
    return_memory()


def _build_chain(runtime: Backend, chain: Chain, out: Path, precision: str, extent: Extent, feeds: Feeds) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        paths = chain.save(Path(scratch))
        if precision in GRIDS:
            write_quantised(Path(scratch), chain.stages, chain.outputs, feeds, precision)
        for number, path in enumerate(paths):
            runtime.build(path, out, precision, stage=number, extent=extent)


def _vectors(truth: Program, folder: Path, subject: Subject, extent: Extent) -> list[Vector]:
    """A few inputs with the program's own answers: real texts where there is a tokenizer, and the example."""
    given: list[Mapping[str, np.ndarray]] = [{name: value.numpy() for name, value in subject.inputs.items()}]
    if (folder / "tokenizer.json").is_file():
        least, longest = _tokens(extent) or TOKENS
        texts = [text for text in load_data(None, folder, longest, 4, names=tuple(subject.inputs)) if text.length >= least]
        given += [collate(texts)] if subject.batch == "ragged" and texts else [text.inputs for text in texts]
    rows = []
    for inputs in given:
        trace = truth.trace(**inputs)
        taps = {name: tap.numpy() for name, tap in trace.taps.items()}
        samples, length = trace.keep[0].shape
        each = [compose({n: v[b : b + 1] for n, v in taps.items()}, len(trace.keep), length) for b in range(samples)]
        masks, scores = (
            tuple(map(np.stack, zip(*part, strict=True))) for part in ((k.masks for k in each), (k.scores for k in each))
        )
        rows.append(Vector(dict(inputs), {name: value.numpy() for name, value in trace.outputs.items()}, masks, scores))
    return rows
