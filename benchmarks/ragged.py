"""Batches of mixed lengths against the same samples one by one: where padding eats the gain, and what grouping gives back.

    python benchmarks/ragged.py

MiniLM with LTP at FLOPs about /2.6 (as in streams.py) on the docstring stream, one thread. Every plan runs the same texts: one by one
through the bundle for one sample, one by one through the ragged bundle, and by 4 and by 16, in stream order and grouped by length.
Plans take turns within each pass, their order turning with the pass; the first pass is cold, figures are medians of the warm ones.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from streams import calibration_texts, choose, rising, sizes

from tpcompile import api
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample, batches, collate
from tpcompile.demo import model_folder
from tpcompile.engine import Engine, load
from tpcompile.errors import TpcompileError

RATIO = 2.6
PLANS = ((1, "stream"), (4, "stream"), (4, "length"), (16, "stream"), (16, "length"))


@dataclass(frozen=True)
class Plan:
    """One way to run the texts, with the engines it runs on.

    Attributes:
        name: as the table has it.
        pruned: the pruned engine.
        dense: its baseline.
        groups: the texts by inference.
    """

    name: str
    pruned: Engine
    dense: Engine
    groups: list[list[Sample]]

    def run(self, engine: Engine) -> float:
        """Milliseconds for all texts."""
        feeds = [collate(group) for group in self.groups]
        begin = perf_counter()
        for feed in feeds:
            engine(**feed)
        return (perf_counter() - begin) * 1e3

    def padding(self) -> dict[str, float]:
        """Rows the engine stores for each row that counts: at the input, and behind the sites (mean over sites)."""
        counts = api.counts(self.pruned.bundle.path, self.groups)
        held, real = sum(c.held or c.tokens for c in counts), sum(c.tokens for c in counts)
        stored, alive = sum(sum(c.stored) for c in counts), sum(sum(c.alive) for c in counts)
        return {"input": held / real, "sites": stored / alive}


def plans(folder: Path, target: str, samples: Sequence[Sample]) -> list[Plan]:
    """Every plan, its engines open."""
    opened = {name: (load(folder / name, threads=1), load(folder / name / "dense", threads=1)) for name in ("one", "ragged")}
    made = [Plan("one by one", *opened["one"], [[sample] for sample in samples])]
    for size, order in PLANS:
        groups = [[samples[i] for i in group] for group in batches(samples, size, by_length=order == "length")]
        name = "ragged, one by one" if size == 1 else f"by {size}, {'stream order' if order == 'stream' else 'by length'}"
        made.append(Plan(name, *opened["ragged"], groups))
    return made


def measure(made: Sequence[Plan], repeats: int) -> list[dict[str, Any]]:
    """Time every plan, dense and pruned, in turns."""
    jobs = [(plan, kind) for plan in made for kind in ("dense", "pruned")]
    times: dict[tuple[str, str], list[float]] = {(plan.name, kind): [] for plan, kind in jobs}
    for number in range(repeats + 1):
        turn = jobs[number % len(jobs) :] + jobs[: number % len(jobs)]
        for plan, kind in turn if number % 2 == 0 else turn[::-1]:
            times[plan.name, kind].append(plan.run(plan.pruned if kind == "pruned" else plan.dense))
    rows = []
    for plan in made:
        dense, pruned = (statistics.median(times[plan.name, kind][1:]) for kind in ("dense", "pruned"))
        rows.append(
            {
                "plan": plan.name,
                "dense_ms": dense,
                "pruned_ms": pruned,
                "speedup": dense / pruned,
                "pruned_cold_ms": times[plan.name, "pruned"][0],
                "padding": plan.padding(),
                "raw_ms": {kind: times[plan.name, kind] for kind in ("dense", "pruned")},
            }
        )
    best = rows[0]["pruned_ms"]
    return [{**row, "against_one_by_one": best / row["pruned_ms"]} for row in rows]


def table(target: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| {target} | dense ms | pruned ms | speed-up | pruned, against one by one | rows stored per row that counts: input / sites |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        padding = row["padding"]
        figures = f"{row['dense_ms']:.0f} | {row['pruned_ms']:.0f} | {row['speedup']:.2f} | {row['against_one_by_one']:.2f}"
        lines.append(f"| {row['plan']} | {figures} | {padding['input']:.2f} / {padding['sites']:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, time, print, write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ragged.json"), help="JSON to write (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=96, help="texts (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="warm passes (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", default=["onnx", "openvino"])
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    thresholds = choose(model_folder(), calibration_texts(), RATIO, rising(sizes(model_folder())["num_hidden_layers"]))
    document: dict[str, Any] = {"samples": options.samples, "repeats": options.repeats, "thresholds": thresholds, "rows": {}}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for target in options.targets:
                for policy in ("one", "ragged"):
                    out = Path(scratch) / target / policy
                    api.export(
                        model_folder(), out=out, target=target, method="ltp", parameters={"thresholds": thresholds}, batch=policy
                    )
                samples = load_data("docstrings:stream", out, 256, options.samples)
                document["rows"][target] = measure(plans(Path(scratch) / target, target, samples), options.repeats)
                print(table(target, document["rows"][target]), end="\n\n", flush=True)
    except TpcompileError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    options.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
