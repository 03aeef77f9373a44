"""One engine in a process of its own, told over a pipe which sample to run: so that engines of several environments take turns.

Runs in the project's environment and in the peers': what it imports beside numpy belongs to the engine asked for. A request is a line, the
number of a sample, or ``end``; the answer a line of JSON: milliseconds, or at the end the most memory the process held. An engine of one
sample has lain idle while the others ran, and the system may have taken its pages: it runs once untimed before.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

Feeds = Sequence[Mapping[str, np.ndarray]]
Run = Callable[[int], object]
ONE_BATCH = 1
"""Streams of an OpenVINO engine: one request at a time."""


def read(path: Path) -> list[dict[str, np.ndarray]]:
    """The samples of a file that ``write`` of prepare.py made."""
    feeds: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path) as archive:
        for key in archive.files:
            number, name = key.split(".", 1)
            feeds.setdefault(int(number), {})[name] = archive[key]
    return [feeds[i] for i in range(len(feeds))]


def bundle(spec: Mapping[str, Any], feeds: Feeds) -> Run:
    """A bundle of ours."""
    from tpcompile.engine import load

    engine = load(spec["path"], threads=spec["threads"], prime=spec.get("prime", True))
    return lambda i: engine(**feeds[i])


def onnx(spec: Mapping[str, Any], feeds: Feeds) -> Run:
    """ONNX files in ONNX Runtime: one for all samples, or one for each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if len(spec["files"]) > 1:  # a pool for all: of pools of their own, the workers of one wait actively while the next runs
        onnxruntime.set_global_thread_pool_sizes(spec["threads"], 1)
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads, options.inter_op_num_threads = spec["threads"], 1
    opened = {
        sample: onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=spec.get("without", [])
        )
        for sample, path in spec["files"].items()
    }
    return lambda i: opened.get(str(i), opened.get("all")).run(None, dict(feeds[i]))


def openvino(spec: Mapping[str, Any], feeds: Feeds) -> Run:
    """The same in OpenVINO."""
    requests = {sample: _compiled(path, spec) for sample, path in spec["files"].items()}
    return lambda i: requests.get(str(i), requests.get("all")).infer(dict(feeds[i]))


def _compiled(path: str, spec: Mapping[str, Any]) -> Any:
    from openvino import Core

    core = Core()
    return core.compile_model(core.read_model(path), "CPU", _settings(spec)).create_infer_request()


def _settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    hint = {"fp32": "f32", "bf16": "bf16"}[spec["precision"]]
    return {
        "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": ONE_BATCH, "INFERENCE_NUM_THREADS": spec["threads"]
    }  # fmt: skip


def torch_eager(spec: Mapping[str, Any], feeds: Feeds) -> Run:
    """The dense module in eager torch, or compiled."""
    import torch

    from tpcompile import models

    torch.set_num_threads(spec["threads"])
    model = models.load(spec["source"]).model
    model = model.to(torch.bfloat16) if spec["precision"] == "bf16" else model
    model = torch.compile(model, dynamic=spec["dynamic"]) if spec["compiled"] else model
    tensors = [{name: torch.from_numpy(value) for name, value in one.items()} for one in feeds]
    if spec["precision"] == "bf16":
        tensors = [{n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in one.items()} for one in tensors]

    def run(i: int) -> object:
        with torch.inference_mode():
            return model(**tensors[i])

    if spec["compiled"]:
        run(0)  # compilation is part of opening, as with every other engine
    return run


def optimum_onnx(spec: Mapping[str, Any], feeds: Feeds) -> Run:
    """Optimum's export, optimised at a level, in ONNX Runtime."""
    import onnxruntime
    from optimum.onnxruntime import (
        AutoOptimizationConfig,
        ORTModelForFeatureExtraction,
        ORTModelForImageClassification,
        ORTOptimizer,
    )

    kind = ORTModelForImageClassification if spec["images"] else ORTModelForFeatureExtraction
    folder = Path(spec["scratch"]) / f"optimum-{spec['level']}"
    if not (folder / "model_optimized.onnx").is_file():
        plain = Path(spec["scratch"]) / "optimum"
        kind.from_pretrained(spec["source"], export=True).save_pretrained(plain)
        optimizer = ORTOptimizer.from_pretrained(plain)
        optimizer.optimize(optimization_config=getattr(AutoOptimizationConfig, spec["level"])(), save_dir=folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec["threads"], 1
    model = kind.from_pretrained(folder, file_name="model_optimized.onnx", session_options=options)
    return _named(model, feeds)


def optimum_openvino(spec: Mapping[str, Any], feeds: Feeds) -> Run:
    """optimum-intel's export in OpenVINO."""
    from optimum.intel import OVModelForFeatureExtraction, OVModelForImageClassification

    kind = OVModelForImageClassification if spec["images"] else OVModelForFeatureExtraction
    folder = Path(spec["scratch"]) / "optimum-openvino"
    if not (folder / "openvino_model.xml").is_file():
        kind.from_pretrained(spec["source"], export=True, load_in_8bit=False, compile=False).save_pretrained(folder)
    return _named(kind.from_pretrained(folder, ov_config=_settings(spec)), feeds)


def _named(model: Any, feeds: Feeds) -> Run:
    """A model of Optimum's on the inputs it has; a segment input that we do not feed is all zeros."""
    wanted = list(getattr(model, "input_names", feeds[0]))
    rows = [{name: one.get(name, np.zeros_like(next(iter(one.values())))) for name in wanted} for one in feeds]
    return lambda i: model(**rows[i])


KINDS: Mapping[str, Callable[[Mapping[str, Any], Feeds], Run]] = {
    "bundle": bundle, "onnx": onnx, "openvino": openvino, "torch": torch_eager, "optimum-onnx": optimum_onnx,
    "optimum-openvino": optimum_openvino,
}  # fmt: skip


def peak() -> float:
    """The most memory this process held, MB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Open the engine of the command line, then answer requests."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    spec = json.loads(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    feeds = read(Path(spec["feeds"]))
    begin = perf_counter()
    run = KINDS[spec["kind"]](spec, feeds)
    print(json.dumps({"load_s": round(perf_counter() - begin, 3)}), file=answers)
    gc.disable()
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps({"peak_mb": round(peak(), 1)}), file=answers)
            return
        if len(spec.get("files", ())) > 1:
            run(int(line))
        start = perf_counter_ns()
        run(int(line))
        print(json.dumps((perf_counter_ns() - start) / 1e6), file=answers)


if __name__ == "__main__":
    main()
