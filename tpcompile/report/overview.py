"""One HTML file for a folder of bundles: which of them is worth taking, by latency and quality. Written from the bundles' own reports."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpcompile.bundle import Bundle, read
from tpcompile.errors import UsageError
from tpcompile.files import replace_file
from tpcompile.report.page import HEIGHT, MARGINS, WIDTH, environment, nice

MANIFEST, PAGE = "tpcompile.json", Path("reports") / "report.html"


@dataclass(frozen=True)
class Entry:
    """One bundle.

    Attributes:
        name: its folder.
        manifest_line: target, precision, method and lowering in one line.
        ms: a sample of the warm stream, pruned.
        dense_ms: the same, dense.
        speedup: warm, with its interval.
        quality: the task's score of the pruned model, or its agreement with dense.
        dense_quality: of the dense model.
        measure: what the quality is.
        parity: verdict of ``validate``.
        page: its own report, relative to the folder; empty where there is none.
        tokens: lengths of the inputs that were timed: times over other inputs do not compare.
        best: no other bundle with the same measure and inputs is faster and no worse.
    """

    name: str
    manifest_line: str
    ms: float
    dense_ms: float
    speedup: Mapping[str, Any]
    quality: float | None
    dense_quality: float | None
    measure: str
    parity: str
    page: str
    tokens: tuple[int, ...] = ()
    best: bool = False

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What two bundles share that can be compared."""
        return self.measure, self.tokens


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of the picture."""

    x: float
    y: float
    name: str
    kind: str
    anchor: str


def bundles_in(folder: Path) -> list[Bundle]:
    """The bundles in a folder, by name.

    Raises:
        UsageError: there are none.
    """
    found = [read(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    if not found:
        raise UsageError(f"{folder} is no bundle and holds none", fix="pass a bundle, or a folder with bundles in it")
    return found


def measured(bundle: Bundle) -> bool:
    """Whether its reports hold what this page needs."""
    return all((bundle.path / "reports" / f"{name}.json").is_file() for name in ("bench", "validate"))


def entry(bundle: Bundle, folder: Path) -> Entry:
    """What a bundle's reports say.

    Raises:
        UsageError: they are of another version, or damaged.
    """
    try:
        bench, parity = (json.loads((bundle.path / "reports" / f"{n}.json").read_text("utf-8")) for n in ("bench", "validate"))
        warm, task = bench["warm"], parity["task"] or {}
        scored = task.get("pruned") is not None
        manifest = bundle.manifest
        parts = (
            manifest.target,
            manifest.precision,
            manifest.method.name if manifest.method else "",
            manifest.lowering,
            manifest.form,
        )
        return Entry(
            bundle.path.name, ", ".join(filter(None, parts)),
            warm["pruned"]["mean"], warm["dense"]["mean"], warm["speedup"],
            task.get("pruned") if scored else task.get("agreement"), task.get("dense") if scored else 1.0 if task else None,
            task.get("name", "") if scored else "agreement with dense", parity["verdict"],
            (bundle.path / PAGE).relative_to(folder).as_posix() if (bundle.path / PAGE).is_file() else "",
            tuple(bench["tokens"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the reports of {bundle.path} cannot be read: {error}", fix="run `tpcompile report` on that bundle"
        ) from error


def front(entries: Sequence[Entry]) -> list[Entry]:
    """The same, with those marked that nothing beats: faster and no worse, by the same measure on the same stream."""
    return [replace(one, best=one.quality is not None and not any(_beats(other, one) for other in entries)) for one in entries]


def _beats(other: Entry, one: Entry) -> bool:
    if other is one or other.key != one.key or other.quality is None or one.quality is None:
        return False
    better = (other.ms <= one.ms, other.quality >= one.quality)
    return all(better) and (other.ms, other.quality) != (one.ms, one.quality)


def write_overview(entries: Sequence[Entry], path: Path, title: str) -> Path:
    """Write the page whole or not at all, and return its path."""
    marked = front(entries)
    groups = [
        [one for one in marked if one.key == key and one.quality is not None] for key in dict.fromkeys(e.key for e in marked)
    ]
    charts = [(rows[0].measure, _chart(rows)) for rows in groups if rows]
    text = (
        environment()
        .get_template("overview.html.j2")
        .render(title=title, entries=marked, charts=charts, width=WIDTH, height=HEIGHT)
    )
    return replace_file(path, text)


@dataclass(frozen=True, slots=True)
class Chart:
    """Latency to the right, quality upwards.

    Attributes:
        dots: the bundles, and the dense engines beside them.
        line: polyline through those that nothing beats.
        xticks: x and label.
        yticks: y and label.
        said: all of it in words.
    """

    dots: tuple[Dot, ...]
    line: str
    xticks: tuple[tuple[float, str], ...]
    yticks: tuple[tuple[float, str], ...]
    said: str


def _chart(rows: Sequence[Entry]) -> Chart:
    left, right, top, bottom = MARGINS
    points = [(one.ms, one.quality or 0.0, one.name, "best" if one.best else "off") for one in rows]
    points += [(one.dense_ms, one.dense_quality, f"dense of {one.name}", "base") for one in rows if one.dense_quality is not None]
    limit = nice(max(ms for ms, *_ in points) * 1.05)
    low, high = min(q for _, q, *_ in points), max(q for _, q, *_ in points)
    pad = max(0.15 * (high - low), 0.01)
    low, high = low - pad, high + pad

    def x(ms: float) -> float:
        return round(left + (WIDTH - left - right) * ms / limit, 1)

    def y(quality: float) -> float:
        return round(top + (HEIGHT - top - bottom) * (high - quality) / (high - low), 1)

    dots = tuple(Dot(x(ms), y(q), name, kind, "end" if ms > 0.6 * limit else "start") for ms, q, name, kind in points)
    best = sorted((x(one.ms), y(one.quality or 0.0)) for one in rows if one.best)
    return Chart(
        dots,
        " ".join(f"{px},{py}" for px, py in best),
        tuple((x(limit * i / 4), f"{limit * i / 4:g}") for i in range(5)),
        tuple((y(low + (high - low) * i / 4), f"{low + (high - low) * i / 4:.3f}") for i in range(5)),
        "; ".join(f"{name}: {ms:.2f} ms, {q:.3f}" for ms, q, name, _ in points),
    )
