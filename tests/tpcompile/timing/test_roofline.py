"""The roofline: positive, measured once, and a broken cache is no obstacle."""

from pathlib import Path

import pytest

from tpcompile.timing import roofline as module
from tpcompile.timing.roofline import FILE, Roofline, roofline


def test_it_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIDE", 64)
    monkeypatch.setattr(module, "MEGABYTES", 1)
    first = roofline(1, "fp32", tmp_path)
    assert first.gflops > 0 < first.gbytes
    assert roofline(1, "fp32", tmp_path) == first
    assert roofline(1, "bf16", tmp_path) != first
    (tmp_path / FILE).write_text("{not json", encoding="utf-8")
    assert roofline(1, "fp32", tmp_path).gflops > 0


def test_the_floor_is_the_slower_of_both():
    machine = Roofline(100.0, 10.0)
    assert machine.floor_ms(1e9, 1e6) == pytest.approx(10.0)
    assert machine.floor_ms(1e6, 1e9) == pytest.approx(100.0)
