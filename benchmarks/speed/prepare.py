"""Everything a cell opens, built beforehand: bundles, the naive export, static graphs, the samples and what is kept of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from cells import WORKLOADS, Cell
from workloads import Chosen, prepare

from tpcompile import api, build
from tpcompile import bundle as bundles
from tpcompile.capture import capture
from tpcompile.data.samples import Sample, batches, collate
from tpcompile.flops import Counts, saving
from tpcompile.onnx import emit
from tpcompile.onnx.fuse import fuse_attention
from tpcompile.passes import pipeline
from tpcompile.plan import RULES, Wish
from tpcompile.subject import Subject, subject_of

DATA = "model.onnx.data"
EXACT = "onnx-fp32"
"""The engine that stores what is kept and no more: static graphs are made for its counts, whichever cell comes first."""
SIZE, LIGHT = 8, 4096
Log = Callable[[str], None]


def ready(cell: Cell, folder: Path, log: Log) -> Path:
    """The folder of a cell's subject, with everything in it that the cell opens; what is there already stays.

    Args:
        cell: which.
        folder: of all subjects.
        log: called with what is done.
    """
    workload = WORKLOADS[cell.workload]
    room = folder / cell.subject
    room.mkdir(parents=True, exist_ok=True)
    bundle, facts = room / cell.engine, room / "facts.json"
    if bundle.is_dir() and facts.is_file():
        return room
    log(f"{cell.subject}: thresholds")
    chosen = prepare(cell.workload, workload, cell.ratio, folder / cell.workload)
    groups = _groups(chosen, cell.batch)
    log(f"{cell.subject}: compile")
    subject = subject_of(
        chosen.source,
        None,
        None,
        workload.method,
        {"thresholds": chosen.thresholds},
        batch="one" if cell.batch == 1 else "ragged",
        checkpoint=chosen.checkpoint,
    )
    compiled = build.compile_subject(subject)
    for one in (cell, replace(cell, engine=EXACT)):
        if one is cell or not (room / EXACT).is_dir():
            log(f"{one.name}: build")
            with bundles.stage(room / one.engine, force=True) as private:
                build.fill(private, compiled, one.target, one.precision, log, wish=_wish(one, chosen))
    if facts.is_file():
        return room
    np.savez(
        room / "samples.npz", **{f"{i}.{name}": value for i, one in enumerate(groups) for name, value in collate(one).items()}
    )
    _write(compiled.engine(RULES["onnx"]), room / "engine")
    _write(compiled.twin, room / "twin")
    log(f"{cell.subject}: naive export")
    naive(compiled.subject, room / "naive")
    counts = api.counts(room / EXACT, groups)
    if cell.batch == 1:
        static(room, workload.bounded, groups, counts)
    work = saving(bundles.read(room / EXACT).manifest.flops, counts)
    known = {
        "thresholds": chosen.thresholds, "source": chosen.source, "peer": str(chosen.peer), "paper": work.paper, "graph": work.graph,
        "static": workload.bounded if cell.batch == 1 else 0, "groups": len(groups),
    }  # fmt: skip
    facts.write_text(json.dumps(known), encoding="utf-8")
    return room


def _wish(cell: Cell, chosen: Chosen) -> Wish:
    """What the export is asked for: where new shapes cost, to measure what it leaves open, on inputs that are not those of the stream."""
    if cell.target == "onnx":
        return Wish()
    return Wish(tune=True, form="single", prime=True, calibrate=chosen.calibration)


def _groups(chosen: Chosen, size: int) -> list[list[Sample]]:
    """The stream by inference; in batches similar lengths go together."""
    return [[chosen.stream[i] for i in group] for group in batches(chosen.stream, size, by_length=size > 1)]


def naive(subject: Subject, folder: Path) -> None:
    """The same pruned model as one graph, as ``torch.onnx`` writes it: no pass that saves work, no op that stands for several."""
    captured = capture(subject.model, subject.inputs, subject.dynamic, subject.ranges)
    program = pipeline(subject.batch, optimize=False)(captured)
    with (
        mock.patch.object(emit, fuse_attention.__name__, return_value=0),
        mock.patch.object(emit, "_fix_reshapes", return_value=None),
    ):
        _write(emit.emit(program), folder)


def _write(model: emit.OnnxModel, folder: Path) -> None:
    """A graph with its weights beside it."""
    folder.mkdir(exist_ok=True)
    model.save(folder / "inside.onnx")
    proto = onnx.load(folder / "inside.onnx")
    (folder / DATA).unlink(missing_ok=True)
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=LIGHT)
    (folder / "inside.onnx").unlink()


def static(room: Path, count: int, groups: Sequence[Sequence[Sample]], counts: Sequence[Counts]) -> None:
    """Both graphs once for each of the first samples, with that sample's sizes for constants."""
    for name in ("engine", "twin"):
        graph = onnx.load(room / name / "model.onnx", load_external_data=False)
        for i in range(min(count, len(groups))):
            stored = counts[i].stored if name == "engine" else ()
            onnx.save(frozen(graph, groups[i][0].inputs, stored), room / name / f"static{i}.onnx")


def frozen(graph: onnx.ModelProto, inputs: Mapping[str, np.ndarray], stored: Sequence[int]) -> onnx.ModelProto:
    """A copy of a graph for one sample, its inputs of constant sizes, and a constant number of positions behind every site.

    The positions are the first so many of the mask, by ``TopK``. Where a precision keeps a token more or less than the counts say, the
    shape is theirs all the same: a reshape of what is kept would be undefined there, and OpenVINO computes garbage without a word.

    Args:
        graph: with a ``NonZero`` a site, in order, of a mask ``[n]``.
        inputs: by name.
        stored: rows behind every site.

    Raises:
        ValueError: the graph has more or fewer sites than that.
    """
    model = deepcopy(graph)
    del model.graph.value_info[:]
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name].shape, strict=True):
            dim.dim_value = size
    sites = [node for node in model.graph.node if node.op_type == "NonZero"]
    for number, (node, rows) in enumerate(zip(sites, stored, strict=True)):
        name = f"site{number}"
        constants = {"rows": [rows], "row": [1, rows]}
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.array(value, dtype=np.int64), f"{name}.{key}") for key, value in constants.items()
        )
        made = [
            onnx.helper.make_node("Cast", [node.input[0]], [f"{name}.kept"], to=onnx.TensorProto.INT32),
            onnx.helper.make_node("TopK", [f"{name}.kept", f"{name}.rows"], [f"{name}.ones", f"{name}.first"], axis=0),
            onnx.helper.make_node("Reshape", [f"{name}.first", f"{name}.row"], [node.output[0]]),
        ]
        place = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        for step, one in enumerate(made):
            one.name = f"{name}.fixed{step}"
            model.graph.node.insert(place + step, one)
    return model


def size_of(path: Path) -> float:
    """Megabytes of a file's folder or of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return round(sum(p.stat().st_size for p in files) / 1e6, 1)


def load(room: Path) -> dict[str, Any]:
    """What ``ready`` wrote down."""
    found: dict[str, Any] = json.loads((room / "facts.json").read_text(encoding="utf-8"))
    return found
