"""Memory of an engine, in a process of its own."""

from pathlib import Path

import numpy as np
import pytest

from tpcompile.data.samples import Sample
from tpcompile.errors import BuildFailed
from tpcompile.timing.footprint import CLEAR, peaks

ROWS = [Sample("", {"pixel_values": np.full((1, 1, 8, 8), 0.5, dtype=np.float32)}, tokens=17)]

pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="this system does not tell a process's peak memory")


def test_memory_is_measured(image_bundle: Path) -> None:
    found = peaks({"dense": image_bundle / "dense", "pruned": image_bundle}, ROWS, threads=1)
    assert set(found) == {"dense", "pruned"}
    assert all(0 < size < 1000 for size in found.values())


def test_what_the_other_process_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="holds no usable") as caught:
        peaks({"pruned": tmp_path}, ROWS, threads=1)
    assert "--no-memory" in caught.value.fix
