"""A cell's rows, each a process, run the same few samples in turns, forth and back: the first pass is cold, the others are warm."""

import json
import sys
import threading
import time
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cells import WORKLOADS, Cell
from prepare import load, size_of

from tpcompile.backends.onnxruntime import SLOWER
from tpcompile.bundle import read
from tpcompile.errors import EnvironmentFault
from tpcompile.timing.pipe import Pipe
from tpcompile.timing.turns import PAUSE, TURN

CHILD = Path(__file__).with_name("child.py")
PATIENCE = 900
"""Seconds until an engine that does not open is given up."""
TRIES = 20
"""Of a core's strength, the best counts."""


@dataclass(frozen=True)
class Row:
    """One engine of a cell.

    Attributes:
        name: in the table.
        role: ``pruned``, ``unprimed``, ``dense``, ``naive``, ``static``, ``dense static`` or ``peer``.
        spec: what the child opens.
        python: the interpreter, empty for our own.
        only: the samples it runs; empty for all.
        size: what it takes on disk, MB; 0 where that is not known.
    """

    name: str
    role: str
    spec: Mapping[str, Any]
    python: str = ""
    only: tuple[int, ...] = ()
    size: float = 0.0


class Child(Pipe):
    """A row's process."""

    fault = EnvironmentFault
    fix = "measure this cell again"

    def __init__(self, row: Row) -> None:
        super().__init__(row.name, [row.python or sys.executable, str(CHILD), json.dumps(row.spec)])
        self.row, self.load_s = row, 0.0
        self.times: list[dict[int, float]] = []

    def open(self) -> str:
        """Wait until it is open; returns why it is not, closed then, and empty where it is."""
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            self.load_s = self.answer()["load_s"]
        except EnvironmentFault as error:
            self.close()
            return error.message
        finally:
            timer.cancel()
        return ""


def rows(cell: Cell, room: Path, peers: str) -> list[Row]:
    """What a cell compares."""
    facts, workload = load(room), WORKLOADS[cell.workload]
    common = {"threads": cell.threads, "precision": cell.precision, "feeds": str(room / "samples.npz")}
    bundle = room / cell.engine
    runtime = {"kind": cell.target, **common}
    found = [
        Row(
            "pruned",
            "pruned",
            {"kind": "bundle", "path": str(bundle), **common},
            size=size_of(bundle) - size_of(bundle / "dense"),
        ),
        Row("dense", "dense", {"kind": "bundle", "path": str(bundle / "dense"), **common}, size=size_of(bundle / "dense")),
        Row("naive", "naive", {**runtime, "files": {"all": str(room / "naive" / "model.onnx")}}, size=size_of(room / "naive")),
    ]
    if load_primed(bundle):
        bare = {"kind": "bundle", "path": str(bundle), "prime": False, **common}
        found.insert(1, Row("pruned, not primed", "unprimed", bare, size=found[0].size))
    for name, role in (("engine", "static"), ("twin", "dense static")) if facts["static"] else ():
        files = {str(i): str(room / name / f"static{i}.onnx") for i in range(facts["static"])}
        found.append(Row(role, role, {**runtime, "files": files, "without": SLOWER}, only=tuple(range(facts["static"]))))
    plain = {"kind": "torch", "source": facts["source"], "compiled": False, **common}
    if cell.target == "onnx":  # slower than every runtime: once is enough
        found.append(Row("torch eager", "peer", plain))
        found.append(Row("torch.compile", "peer", {**plain, "compiled": True, "dynamic": not workload.tokens}))
    library = {
        "source": facts["peer"],
        "images": workload.peer is not None,
        "scratch": str(room.parent / cell.workload),
        **common,
    }
    if cell.precision == "fp32":
        found.append(Row("Optimum O2, ONNX Runtime", "peer", {"kind": "optimum-onnx", "level": "O2", **library}, peers))
        if cell.target == "onnx":
            found.append(Row("Optimum O3, ONNX Runtime", "peer", {"kind": "optimum-onnx", "level": "O3", **library}, peers))
    if cell.target == "openvino" or workload.tokens:
        found.append(Row("optimum-intel, OpenVINO", "peer", {"kind": "optimum-openvino", **library}, peers))
    return found


def load_primed(bundle: Path) -> int:
    """How many inputs a bundle runs when it is loaded."""
    return read(bundle).manifest.primed


def measure(cell: Cell, room: Path, peers: str) -> dict[str, Any]:
    """Open every row, run the stream in turns, and return the cell's document."""
    facts, passes = load(room), WORKLOADS[cell.workload].passes
    children: list[Child] = []
    left: dict[str, str] = {}
    begin = time.perf_counter()
    try:
        for row in rows(cell, room, peers):
            if row.python and not Path(row.python).is_file():
                left[row.name] = "no environment of its own: see benchmarks/peers/requirements.txt"
                continue
            children.append(child := Child(row))
            if why := child.open():
                left[row.name] = f"did not open: {why}"
                children.remove(child)
        strength = core()
        for number in range(passes + 1):
            _pass(children, facts["groups"], number, PAUSE if cell.threads > 1 else 0)
        peaks = [child.ask("end")["peak_mb"] for child in children]
    finally:
        for child in children:
            child.close()
    return {
        "date": datetime.now(UTC).date().isoformat(), "core": strength,
        "cell": {**asdict(cell), "name": cell.name}, "flops": {"paper": facts["paper"], "graph": facts["graph"]},
        "plan": _plan(room / cell.engine), "samples": facts["groups"], "left_out": left, "seconds": round(time.perf_counter() - begin, 1),
        "rows": [_document(child, peak) for child, peak in zip(children, peaks, strict=True)],
    }  # fmt: skip


def core() -> dict[str, float]:
    """What one core does at its best just now: GFLOP/s of a float32 product of BERT-base's size, GB/s of a sum over 256 MB."""
    given = {"a": torch.rand(512, 768), "b": torch.rand(768, 3072), "c": torch.rand(1 << 26)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product, total = (min(timeit.repeat(what, globals=given, number=1, repeat=TRIES)) for what in ("a @ b", "c.sum()"))
    finally:
        torch.set_num_threads(threads)
    return {"gflops": round(2 * 512 * 768 * 3072 / product / 1e9, 1), "gbps": round((4 << 26) / total / 1e9, 1)}


def rehearse(cell: Cell, room: Path, peers: str) -> dict[str, str]:
    """Open every peer once, so that what it exports at first is there when it counts; what does not open, and why."""
    left = {}
    for row in rows(cell, room, peers):
        if row.python and Path(row.python).is_file():
            child = Child(row)
            try:
                if why := child.open():
                    left[row.name] = why
            finally:
                child.close()
    return left


def _pass(children: Sequence[Child], samples: int, number: int, pause: float) -> None:
    for child in children:
        child.times.append({})
    for turn, start in enumerate(range(0, samples, TURN)):
        order = children if (turn + number) % 2 == 0 else children[::-1]
        for child in order:
            for i in range(start, min(start + TURN, samples)):
                if not child.row.only or i in child.row.only:
                    child.times[-1][i] = child.ask(i)
            time.sleep(pause)


def _plan(bundle: Path) -> dict[str, Any]:
    """What the export chose, and why."""
    manifest = read(bundle).manifest
    how = manifest.model_dump(mode="json", include={"lowering", "form", "buckets", "lengths", "primed", "swept", "reason"})
    return {**how, "tune": manifest.measured.get("tune", [])}


def _document(child: Child, peak: float) -> dict[str, Any]:
    row = child.row
    times = [[round(one, 3) for one in a_pass.values()] for a_pass in child.times]
    return {
        "name": row.name, "role": row.role, "load_s": child.load_s, "peak_mb": peak, "size_mb": row.size,
        "only": list(row.only), "cold_ms": times[0], "warm_ms": times[1:],
    }  # fmt: skip
