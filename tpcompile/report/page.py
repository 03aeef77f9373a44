"""One HTML file that shows a bundle's proof: tokens alive, what was kept, parity, latency, hashes. No scripts, nothing from outside.

Every string that comes from a model, a text or a manifest is escaped by the template. The charts are computed here as plain
numbers; the template writes them as inline SVG.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.files import replace_file
from tpcompile.manifest import Manifest
from tpcompile.proof.keptsets import KeptSets
from tpcompile.proof.parity import Parity
from tpcompile.report import patchview
from tpcompile.report.waterfall import waterfall
from tpcompile.spec import Patches
from tpcompile.timing.latency import Latency, Phase

if TYPE_CHECKING:
    from jinja2 import Environment

WIDTH, HEIGHT = 640.0, 270.0
MARGINS = (46.0, 20.0, 26.0, 38.0)
"""Left, right, top, bottom of a chart."""

BAND = (5, 25, 50, 75, 95)
"""Percentiles of the share of tokens alive that the first chart draws."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a sample text.

    Attributes:
        text: its characters; a special token's name.
        gap: what stands before it: spaces, line breaks.
        level: number of sites it survived; the deepest of its pieces counts.
        special: it is a special token, not part of the text.
    """

    text: str
    gap: str
    level: int
    special: bool = False


@dataclass(frozen=True, slots=True)
class WordTrace:
    """A sample text with the depth of every word.

    Attributes:
        words: in order.
        tokens: at the input.
        alive: after each site.
    """

    words: tuple[Word, ...]
    tokens: int
    alive: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """What one site left of an image.

    Attributes:
        gone: the dropped patches, as an SVG path in units of patches.
        counts: ``11 of 16 patches, 1 of 1 prefix tokens``.
    """

    gone: str
    counts: str


@dataclass(frozen=True, slots=True)
class PatchTrace:
    """A sample image with the patches every site kept.

    Attributes:
        name: where it came from.
        image: the image as the model sees it, a ``data:`` URI.
        width: of the image.
        height: of the image.
        rows: of patches.
        columns: of patches.
        tokens: at the input.
        alive: after each site.
        panels: per site.
    """

    name: str
    image: str
    width: int
    height: int
    rows: int
    columns: int
    tokens: int
    alive: tuple[int, ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, eq=False)
class EngineRun:
    """One bundle with what was measured on it."""

    manifest: Manifest
    parity: Parity
    latency: Latency

    @property
    def name(self) -> str:
        """``onnx fp32``."""
        return f"{self.manifest.target} {self.manifest.precision}"


@dataclass(frozen=True, eq=False)
class ReportData:
    """All that a report shows.

    Attributes:
        title: its heading.
        runs: one bundle or more of the same pruned model.
        traces: sample texts with their kept words, or sample images with their kept patches.
        notes: sentences for the summary, such as how the thresholds were chosen.
    """

    title: str
    runs: tuple[EngineRun, ...]
    traces: tuple[WordTrace, ...] | tuple[PatchTrace, ...] = ()
    notes: tuple[str, ...] = ()


def trace_words(sample: Sample, kept: KeptSets) -> WordTrace:
    """Join a sample's word pieces to words and say how deep each survives.

    Args:
        sample: with its tokenizer's spans, words and pieces.
        kept: masks bool ``[N]`` per site, each within the one before.
    """
    depth = np.sum([*kept.masks, np.zeros(sample.length, dtype=bool)], axis=0, dtype=int)
    words: list[Word] = []
    end, index = 0, 0
    while index < sample.length:
        last = index + 1
        while sample.words[index] is not None and last < sample.length and sample.words[last] == sample.words[index]:
            last += 1
        level = int(depth[index:last].max())
        if sample.words[index] is None:
            words.append(Word(sample.pieces[index], " " if words else "", level, special=True))
        else:
            start, stop = sample.spans[index][0], sample.spans[last - 1][1]
            words.append(
                Word(sample.text[start:stop], sample.text[end:start] or (" " if words and words[-1].special else ""), level)
            )
            end = stop
        index = last
    return WordTrace(tuple(words), sample.length, kept.counts)


def trace_patches(sample: Sample, kept: KeptSets, patches: Patches) -> PatchTrace:
    """Lay what every site kept over a sample's picture.

    Args:
        sample: with its picture.
        kept: masks bool ``[N]`` per site.
        patches: which part of the image each token is.

    Raises:
        UsageError: the sample is no image.
        IntegrityError: the masks are over another number of tokens.
    """
    if sample.picture is None:
        raise UsageError("the sample is no image", fix="use trace_words for a text")
    height, width = sample.picture.shape[:2]
    panels = tuple(Panel(patchview.path(patchview.grid(mask, patches)), patchview.counts(mask, patches)) for mask in kept.masks)
    image = "data:image/png;base64," + base64.b64encode(patchview.png(sample.picture)).decode("ascii")
    return PatchTrace(
        sample.text, image, width, height, patches.rows, patches.columns, patches.tokens, tuple(kept.counts), panels
    )


def render(data: ReportData) -> str:
    """The report as one HTML document."""
    first = data.runs[0]
    stages = ("input", *(stage_name(site.module or site.name) for site in first.manifest.sites))
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            stages=stages,
            things=_things(first.manifest),
            drawn=first.manifest.patches is not None,
            veil=f"rgb({patchview.SHADE} {patchview.SHADE} {patchview.SHADE} / {patchview.WEIGHT})",
            alive=_alive_chart(first.parity, stages),
            curves={run.name: {name: _curves(phase) for name, phase in _phases(run.latency)} for run in data.runs},
            falls={run.name: steps for run in data.runs if (steps := waterfall(run.latency))},
            phases=_phases,
            width=WIDTH,
            height=HEIGHT,
        )
    )


def _things(manifest: Manifest) -> tuple[str, str]:
    """What a sample is called, one and many; a spectrogram ``[B, T, F]`` has no channels."""
    if manifest.patches is None:
        return "text", "texts"
    return ("recording", "recordings") if any(len(spec.shape) == 3 for spec in manifest.inputs) else ("image", "images")


def environment() -> "Environment":
    """The templates; every value is escaped, and none may be missing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(loader=PackageLoader("tpcompile.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found.filters.update(sci=_sci, pct=_pct, ms=_ms, plain=_facts)
    return found


def write(data: ReportData, path: Path) -> Path:
    """Write the report whole or not at all, and return its path."""
    return replace_file(path, render(data))


@dataclass(frozen=True, slots=True)
class AliveChart:
    """Share of tokens alive by stage, as points of an SVG of ``WIDTH`` x ``HEIGHT``.

    Attributes:
        outer: polygon of the 5th to the 95th percentile.
        inner: polygon of the quartiles.
        line: polyline of the share of all texts' tokens together.
        dots: per stage: x, y, name, that share, median over texts, 5th and 95th percentile, mean tokens.
        grid: y and label of each rule.
    """

    outer: str
    inner: str
    line: str
    dots: tuple[Mapping[str, Any], ...]
    grid: tuple[tuple[float, str], ...]


def _alive_chart(parity: Parity, stages: Sequence[str]) -> AliveChart:
    left, right, top, bottom = MARGINS
    counts = np.array([(record.tokens, *record.alive) for record in parity.samples], dtype=np.float64)
    low, lower, median, upper, high = np.percentile(counts / counts[:, :1], BAND, axis=0)
    share = counts.sum(axis=0) / counts[:, 0].sum()
    xs = np.linspace(left, WIDTH - right, len(stages)) if len(stages) > 1 else np.array([WIDTH / 2])

    def y(part: NDArray[np.float64] | float) -> Any:
        return top + (HEIGHT - top - bottom) * (1 - part)

    def band(bottom_edge: NDArray[np.float64], top_edge: NDArray[np.float64]) -> str:
        return _points(np.concatenate([xs, xs[::-1]]), y(np.concatenate([top_edge, bottom_edge[::-1]])))

    fields = {"x": xs, "y": y(share), "share": share, "median": median, "low": low, "high": high, "mean": counts.mean(axis=0)}
    dots = tuple({"name": name, **{key: float(values[i]) for key, values in fields.items()}} for i, name in enumerate(stages))
    grid = tuple((float(y(part)), f"{part:.0%}") for part in (0.0, 0.25, 0.5, 0.75, 1.0))
    return AliveChart(band(low, high), band(lower, upper), _points(xs, y(share)), dots, grid)


@dataclass(frozen=True, slots=True)
class Curves:
    """Cumulative distributions of one phase, as polylines.

    Attributes:
        dense: steps of the dense engine's times.
        pruned: steps of the pruned engine's.
        ticks: x and label on the time axis.
        medians: x of the two medians, dense and pruned.
    """

    dense: str
    pruned: str
    ticks: tuple[tuple[float, str], ...]
    medians: tuple[float, float]


def _curves(phase: Phase) -> Curves:
    left, right, top, bottom = MARGINS
    times = [np.sort(np.median(side, axis=0)) for side in phase.times.ruler]
    limit = nice(float(np.quantile(np.concatenate(times), 0.995)))

    def x(values: NDArray[np.float64] | float) -> Any:
        return left + (WIDTH - left - right) * np.minimum(values, limit) / limit

    def steps(values: NDArray[np.float64]) -> str:
        share = np.repeat(np.arange(len(values) + 1) / len(values), 2)[1:-1]
        ends = np.repeat(values, 2)
        xs, ys = np.concatenate([[0.0], ends, [limit]]), np.concatenate([[0.0], share, [1.0]])
        return _points(x(xs), top + (HEIGHT - top - bottom) * (1 - ys))

    ticks = tuple((float(x(limit * i / 4)), f"{limit * i / 4:g}") for i in range(5))
    return Curves(steps(times[0]), steps(times[1]), ticks, (float(x(np.median(times[0]))), float(x(np.median(times[1])))))


def nice(value: float) -> float:
    """The next larger of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8 times a power of ten: quarters of it are short numbers."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-6)))
    return float(next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12) if step * power >= value))


def _points(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _phases(latency: Latency) -> tuple[tuple[str, Phase], ...]:
    return ("cold", latency.cold), ("warm", latency.warm)


def stage_name(module: str) -> str:
    """``encoder.layer.3`` -> ``layer 3``, whatever the list of layers is called; other names as they are."""
    found = re.findall(r"\.(\d+)(?:\.|$)", module)
    return f"layer {found[-1]}" if found else module


def _sci(value: float | None) -> str:
    return "not finite" if value is None or not np.isfinite(value) else "0" if value == 0 else f"{value:.1e}"


def _pct(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"  # noqa: RUF001  a dash stands for "too few samples"


def _facts(value: Any) -> str:
    """A JSON value in one line of plain text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_facts(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_facts(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
