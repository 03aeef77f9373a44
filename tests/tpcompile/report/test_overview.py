"""A folder of bundles: who is on the front, what the page shows, what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tpcompile import api
from tpcompile.errors import UsageError
from tpcompile.report import overview
from tpcompile.report.overview import Entry, entry, front, write_overview

EVIL = "<script>alert(1)</script>&\"'"


def row(name: str, ms: float, quality: float | None, measure: str = "recall@1", **changes: Any) -> Entry:
    speedup = {"value": 20 / ms, "low": 19 / ms, "high": 21 / ms}
    given = {"dense_ms": 20.0, "speedup": speedup, "dense_quality": 0.7, "parity": "PASSED", "page": "", **changes}
    return Entry(name, "onnx, fp32", ms, quality=quality, measure=measure, **given)


def test_the_front_holds_what_nothing_beats() -> None:
    rows = [
        row("fast", 5, 0.5),
        row("good", 10, 0.65),
        row("beaten", 11, 0.6),
        row("other", 30, 0.1, "accuracy"),
        row("none", 1, None),
        row("elsewhere", 12, 0.4, tokens=(5, 9)),
    ]
    assert [one.name for one in front(rows) if one.best] == ["fast", "good", "other", "elsewhere"]
    assert all(one.best for one in front([row("twin", 5, 0.5), row("twin2", 5, 0.5)]))


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    rows = [row(EVIL, 5, 0.5, page="a b/reports/report.html"), row("slow", 30, 0.65), row("none", 7, None, "")]
    html = write_overview(rows, tmp_path / "overview.html", EVIL).read_text("utf-8")
    assert "<script" not in html
    assert not re.search(r"https?://|url\(|@import", html)
    assert 'href="a%20b/reports/report.html"' in html
    assert html.count("<svg") == 1
    assert "slow: 30.00 ms, 0.650" in html
    assert "nan" not in " ".join(re.findall(r'points="([^"]*)"', html))
    assert '<span class="slow">0.67\u00d7</span>' in html


def test_a_folder_of_bundles_gets_a_page(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    """Reports that are there are read, not made again."""
    for name, source in text_bundles.items():
        (tmp_path / name / "reports").mkdir(parents=True)
        for path in source.iterdir():
            if path.name != "reports":
                (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / name / path.name)
        phase = {"pruned": {"mean": 5.0}, "dense": {"mean": 10.0}, "speedup": {"value": 2.0, "low": 1.9, "high": 2.1}}
        (tmp_path / name / "reports" / "bench.json").write_text(json.dumps({"warm": phase, "tokens": [8, 9]}), encoding="utf-8")
        task = {"name": "recall@1", "dense": 0.7, "pruned": 0.6, "agreement": 0.8}
        (tmp_path / name / "reports" / "validate.json").write_text(
            json.dumps({"verdict": "PASSED", "task": task}), encoding="utf-8"
        )
    page = api.report(tmp_path)
    assert page == tmp_path / "overview.html"
    html = page.read_text("utf-8")
    assert all(name in html for name in text_bundles)
    assert "Latency against recall@1" in html
    assert not list(tmp_path.glob("*/reports/report.html"))


def test_what_cannot_be_read_is_refused(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds none"):
        api.report(tmp_path)
    (tmp_path / "reports").mkdir()
    for name in ("bench", "validate"):
        (tmp_path / "reports" / f"{name}.json").write_text("{}", encoding="utf-8")
    found = replace(overview.read(text_bundles["onnx"]), path=tmp_path)
    with pytest.raises(UsageError, match="cannot be read") as caught:
        entry(found, tmp_path.parent)
    assert "tpcompile report" in caught.value.fix
