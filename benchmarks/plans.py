"""TensorRT plans of real models, built here without a GPU: every form, precision and compute capability; writes docs/tensorrt.md.

    python benchmarks/plans.py                  what is not in the JSON yet, about half an hour in all; it can be stopped and resumed
    python benchmarks/plans.py --minutes 4      the same, and stop after about so many minutes
    python benchmarks/plans.py --gpus sm89      those that are for this alone; sm86,sm89,sm120 for all three in one plan
    python benchmarks/plans.py --page           the page alone, from benchmarks/results/tensorrt.json

DeiT-S has random weights and ``cls-attention`` at three blocks, MiniLM its own and LTP at six layers. The graphs are those the builder is
given; what they compute is measured in ONNX Runtime against the masked program in eager torch, as no plan can run here.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tpcompile import build, models
from tpcompile.backends import Extent, Session, backend
from tpcompile.backends.tensorrt import TensorRtRtx
from tpcompile.backends.tensorrt.builder import build_plan
from tpcompile.backends.tensorrt.flavours import LEAST, RTX, number
from tpcompile.chain import ChainSession
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample
from tpcompile.demo import model_folder
from tpcompile.manifest import StageInfo
from tpcompile.onnx.emit import emit
from tpcompile.onnx.quant import GRIDS
from tpcompile.onnx.quantised import chained, write_quantised
from tpcompile.onnx.stages import cut
from tpcompile.plan import LADDER, Plan, behind_sites, calibrate, narrow
from tpcompile.spec import TensorSpec
from tpcompile.subject import subject_of

ROOT = Path(__file__).resolve().parent.parent
FOUND, PAGE = ROOT / "benchmarks/results/tensorrt.json", ROOT / "docs/tensorrt.md"
FORMS = ("static", "staged", "single")
TARGETS = (("sm86",), ("sm89",), ("sm120",), ("sm86", "sm89", "sm120"))
MARK = "<!-- table -->"
COLUMNS = ("model", "form", "precision", "GPUs", "plans", "build, s", "MB", "peak MB", "layers", "ERROR lines", "ONNX off by")
Arrays = dict[str, np.ndarray[Any, Any]]


def deit() -> tuple[build.Compiled, list[Sample]]:
    """DeiT-S of random weights, a few random images."""
    torch.manual_seed(0)
    source = models.load("timm/deit_small_patch16_224")
    blocks = [0.0] * 12
    for block in (3, 6, 9):
        blocks[block] = 0.0045
    pruned = models.prune(source.model, method="cls-attention", thresholds=blocks)
    draws = [np.random.default_rng(i).standard_normal((1, 3, 224, 224)).astype(np.float32) for i in range(4)]
    inputs = {"pixel_values": torch.from_numpy(draws[0])}
    return build.compile_subject(subject_of(pruned, inputs, None, None, None)), [
        Sample("", {"pixel_values": one}) for one in draws
    ]


def minilm() -> tuple[build.Compiled, list[Sample]]:
    """MiniLM with its own weights, a few docstrings."""
    subject = subject_of(model_folder(), None, None, "ltp", {"thresholds": [0.0006 * (layer + 1) for layer in range(6)]})
    return build.compile_subject(subject), load_data("docstrings:stream", model_folder(), 256, 4)


MODELS: dict[str, Callable[[], tuple[build.Compiled, list[Sample]]]] = {"DeiT-S": deit, "MiniLM": minilm}


@dataclass(frozen=True)
class Written:
    """One form of one model as ONNX files, with what is needed to build and to run them."""

    folder: Path
    paths: tuple[Path, ...]
    stages: tuple[StageInfo, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: dict[str, tuple[int, int, int]]


def written(compiled: build.Compiled, rows: Sequence[Sample], form: str, folder: Path) -> Written:
    """The graphs before they are prepared for a precision."""
    sizes = narrow(compiled.compact.dims, {}, {"seq": 64})
    feeds = [row.inputs for row in rows]
    if form == "staged":
        plan = Plan("bucketed", "staged", LADDER, usual=calibrate(compiled.compact, rows, 0.5))
        chain = cut(emit(plan.step(compiled.compact), hosted=True))
        length = (sizes["seq"][0], sizes["seq"][2]) if sizes else (feeds[0]["pixel_values"].shape[-1] ** 2 // 256 + 1,) * 2
        sizes |= behind_sites(length, plan, len(compiled.compact.sites))
        return Written(folder, tuple(chain.save(folder)), chain.stages, chain.outputs, sizes)
    counts = calibrate(compiled.compact, rows) if form == "static" else ()
    model = emit(Plan("static" if counts else "dynamic", counts=counts).step(compiled.compact))
    model.save(folder / "model.onnx")
    return Written(folder, (folder / "model.onnx",), (), model.outputs, sizes)


def given(one: Written, rows: Sequence[Sample], precision: str, folder: Path) -> list[ir.Model]:
    """The very graphs the builder is given; they are saved under the same names in a folder."""
    source = one
    if precision in GRIDS:
        for path in one.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        write_quantised(folder, one.stages, one.outputs, [row.inputs for row in rows], precision)
        source = Written(folder, tuple(folder / path.name for path in one.paths), one.stages, one.outputs, one.sizes)
    found = [TensorRtRtx().graph(path, precision, Extent(one.sizes)) for path in source.paths]
    for model, path in zip(found, one.paths, strict=True):
        ir.save(model, folder / path.name)
    return found


def off_by(compiled: build.Compiled, rows: Sequence[Sample], one: Written, folder: Path) -> float:
    """How far the given graphs are from the masked program, relative to ``max(1, max|masked|)``, in ONNX Runtime."""
    worst = 0.0
    with ExitStack() as opened:
        numbers = range(len(one.paths)) if one.stages else (None,)
        sessions = [opened.enter_context(backend("onnx").open(folder, stage=number)) for number in numbers]
        feeds = [row.inputs for row in rows]
        whole: Session = ChainSession(chained(one.stages, one.outputs, feeds), sessions) if one.stages else sessions[0]
        for feed in feeds:
            wanted = compiled.placed.trace(**{name: torch.from_numpy(value) for name, value in feed.items()}).outputs
            got = whole.run(feed)
            for name, value in wanted.items():
                truth = value.numpy()
                worst = max(worst, float(np.abs(got[name] - truth).max() / max(1.0, np.abs(truth).max())))
    return worst


def rows_of(name: str, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Every cell of a model that is not done with."""
    wanted = [cell for cell in cells() if cell[0] == name and cell not in done]
    if not wanted:
        return
    compiled, rows = MODELS[name]()
    for form, precision in dict.fromkeys((cell[1], cell[2]) for cell in wanted):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            one = written(compiled, rows, form, Path(first))
            graphs = given(one, rows, precision, Path(second))
            # ONNX Runtime's CPU provider has no bfloat16, and fuses 8-bit pairs into ops of other types.
            gap = off_by(compiled, rows, one, Path(second)) if precision in ("fp32", "fp16") else None
            for cell in [cell for cell in wanted if cell[1:3] == (form, precision)]:
                extent = Extent(one.sizes, cell[3])
                built = [build_plan(RTX, graph, Path(second) / f"{i}.plan", precision, extent) for i, graph in enumerate(graphs)]
                yield {
                    "model": name, "form": form, "precision": precision, "capabilities": list(cell[3]), "plans": len(built),
                    "seconds": round(sum(plan.seconds for plan in built), 2), "megabytes": round(sum(p.megabytes for p in built), 1),
                    "peak_mb": round(max(plan.peak_mb for plan in built)), "layers": sum(plan.layers for plan in built),
                    "error_lines": 0, "off_by": gap, "each": [{k: v for k, v in asdict(p).items() if k != "plan"} for p in built],
                }  # fmt: skip


def cells() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Model, form, precision, capabilities; without those that lack the precision."""
    every = product(MODELS, FORMS, LEAST, TARGETS)
    return [cell for cell in every if all(number(capability) >= LEAST[cell[2]] for capability in cell[3])]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, in the order of ``cells``."""
    place = {cell: i for i, cell in enumerate(cells())}
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    body = [
        f"| {row['model']} | {row['form']} | {row['precision']} | {' '.join(row['capabilities'])} | {row['plans']} | {row['seconds']:.1f} "
        f"| {row['megabytes']:.1f} | {row['peak_mb']} | {row['layers']} | {row['error_lines']} "
        f"| {'' if row['off_by'] is None else format(row['off_by'], '.1e')} |"
        for row in sorted(rows, key=lambda row: place[key(row)])
    ]
    return "\n".join([*head, *body])


def key(row: dict[str, Any]) -> tuple[str, str, str, tuple[str, ...]]:
    """The cell of a row."""
    return row["model"], row["form"], row["precision"], tuple(row["capabilities"])


def write_page(rows: Sequence[dict[str, Any]]) -> None:
    """Put the table between its marks."""
    before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
    PAGE.write_text(f"{before}{MARK}\n{table(rows)}\n{MARK}{after}", encoding="utf-8")


def main() -> int:
    """Build what is missing, save after every cell, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--gpus", type=lambda text: tuple(text.split(",")), choices=TARGETS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    rows = json.loads(FOUND.read_text(encoding="utf-8"))["rows"] if FOUND.is_file() else []
    end = time.monotonic() + 60 * options.minutes
    version = RTX.library().__version__
    for name in () if options.page else MODELS:
        left_out = {cell for cell in cells() if options.gpus not in (None, cell[3])}
        for row in rows_of(name, left_out | {key(row) for row in rows}):
            rows.append(row)
            FOUND.write_text(json.dumps({"tensorrt_rtx": version, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            write_page(rows)
            print(*key(row), row["seconds"], "s", row["megabytes"], "MB", row["off_by"], file=sys.stderr, flush=True)
            if time.monotonic() > end:
                break
        if time.monotonic() > end:
            break
    write_page(rows)
    print(f"{len(rows)} of {len(cells())} cells, {FOUND.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
