"""What the compiler itself costs: seconds by step and peak memory of an export, and how long import and help take; writes docs/compiler.md.

    python benchmarks/compiler.py                    everything; benchmarks/results/compiler.json, and the page
    python benchmarks/compiler.py --only deit-small  one model again
    python benchmarks/compiler.py --page             the page alone

Each model has random weights and a process of its own: it is compiled once, then built for ONNX Runtime, then for OpenVINO. Memory is the
process's peak above what it holds once everything is imported and the model is made, in units of the model's weights. Linux only: peaks
come from /proc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOUND, PAGE = ROOT / "benchmarks" / "results" / "compiler.json", ROOT / "docs" / "compiler.md"
MODELS = ("deit-small", "bert-base")
TARGETS = ("onnx", "openvino")
STARTS = {
    "python -c pass": ["-c", "pass"],
    "import tpcompile": ["-c", "import tpcompile"],
    "tpcompile --help": ["-c", "from tpcompile.cli import main; main(['--help'])"],
}
IMPORTED = (
    "onnxruntime", "openvino", "openvino.tools.ovc", "onnxscript.optimizer", "onnxscript.function_libs.torch_lib.ops", "transformers",
    "sympy", "sympy.combinatorics", "networkx", "torch._functorch.aot_autograd", "torch._export.non_strict_utils", "torch._inductor",
    "torch.export._trace", "torch.export.decomp_utils", "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._torchlib.ops",
)  # fmt: skip
"""What an export imports on its way: time of its own, and no memory of its work."""
REPEATS = 5
LIMITS = {"seconds": 60.0, "memory": 4.0, "import tpcompile": 0.3, "tpcompile --help": 0.5}
"""What the project holds itself to: both targets together; times the weights; seconds."""


class Steps:
    """Wall and CPU seconds of every step of an export; called when the next one begins."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.step = ""
        self.begin = (time.perf_counter(), time.process_time())

    def __call__(self, step: str) -> None:
        now = (time.perf_counter(), time.process_time())
        if self.step:
            known = self.found.setdefault(self.step, {"wall": 0.0, "cpu": 0.0})
            for kind, end, begin in zip(("wall", "cpu"), now, self.begin, strict=True):
                known[kind] += round(end - begin, 2)
        self.step, self.begin = step, now


def memory(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(name: str) -> dict[str, Any]:
    """Compile a model and build it for every target, in this process."""
    steps, targets = Steps(), {}
    steps("import")
    for module in IMPORTED:
        import_module(module)
    import torch
    from methods import BERT_BASE, DEIT_S, bert, samples, vit

    from tpcompile import build, bundle, models
    from tpcompile.compat import sparing_collector
    from tpcompile.subject import subject_of

    steps("")
    torch.set_num_threads(1)
    text = name == "bert-base"
    model = bert(BERT_BASE, vocabulary=30522) if text else vit(DEIT_S)
    thresholds = [0.0, *([0.002] * 11)]
    pruned = models.prune(model, "ltp", thresholds=thresholds, **({} if text else {"protect": "prefix"}))
    inputs = samples("bert" if text else "vit", BERT_BASE if text else DEIT_S)[0]
    dynamic = {key: {1: "seq"} for key in inputs} if text else None
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    with sparing_collector():  # as an export is
        compiled = build.compile_subject(subject_of(pruned, inputs, dynamic, None, None), say=steps)
        steps("")
        compiling = steps.found
        for target in TARGETS:
            steps = Steps()
            with tempfile.TemporaryDirectory() as scratch, bundle.stage(Path(scratch) / "out") as folder:
                build.fill(folder, compiled, target, say=steps)
                steps("flush")
            steps("")
            targets[target] = {"steps": steps.found, "memory": round((memory("VmHWM") - base) / weights, 2)}
    return {"weights": weights, "sites": len(compiled.compact.sites), "compile": compiling, "targets": targets}


def starts() -> dict[str, float]:
    """Median wall seconds of what a user waits for before any work."""
    found = {}
    for name, arguments in STARTS.items():
        times = []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        found[name] = round(statistics.median(times[1:]), 3)
    return found


def page(document: Mapping[str, Any]) -> str:
    """docs/compiler.md."""
    head = f"""# What the compiler costs

Written by `benchmarks/compiler.py`: do not edit. DeiT-S at 224 pixels (`ltp`, 12 layers, CLS protected) and BERT-base (`ltp`, any
length), random weights, one thread. A model is compiled once and then built for ONNX Runtime and for OpenVINO: engine, dense baseline,
masked reference, test vectors, hashes. Seconds are wall (CPU); memory is the peak above imports and loaded model, in units of the
weights.

Held to: both targets in {LIMITS["seconds"]:.0f} s, {LIMITS["memory"]:.0f} times the weights (a plain ONNX export of MiniLM: 3.7), import
in {LIMITS["import tpcompile"]} s, help in {LIMITS["tpcompile --help"]} s.
"""
    lines = [head]
    if document.get("models"):
        lines += [
            "| step | " + " | ".join(f"{name}, s" for name in document["models"]) + " |",
            "|---|" + "---|" * len(document["models"]),
        ]
        lines += [
            row(f"compile: {step}", document, lambda one, step=step: one["compile"].get(step)) for step in seen(document, None)
        ]
        for target in TARGETS:
            lines += [
                row(
                    f"{target}: {step}", document, lambda one, target=target, step=step: one["targets"][target]["steps"].get(step)
                )
                for step in seen(document, target)
            ]
        lines += [row("**both targets**", document, total)]
        lines += [
            "| "
            + " | ".join(
                [f"peak memory, {target}", *(f"{one['targets'][target]['memory']:.2f} x" for one in document["models"].values())]
            )
            + " |"
            for target in TARGETS
        ]
    lines += [
        "",
        "| start | s |",
        "|---|---|",
        *(f"| `{name}` | {seconds:.2f} |" for name, seconds in document.get("starts", {}).items()),
    ]
    return "\n".join([*lines, NOTES])


NOTES = """
## What counts

OpenVINO's CPU plugin, a library of 39 MB that the first compilation loads, counts as work here.

## What keeps it low

`tests/tpcompile/test_build.py` holds the first: every graph is traced, written and checked once.

- torch.onnx would trace a program again to decompose it; where it knows every op, it is given the program as it is.
- Metadata is computed again only behind a change: a node whose op and operands are those of the last time keeps its value.
- Weights are shared by every stage of a program, and written straight to `model.onnx.data`; a file that goes into a bundle
  unchanged is linked. OpenVINO maps that file; its graph, and what that took of the heap, go
  back before its plugin compiles.
- The ONNX checker sees heavy weights as inputs.
- torch.onnx's promotion of types casts, and computes no value's type and shape again: the graph has them. Its rules that look for two
  nodes at once walk the graph only where the first of them is met.
- What the packages hold, half a million objects, is frozen meanwhile: Python's collector walked it 17 times in an export of BERT-base.
- The dense baseline, whose constant sizes take a runtime the most memory, is built first, while the least is held.
- OpenVINO's graph is one of its own where a new shape costs (decision 0029): both targets together write two engines.

What is left is torch's: two traces with functionalisation (pruned and dense) and symbolic sizes are most of *capture* and *dense
baseline*, onnxscript's rewriting rules most of *write ONNX*. Of the memory, OpenVINO's plugin and its copy of the weights are the most.
"""


def seen(document: Mapping[str, Any], target: str | None) -> list[str]:
    """The steps of a phase, in order."""
    phases = [one["compile"] if target is None else one["targets"][target]["steps"] for one in document["models"].values()]
    return list(dict.fromkeys(step for phase in phases for step in phase))


def total(one: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of all steps of a model."""
    steps = [*one["compile"].values(), *(step for target in one["targets"].values() for step in target["steps"].values())]
    return {kind: sum(step[kind] for step in steps) for kind in ("wall", "cpu")}


def row(name: str, document: Mapping[str, Any], of: Callable[[Mapping[str, Any]], Mapping[str, float] | None]) -> str:
    """A line of the table."""
    found = [of(one) for one in document["models"].values()]
    return "| " + " | ".join([name, *(f"{one['wall']:.1f} ({one['cpu']:.1f})" if one else "" for one in found)]) + " |"


def main(arguments: Sequence[str]) -> int:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=[*MODELS, "starts"], action="append", help="this alone, again")
    parser.add_argument("--page", action="store_true", help="write the page from what is known")
    parser.add_argument("--inside", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        print(json.dumps(measure(options.inside)))
        return 0
    known: dict[str, Any] = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.is_file() else {"models": {}, "starts": {}}
    for name in [] if options.page else options.only or [*MODELS, "starts"]:
        print(name, file=sys.stderr, flush=True)
        if name == "starts":
            known["starts"] = starts()
        else:
            inside = [sys.executable, __file__, "--inside", name]
            ran = subprocess.run(
                inside, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            known["models"][name] = json.loads(ran.stdout.splitlines()[-1])
        FOUND.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
