"""Can the verdict of ``bench`` be trusted here? Twenty comparisons of an engine with itself, twenty with a copy that takes 5 % longer.

    python benchmarks/verdicts.py                    writes benchmarks/results/verdicts.json
    python benchmarks/verdicts.py --bundle out/onnx  with another engine

The engine is the shipped vision transformer of digits in ONNX Runtime, one thread. Its copy busy-waits after each call for 5 % of the
original's median time. The intervals are the warm ones of ``tpcompile.timing.latency.bench``, whose words are "faster" and "slower" where
the interval excludes 1 by more than 1 %. Load of the machine stands beside the result.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from tpcompile import api
from tpcompile.bundle import read
from tpcompile.data.feeds import samples_of
from tpcompile.data.samples import Sample
from tpcompile.recipe import Recipe
from tpcompile.timing.alone import apart
from tpcompile.timing.latency import EFFECT, Latency, bench
from tpcompile.timing.turns import Clocked, Tick, tick

WORDS = {1: "faster", 0: "no clear difference", -1: "slower"}
LEAST_CONTAINED, MOST_FASTER, LEAST_SLOWER = 17, 1, 17
"""Of twenty: what the project promises."""


class Slowed:
    """An engine that busy-waits after each call."""

    def __init__(self, engine: Clocked, wait_ns: int) -> None:
        self._engine, self._wait = engine, wait_ns

    def __call__(self, index: int, /) -> Tick:
        """Compute, then burn the time."""
        one, late = self._engine(index), tick(self._burn)
        queued = None if one.queued is None or late.queued is None else one.queued + late.queued
        return Tick(one.wall + late.wall, one.cpu + late.cpu, queued, one.peak)

    def _burn(self) -> None:
        end = perf_counter_ns() + self._wait
        while perf_counter_ns() < end:
            pass

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def row(found: Latency) -> dict[str, Any]:
    """What one comparison said."""
    ratio = found.warm.speedup
    return {
        "ratio": round(ratio.value, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
        "contains_1": ratio.low <= 1 <= ratio.high,
        "word": WORDS[ratio.differs(found.effect)],
        "ruler": found.ruler,
        "waited": round(found.waited, 3),
        "load": round(os.getloadavg()[0], 1),
    }


def run(bundle: Path, runs: int, samples: Sequence[Sample], repeats: int, share: float) -> dict[str, list[dict[str, Any]]]:
    """Compare ``runs`` times with itself and with the slowed copy, in turns."""
    found: dict[str, list[dict[str, Any]]] = {"itself": [], "slowed": []}
    with apart([one.inputs for one in samples], threads=1) as opener:
        original = opener(bundle)
        for number in range(runs):
            same = bench(original, original, samples, repeats, seed=number)
            wait = int(share * 1e6 * float(np.median(same.warm.times.ruler)))
            late = bench(lambda wait=wait: Slowed(original(), wait), original, samples, repeats, seed=number)
            for name, latency in (("itself", same), ("slowed", late)):
                found[name].append(row(latency))
                print(f"{number + 1:>3} {name}  {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the JSON; 0 where the promise is kept, 10 where not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/verdicts.json"))
    parser.add_argument(
        "--bundle", type=Path, help="an engine that is there; default: the digits at half their tokens, exported first"
    )
    parser.add_argument("--runs", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument(
        "--slower", type=float, default=0.05, help="share of the median that the copy waits (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = options.bundle
        if bundle is None:
            recipe = Recipe.read(Path("digits-50"))
            bundle = Path(scratch) / "digits"
            api.export("tpcompile/digits-vit", out=bundle, method=recipe.method, parameters=recipe.parameters)
        samples = samples_of(read(bundle), None, options.samples, "docstrings:stream", truncate=False)
        found = run(bundle, options.runs, samples, options.repeats, options.slower)
    counted = {
        "itself_contains_1": sum(entry["contains_1"] for entry in found["itself"]),
        "itself_called_faster": sum(entry["word"] == "faster" for entry in found["itself"]),
        "itself_called_slower": sum(entry["word"] == "slower" for entry in found["itself"]),
        "slowed_called_slower": sum(entry["word"] == "slower" for entry in found["slowed"]),
    }
    settings = {
        "runs": options.runs,
        "samples": options.samples,
        "repeats": options.repeats,
        "slower": options.slower,
        "effect": EFFECT,
    }
    document = {"settings": settings, "cpus": os.cpu_count(), "machine": platform.machine(), "counted": counted, **found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(counted))
    share = options.runs / 20
    kept = (
        counted["itself_contains_1"] >= LEAST_CONTAINED * share
        and counted["itself_called_faster"] <= MOST_FASTER * share
        and counted["slowed_called_slower"] >= LEAST_SLOWER * share
    )
    return 0 if kept else 10


if __name__ == "__main__":
    sys.exit(main())
