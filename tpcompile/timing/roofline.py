"""What this machine can do at best: float operations and bytes a second, measured once and kept in the user's cache folder."""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch

from tpcompile.files import replace_file

FILE = "roofline.json"
SIDE, MEGABYTES, TRIES = 768, 96, 12
"""Of the square product, of the copy, and of how often each is tried: the best counts, as other programs only slow it."""
DTYPES = {"bf16": torch.bfloat16}
"""Precision -> what is multiplied; float32 for any other."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """The best seen: 1e9 operations and 1e9 bytes a second, read and written."""

    gflops: float
    gbytes: float

    def floor_ms(self, flops: float, size: float) -> float:
        """The least time, in ms, for this work over these bytes."""
        return 1e3 * max(flops / (self.gflops * 1e9), size / (self.gbytes * 1e9))


def roofline(threads: int = 1, precision: str = "fp32", folder: Path | None = None) -> Roofline:
    """This machine's roofline, from the cache or measured now, which takes about a second.

    Args:
        threads: that compute.
        precision: of the product.
        folder: of the cache; default the user's.
    """
    from filelock import FileLock
    from platformdirs import user_cache_path

    path = (folder or user_cache_path("tpcompile")) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    key = f"{_cpu()}, {threads} threads, {precision}, torch {torch.__version__}"
    with FileLock(path.with_suffix(".lock")):
        known = _read(path)
        if key not in known:
            known[key] = measure(threads, precision)
            replace_file(path, json.dumps({name: asdict(one) for name, one in known.items()}, indent=1))
    return known[key]


def measure(threads: int, precision: str) -> Roofline:
    """Multiply and copy, and take the best."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (torch.ones(SIDE, SIDE, dtype=DTYPES.get(precision, torch.float32)) for _ in range(2))
        source = torch.ones(MEGABYTES << 18)
        target = torch.empty_like(source)
        product = min(_timed(lambda: torch.mm(a, b)) for _ in range(TRIES))
        copy = min(_timed(lambda: target.copy_(source)) for _ in range(TRIES))
    finally:
        torch.set_num_threads(before)
    return Roofline(2 * SIDE**3 / product / 1e9, 2 * source.nbytes / copy / 1e9)


def _timed(work: Callable[[], object]) -> float:
    begin = perf_counter()
    work()
    return perf_counter() - begin


def _read(path: Path) -> dict[str, Roofline]:
    """What is in the cache; a file that cannot be read is measured anew."""
    try:
        return {key: Roofline(**entry) for key, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
