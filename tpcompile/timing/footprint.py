"""Peak memory of an engine, in a process of its own: in a process with two engines nobody can tell whose a page is."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tpcompile.data.samples import Sample
from tpcompile.errors import BuildFailed, TpcompileError

CLEAR = Path("/proc/self/clear_refs")
"""Linux's way to forget a process's peak; elsewhere nothing is measured."""
SHAPES = 16
"""Inputs that are run: the longest, and others spread over the lengths."""


def peaks(bundles: Mapping[str, Path], samples: Sequence[Sample], threads: int) -> dict[str, float]:
    """Peak MB of each engine over what its process held before it was loaded; empty where the system does not say.

    Args:
        bundles: name -> bundle.
        samples: the stream.
        threads: of each engine.

    Raises:
        BuildFailed: the other process failed.
    """
    if not CLEAR.exists():
        return {}
    by_length = sorted(samples, key=lambda sample: sample.length)
    chosen = [by_length[i] for i in np.unique(np.linspace(len(by_length) - 1, 0, SHAPES).astype(int))]
    with tempfile.TemporaryDirectory() as scratch:
        feeds = Path(scratch) / "feeds.npz"
        arrays = {f"{i}/{name}": value for i, sample in enumerate(chosen) for name, value in sample.inputs.items()}
        np.savez(feeds, allow_pickle=False, **arrays)
        return {name: _ask(path, feeds, threads) for name, path in bundles.items()}


def _ask(bundle: Path, feeds: Path, threads: int) -> float:
    command = [sys.executable, "-P", "-m", "tpcompile.timing.footprint", str(bundle), str(feeds), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BuildFailed(
            f"{bundle} failed in a process of its own: {said[0]}", fix="pass --no-memory, or look at `tpcompile run`"
        )
    return float(json.loads(done.stdout.splitlines()[-1]))


def _main(bundle: str, feeds: str, threads: str) -> None:
    """Print the MB that the engine adds to this process at its peak."""
    from tpcompile.engine import load

    with np.load(feeds, allow_pickle=False) as archive:
        rows: dict[str, dict[str, np.ndarray]] = {}
        for key in archive.files:
            number, _, name = key.partition("/")
            rows.setdefault(number, {})[name] = archive[key]
    CLEAR.write_text("5")  # the peak starts anew at what is held now
    before = _peak()
    with load(bundle, threads=int(threads)) as engine:
        for feed in rows.values():
            engine(**feed)
        print(json.dumps(_peak() - before))


def _peak() -> float:
    """The most that this process held, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except TpcompileError as error:
        raise SystemExit(error.message) from error
