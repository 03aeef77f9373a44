"""Which pass is the first whose program differs from the captured one? Every stage of a program runs, so every stage is run."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tpcompile.compare.findings import FOUND, Bisection, Culprit, Step, notes, nothing, off, worst
from tpcompile.compare.layers import Found, locate
from tpcompile.compare.watch import Batch, Judged, Law, Seen, Side, judge, observe, onnx_side, program_side
from tpcompile.data.samples import Sample
from tpcompile.errors import TpcompileError, first_line
from tpcompile.onnx.emit import emit
from tpcompile.passes import Pipeline
from tpcompile.program import Program

Progress = Callable[[str, int, int], None]
AGAINST = "the captured program"
EMIT = "emit"
"""Name of the step behind the passes: the last program as ONNX, in ONNX Runtime."""


def bisect_passes(
    subject: str, captured: Program, passes: Pipeline, samples: Sequence[Sample], batches: Sequence[Batch], law: Law,
    progress: Progress | None = None,
) -> Bisection:  # fmt: skip
    """Run every stage on every sample, and stop at the first that differs from the captured program.

    Outputs are compared with the captured program's, kept sets with those of the first stage that has sites. Behind the passes the
    emitted ONNX graph is a last step.

    Args:
        subject: name for people.
        captured: what the passes start from.
        passes: in order.
        samples: all of them.
        batches: the same, as they are run together.
        law: what counts as equal.
        progress: called before every step.

    Raises:
        TpcompileError: a pass refuses its program, and none before it is at fault.
    """
    along = along_of(captured)
    with tempfile.TemporaryDirectory() as scratch:
        before = program_side("capture", captured)
        right = kept = seen = observe(before, batches, along)
        steps = [Step("capture", "equal")]
        judged = judge(batches, seen, right, kept, law)
        for side in _sides(captured, passes, Path(scratch)):
            if progress is not None:
                progress("passes", len(steps) - 1, len(passes.passes) + 1)
            try:
                fresh = observe(side, batches, along)
            except Exception as error:  # whatever a broken program raises is the finding
                steps.append(Step(side.name, "differs", error=first_line(error)))
                return _found(
                    subject, law, steps, Culprit(side.name), f"its program does not run: {first_line(error)}", samples, judged
                )
            kept = kept if kept[0].kept else fresh
            judged = judge(batches, fresh, right, kept, law)
            bad = worst(judged)
            if bad is not None:
                steps.append(Step(side.name, "differs", bad.number, bad.what, bad.difference.max_abs))
                inner = locate(side, before, *_differing(batches, judged, fresh, seen), law)
                culprit = Culprit.of(inner.roots[0], side.name) if inner.roots else Culprit(side.name)
                return _found(subject, law, steps, culprit, f"{off(bad)} in sample {bad.number}", samples, judged, inner)
            steps.append(Step(side.name, "equal"))
            before, seen = side, fresh
    return nothing(subject, "pass", AGAINST, law.tolerance, notes(samples, judged), tuple(steps))


def _differing(
    batches: Sequence[Batch], judged: Sequence[Judged], a: Sequence[Seen], b: Sequence[Seen]
) -> tuple[list[Batch], tuple[list[Seen], list[Seen]]]:
    """The batches with a sample that differs, and what was seen of both sides."""
    bad = {one.number for one in judged if one.verdict == "differs"}
    chosen = [i for i, batch in enumerate(batches) if bad & {*batch.numbers}]
    return [batches[i] for i in chosen], ([a[i] for i in chosen], [b[i] for i in chosen])


def _found(
    subject: str, law: Law, steps: Sequence[Step], culprit: Culprit, what: str, samples: Sequence[Sample], judged: Sequence[Judged],
    inner: Found | None = None,
) -> Bisection:  # fmt: skip
    first = f"; first inner value that differs: {culprit}" if culprit.value else ""
    others = tuple(Culprit.of(root, culprit.step) for root in inner.roots[1:]) if inner is not None else ()
    return Bisection(
        subject, "pass", AGAINST, "FAILED", f"{culprit.step}: {what}{first}", FOUND, law.tolerance, notes(samples, judged), tuple(steps),
        culprit, others, inner.compared if inner is not None else 0, inner.skipped if inner is not None else 0,
    )  # fmt: skip


def _sides(captured: Program, passes: Pipeline, scratch: Path) -> Iterator[Side]:
    """The program after every pass, then its ONNX graph."""
    program = captured
    for step in passes.passes:
        try:
            program = Pipeline((step,))(program)
        except TpcompileError as error:
            error.during = error.during or step.name
            raise
        yield program_side(str(step), program)
    emit(program).save(scratch / "model.onnx")
    scores = tuple(bool(site.score) for site in program.sites)
    yield onnx_side(EMIT, scratch, program.output_names, scores, any(site.index for site in program.sites))


def along_of(program: Program) -> Mapping[str, int]:
    """Output name -> the dim that runs over an input's tokens."""
    lengths = {size for node in program.graph.find_nodes(op="placeholder") for size in _sizes(node)[1:] if not size.isdecimal()}
    results = program.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    named = zip(program.output_names, results, strict=True)
    return {name: d for name, node in named for d, size in enumerate(_sizes(node)) if d and size in lengths}


def _sizes(node: Any) -> list[str]:
    """A node's sizes as text: numbers and symbols."""
    value = getattr(node, "meta", {}).get("val")
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else []
