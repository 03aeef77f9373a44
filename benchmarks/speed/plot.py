"""docs/performance.svg: the speed-up of every cell over its FLOPs ratio."""

from collections.abc import Sequence
from math import log

from figures import Document, figures

WIDE, HIGH, LEFT, TOP = 520, 440, 46, 28
"""Of the plot's area, in pixels, and the room for its names."""
FROM, TO = 1.0, 9.0
"""Of both axes, which are logarithmic."""
TICKS = (1, 1.5, 2, 3, 4, 6, 8)
KEPT = (1.0, 0.8, 0.6)
"""Shares of the FLOPs ratio that become time: a line each."""
COLOURS = {"onnx-fp32": "#1f6fb4", "openvino-fp32": "#d9730d", "openvino-bf16": "#8a3fa0"}
SHAPES = {
    "minilm": ("MiniLM", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z"), "bert": ("BERT-base", "M-5 -5H5V5H-5Z"),
    "deit-s": ("DeiT-S", "M0 -6L6 5H-6Z"), "deit-b": ("DeiT-B", "M0 -7L7 0L0 7L-7 0Z"),
}  # fmt: skip
"""Beginning of a workload's name -> what it is called, and its mark."""


def plot(documents: Sequence[Document]) -> str:
    """Marks where engines are warm, with a line to their cold pass; hollow ones run batches or two threads."""
    width, height = LEFT + WIDE + 150, TOP + HIGH + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="16">speed-up over our dense engine</text>',
        f'<text x="{LEFT}" y="{height - 8}">FLOPs by the papers\' formula, dense / pruned</text>',
        *_axes(),
        *(_mark(document) for document in documents),
        *_legend(),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _at(ratio: float, speedup: float) -> tuple[float, float]:
    across, up = (log(value / FROM) / log(TO / FROM) for value in (ratio, max(speedup, FROM)))
    return round(LEFT + WIDE * across, 1), round(TOP + HIGH * (1 - up), 1)


def _axes() -> list[str]:
    found = []
    for tick in TICKS:
        (x, low), (left, y) = _at(tick, FROM), _at(FROM, tick)
        found += [
            f'<path d="M{x} {TOP}V{low}M{left} {y}H{LEFT + WIDE}" stroke="#e4e4e4"/>',
            f'<text x="{x}" y="{low + 16}" text-anchor="middle">{tick}</text>',
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick}</text>',
        ]
    for kept in KEPT:
        (x, y), (right, top) = _at(FROM / kept, FROM), _at(TO, TO * kept)
        found += [
            f'<path d="M{x} {y}L{right} {top}" stroke="#777" stroke-dasharray="{"none" if kept == 1 else "4 4"}"/>',
            f'<text x="{right + 4}" y="{top + 4}">{kept:.0%} realised</text>',
        ]
    return found


def _mark(document: Document) -> str:
    cell, found, ratio = document["cell"], figures(document), document["flops"]["paper"]
    (x, warm), (_, cold) = (_at(ratio, found.speedup[phase]) for phase in ("warm", "cold"))
    colour, shape = COLOURS[cell["engine"]], next(mark for name, (_, mark) in SHAPES.items() if cell["workload"].startswith(name))
    filled = colour if cell["batch"] == cell["threads"] == 1 else "white"
    told = f"{cell['name']}: FLOPs /{ratio:.2f}, {found.speedup['cold']:.2f} cold, {found.speedup['warm']:.2f} warm"
    return (
        f'<g stroke="{colour}"><title>{told}</title><path d="M{x} {warm}V{cold}"/>'
        f'<path d="{shape}" transform="translate({x} {warm})" fill="{filled}" fill-opacity="0.8"/></g>'
    )


def _legend() -> list[str]:
    marks = [(name, shape, "#555") for name, shape in SHAPES.values()]
    marks += [(name, SHAPES["minilm"][1], colour) for name, colour in COLOURS.items()]
    found = []
    for row, (name, shape, colour) in enumerate(marks):
        x, y = LEFT + 16, TOP + 16 + 20 * row
        found.append(f'<path d="{shape}" transform="translate({x} {y})" fill="{colour}"/><text x="{x + 12}" y="{y + 4}">{name}</text>')
    return found
