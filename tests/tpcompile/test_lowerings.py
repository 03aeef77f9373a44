"""The benchmark of lowerings: what the page shows is what was measured, and every exact row is within the law."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tpcompile.proof.parity import TOLERANCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lowerings", ROOT / "benchmarks/lowerings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_was_measured(script: ModuleType) -> None:
    rows = json.loads((ROOT / "benchmarks/results/lowerings.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs/lowerings.md").read_text(encoding="utf-8")
    assert page.split(script.MARK)[1].strip() == script.table(rows)
    assert max(row["max_abs"] for row in rows) <= TOLERANCE
    assert {row["overflow"] for row in rows if row["lowering"] != "static"} == {0}
    assert min(row["least_alive"] for row in rows) > 0
