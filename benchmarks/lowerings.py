"""Every lowering in every form, on both CPU backends, one by one and in batches: exact, how many shapes, how large, how fast.

    python benchmarks/lowerings.py                                  all 24 rows; writes the JSON and docs/lowerings.md
    python benchmarks/lowerings.py --targets onnx --batches one -o some.json --page some.md     a part of them

MiniLM with LTP at six layers, rising thresholds, on the docstring stream, one thread. A row is one engine: its outputs and kept sets
against the masked program in eager torch; the shapes it met; its files; the memory of a process of its own that opened it and ran the
stream; and the time, all engines of a target and batch policy in turns, cold and warm. Constant counts are the 0.9 quantile of the other
half of the docstrings: samples that keep more are counted, and left out of the parity.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tpcompile import build
from tpcompile.bundle import read
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample, batches, collate, split
from tpcompile.demo import model_folder
from tpcompile.engine import load
from tpcompile.errors import TpcompileError
from tpcompile.kept import Kept, compose
from tpcompile.plan import FORMS, LADDER, LOWERINGS, RULES, Plan, calibrate
from tpcompile.subject import subject_of
from tpcompile.tune import Trial, time_in_turns

THRESHOLDS = [0.0006 * (layer + 1) for layer in range(6)]
"""Tokens stay behind every site, in short texts nearly all and in long ones few: an empty set would hide what it does to an output."""
SIZES = {"one": 1, "ragged": 8}
QUANTILE = 0.9
COLUMNS = (
    "engine", "batch", "lowering", "form", "off by", "overflow", "shapes: all; input; sites", "files", "disk, MB", "open / peak, MB",
    "cold / warm, ms",
)  # fmt: skip
MARK = "<!-- table -->"
ROOT = Path(__file__).resolve().parent.parent
MEMORY = """
import sys
import numpy as np
from tpcompile.engine import load

def held(what):
    return int(open("/proc/self/status").read().split(what)[1].split()[0]) / 1024

feeds = [dict(np.load(path)) for path in sys.argv[2:]]
before = held("VmRSS:")
with load(sys.argv[1], threads=1) as engine:
    opened = held("VmRSS:")
    for feed in feeds:
        engine(**feed)
    print(opened - before, held("VmHWM:") - before)
"""
"""Megabytes that an engine adds to its process: when it is open, and at most."""


@dataclass(frozen=True)
class Case:
    """One batch policy: the groups of samples, their inputs, and what the masked program says of each sample."""

    compiled: build.Compiled
    groups: list[list[Sample]]
    feeds: list[dict[str, np.ndarray]]
    outputs: list[list[dict[str, np.ndarray]]]
    kept: list[list[Kept]]
    files: list[str]


def prepare(batch: str, samples: Sequence[Sample], folder: Path) -> Case:
    """Compile once, and run the masked program on every group."""
    compiled = build.compile_subject(subject_of(model_folder(), None, None, "ltp", {"thresholds": THRESHOLDS}, batch=batch))
    groups = [[samples[i] for i in group] for group in batches(samples, SIZES[batch], by_length=True)]
    feeds = [collate(group) for group in groups]
    outputs, kept, files = [], [], []
    for number, (group, feed) in enumerate(zip(groups, feeds, strict=True)):
        trace = compiled.placed.trace(**{name: torch.from_numpy(value) for name, value in feed.items()})
        outputs.append(split({name: value.numpy() for name, value in trace.outputs.items()}, group, {}))
        taps = {f"site{i}.keep": keep.numpy() for i, keep in enumerate(trace.keep)}
        length = trace.keep[0].shape[1]
        kept.append([compose({n: v[b : b + 1] for n, v in taps.items()}, len(trace.keep), length) for b in range(len(group))])
        files.append(str(folder / f"{batch}{number}.npz"))
        np.savez(files[-1], **feed)
    return Case(compiled, groups, feeds, outputs, kept, files)


def parity(path: Path, case: Case) -> dict[str, Any]:
    """Largest difference of a judged sample, samples whose kept sets differ, samples that overflow, and the shapes met."""
    gap, over_gap, flips, overflow = 0.0, 0.0, 0, 0
    shapes: set[tuple[int, ...]] = set()
    alive: list[int] = []
    with load(path, threads=1) as engine:
        for group, feed, wanted, masks in zip(case.groups, case.feeds, case.outputs, case.kept, strict=True):
            outputs, kept = engine.kept_each(**feed)
            shapes.add((next(iter(feed.values())).shape[1], *kept[0].stored))
            for got, want, have, truth in zip(split(outputs, group, {}), wanted, kept, masks, strict=True):
                off = max(float(np.nan_to_num(np.abs(got[name] - want[name]), nan=np.inf).max()) for name in want)
                alive.append(have.counts[-1])
                if any(have.lost):
                    overflow, over_gap = overflow + 1, max(over_gap, off)
                elif any((a != b).any() for a, b in zip(have.masks, truth.masks, strict=True)):
                    flips += 1
                else:
                    gap = max(gap, off)
    return {
        "max_abs": gap, "flipped": flips, "overflow": overflow, "overflow_gap": over_gap, "samples": sum(map(len, case.groups)),
        "least_alive": min(alive), "shapes": len(shapes), "input_shapes": len({one[0] for one in shapes}),
        "site_shapes": [len({one[i] for one in shapes}) for i in range(1, len(next(iter(shapes))))],
    }  # fmt: skip


def memory(path: Path, case: Case) -> dict[str, float]:
    """MB after opening, and at most while the stream ran."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path), *case.files], capture_output=True, text=True, check=True)
    opened, most = (float(part) for part in done.stdout.split())
    return {"opened_mb": round(opened, 1), "peak_mb": round(most, 1)}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Compile once a batch policy, build and measure every combination."""
    samples = load_data("docstrings:stream", model_folder(), 256, options.samples)
    texts = [s for s in load_data("docstrings:calibration", model_folder(), 256) if s.length >= 64][:40]
    found: list[dict[str, Any]] = []
    for batch in options.batches:
        print(f"compile for batch {batch}", file=sys.stderr, flush=True)
        case = prepare(batch, samples, folder)
        counts = calibrate(case.compiled.compact, texts, QUANTILE)
        for target in options.targets:
            rows, plans = [], []
            for lowering, form in product(options.lowerings, options.forms):
                plan = Plan(
                    lowering, form, buckets=LADDER if lowering == "bucketed" else (), counts=counts if lowering == "static" else (),
                    square=lowering != "static" and RULES[target].square,
                )  # fmt: skip
                out = folder / f"{target}-{batch}-{lowering}-{form}"
                out.mkdir()
                build.trial(out, case.compiled, target, "fp32", plan)
                size = sum(entry.size for entry in read(out).manifest.files.values())
                how = {"target": target, "batch": batch, "lowering": lowering, "form": form}
                sizes = {"sizes": list(plan.buckets or plan.counts), "files": len(read(out).manifest.files), "bytes": size}
                rows.append({**how, **sizes, **parity(out, case), **memory(out, case)})
                plans.append((plan, out))
                print(rows[-1], file=sys.stderr, flush=True)
            found += [row | times(trial) for row, trial in zip(rows, time_in_turns(plans, case.feeds), strict=True)]
            write(found, options)
    return found


def write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """The JSON and the page, with what is measured so far."""
    document = {"samples": options.samples, "batch_sizes": SIZES, "quantile": QUANTILE, "thresholds": THRESHOLDS, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    before, after = options.page.read_text(encoding="utf-8").split(MARK)[::2]
    options.page.write_text(f"{before}{MARK}\n{table(rows)}\n{MARK}{after}", encoding="utf-8")


def times(trial: Trial) -> dict[str, float]:
    """A trial's times."""
    return {"cold_ms": round(trial.cold, 1), "warm_ms": round(trial.warm, 1), "noise": round(trial.noise, 3)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for one in rows:
        over = f"{one['overflow']} of {one['samples']}" if one["lowering"] == "static" else "none"
        figures = [
            f"{one['max_abs']:.1e}",
            over,
            f"{one['shapes']}; {one['input_shapes']}; {' '.join(map(str, one['site_shapes']))}",
            str(one["files"]),
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['opened_mb']:.0f} / {one['peak_mb']:.0f}",
            f"{one['cold_ms']:.0f} / {one['warm_ms']:.0f}",
        ]
        lines.append(f"| {one['target']} | {one['batch']} | {one['lowering']} | {one['form']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON and the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=ROOT / "benchmarks/results/lowerings.json",
        help="JSON to write (default: %(default)s)",
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs/lowerings.md", help="page whose table is replaced")
    parser.add_argument("--samples", type=int, default=12, help="texts of the stream (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--batches", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--lowerings", nargs="+", default=list(LOWERINGS), choices=LOWERINGS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure(options, Path(scratch))
    except TpcompileError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
