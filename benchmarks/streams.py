"""The table of design.md 10: dense and pruned on a stream of real texts, cold and warm, with FLOPs ratio and realisation.

    python benchmarks/streams.py                       exports MiniLM with LTP at FLOPs about /1.7, /2.6 and /5, then times it
    python benchmarks/streams.py out/onnx out/openvino  times bundles that are already there

The stream is 100 docstrings of 64 to 256 tokens in one order, one thread, ABBA (see ``tpcompile.latency``). Thresholds rise
linearly, theta * (l + 1) / L for layer l of L; theta is found by bisection on the calibration half of the docstrings, the stream comes
from the other half. Everything measured goes to a JSON file.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcompile import api, build, models
from tpcompile import bundle as bundles
from tpcompile.data import Sample, load_data
from tpcompile.demo import model_folder
from tpcompile.errors import BackendUnavailable, InputError, TpcompileError
from tpcompile.latency import Latency
from tpcompile.manifest import Manifest
from tpcompile.subject import subject_of

RATIOS = (1.7, 2.6, 5.0)
ENGINES = (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
CALIBRATION_TEXTS = 48
STEPS = 16
"""Halvings of theta: far finer than what one more kept token changes."""

Log = Callable[[str], None]


def rising(layers: int) -> list[float]:
    """The shape (l + 1) / L, growing with depth. Layer 0 prunes too: without it no threshold reaches /5 on six layers."""
    return [(layer + 1) / layers for layer in range(layers)]


@dataclass(frozen=True)
class Encoder:
    """The dense encoder with the sizes that LTP's formula needs."""

    model: nn.Module
    layers: int
    width: int
    inner: int

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read a model directory."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(models.load(folder).model, config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])

    def work(self, entering: int, staying: int) -> int:
        """Multiply-accumulates of one layer: its attention at the tokens that enter it, its MLP at those that stay."""
        return (4 * self.width * entering + 2 * entering**2 + 2 * self.inner * staying) * self.width

    def flops_ratio(self, samples: Sequence[Sample], thresholds: Sequence[float], n_ref: int | str = "length") -> float:
        """Dense / pruned over all samples, without padding, by the paper's formula."""
        pruned = models.prune(self.model, "ltp", thresholds=list(thresholds), n_ref=n_ref)
        full = kept = 0
        for sample in samples:
            trace = pruned.trace(**{name: torch.from_numpy(value) for name, value in sample.inputs.items()})
            counts = [sample.length, *(int(mask.sum()) for mask in trace.kept)]
            full += self.layers * self.work(sample.length, sample.length)
            kept += sum(self.work(entering, staying) for entering, staying in pairwise(counts))
        return full / kept


def choose(
    model: Encoder, samples: Sequence[Sample], target: float, shape: Sequence[float], n_ref: int | str = "length"
) -> list[float]:
    """Thresholds ``theta * shape`` whose FLOPs ratio on the samples is the target; theta by bisection.

    Raises:
        InputError: even thresholds that drop nearly every token do not reach the target.
    """
    low, high = 0.0, 1.0
    if model.flops_ratio(samples, [high * s for s in shape], n_ref) < target:
        raise InputError(f"no threshold reaches FLOPs /{target}", fix="ask for less, or use longer texts")
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if model.flops_ratio(samples, [middle * s for s in shape], n_ref) < target else (low, middle)
    return [high * s for s in shape]


def calibration_texts() -> list[Sample]:
    """Docstrings of 64 tokens or more from the calibration half."""
    return [s for s in load_data("docstrings:calibration", model_folder(), 256) if s.length >= 64][:CALIBRATION_TEXTS]


def export_all(folder: Path, ratios: Sequence[float], log: Log) -> list[Path]:
    """A bundle for every ratio and engine; one compilation for each ratio. What this machine cannot run is said and left out."""
    encoder = Encoder.load(model_folder())
    texts = calibration_texts()
    made = []
    schedules = [choose(encoder, texts, ratio, rising(encoder.layers)) for ratio in ratios]  # refused before anything is built
    for ratio, thresholds in zip(ratios, schedules, strict=True):
        log(f"FLOPs /{ratio}: last threshold {thresholds[-1]:.5f}; compiling")
        compiled = build.compile_subject(subject_of(model_folder(), None, None, "ltp", {"thresholds": thresholds}))
        for target, precision in ENGINES:
            out = folder / f"{target}-{precision}-{ratio:g}"
            try:
                with bundles.stage(out) as private:
                    build.fill(private, compiled, target, precision)
            except BackendUnavailable as error:
                log(f"left out {target} {precision}: {error}")
                continue
            made.append(out)
    return made


def row(manifest: Manifest, latency: Latency) -> dict[str, Any]:
    """One line of the table."""
    found: dict[str, Any] = {
        "engine": f"{manifest.target} {manifest.precision}",
        "method": manifest.method.model_dump(mode="json") if manifest.method else None,
        "identity": manifest.identity,
        "environment": manifest.environment,
        "latency": latency.to_json(),
    }
    for name, phase in (("cold", latency.cold), ("warm", latency.warm)):
        found |= {f"dense_{name}_ms": phase.dense.total, f"pruned_{name}_ms": phase.pruned.total}
        found |= {f"speedup_{name}": phase.speedup.value, f"realisation_{name}": phase.realisation.get("paper")}
    found["flops_ratio"] = latency.saving.paper if latency.saving else None
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| engine | FLOPs | dense cold / warm | pruned cold / warm | speed-up cold / warm | realisation cold / warm |",
        "|---|---|---|---|---|---|",
    ]
    for entry in rows:
        pairs = [
            " / ".join(
                "n/a" if entry[f"{kind}_{phase}{unit}"] is None else f"{entry[f'{kind}_{phase}{unit}']:{form}}"
                for phase in ("cold", "warm")
            )
            for kind, unit, form in (
                ("dense", "_ms", ".0f"),
                ("pruned", "_ms", ".0f"),
                ("speedup", "", ".2f"),
                ("realisation", "", ".2f"),
            )
        ]
        ratio = "n/a" if entry["flops_ratio"] is None else f"/{entry['flops_ratio']:.2f}"
        lines.append(f"| {entry['engine']} | {ratio} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def measure(paths: Sequence[Path], options: argparse.Namespace, log: Log) -> list[dict[str, Any]]:
    """Time every bundle against its own dense baseline."""
    rows = []
    for path in paths:
        log(f"timing {path.name}")
        latency = api.bench(
            path, data="docstrings:stream", samples=options.samples, repeats=options.repeats, threads=options.threads
        )
        rows.append(row(bundles.read(path).manifest, latency))
        log("\n".join(latency.sentences()))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, help="bundle directories; none: export MiniLM first")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out/streams.json"), help="JSON file to write (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=100, help="texts of the stream (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="warm passes, at least 2 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="per engine (default: %(default)s)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=list(RATIOS), help="FLOPs ratios to export (default: %(default)s)"
    )
    parser.add_argument("--keep", type=Path, help="folder to keep the exported bundles in")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        with tempfile.TemporaryDirectory() as scratch:
            paths = options.bundles or export_all(options.keep or Path(scratch), options.ratios, log)
            rows = measure(paths, options, log)
    except TpcompileError as error:
        log(str(error))
        return error.exit_code
    document = {"samples": options.samples, "repeats": options.repeats, "threads": options.threads, "rows": rows}
    options.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
