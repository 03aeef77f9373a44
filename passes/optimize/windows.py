"""Windows: which part of a tensor a reader wants, and what part of its operands an op needs to give it.

A window is a tuple of ``(dim, start, stop)``, in the order of dims. Dims that it leaves out are wanted whole: ``()`` is all of a tensor.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.axesmap import Described
from tpcompile.passes.rules import bind
from tpcompile.passes.rules.base import size
from tpcompile.passes.rules.views import groups

aten = torch.ops.aten
Window = tuple[tuple[int, int, int], ...]
TOKENS = 64
SELECT, SLICE, RESHAPE = aten.select.int, aten.slice.Tensor, aten.reshape.default


def window(node: fx.Node, dims: Iterable[tuple[int, int, int]]) -> Window:
    """The window of a tensor, without dims that it takes whole."""
    shape = node.meta["val"].shape
    return tuple(sorted((d, a, b) for d, a, b in dims if not (isinstance(shape[d], int) and (a, b) == (0, shape[d]))))


def within(inner: Window, outer: Window) -> bool:
    """Whether a window lies in another of the same tensor."""
    limits = {d: (a, b) for d, a, b in inner}
    return all(d in limits and a <= limits[d][0] and limits[d][1] <= b for d, a, b in outer)


def inside(inner: Window, outer: Window) -> Window:
    """A window as seen from one that it lies in; a dim that they share whole is left out."""
    first = {d: (a, b) for d, a, b in outer}
    moved = [(d, a - first.get(d, (0, 0))[0], b - first.get(d, (0, 0))[0]) for d, a, b in inner if first.get(d) != (a, b)]
    return tuple(sorted(moved))


def share(node: fx.Node, part: Window) -> float:
    """The share of a tensor that a window takes; a dim whose size is not fixed counts as ``TOKENS``."""
    sizes = [node.meta["val"].shape[d] for d, _, _ in part]
    return math.prod((b - a) / (s if isinstance(s, int) else TOKENS) for (_, a, b), s in zip(part, sizes, strict=True))


def read(node: fx.Node) -> tuple[int, int, int] | None:
    """The dim, the start and the stop that a ``select`` or ``slice`` reads, where they are numbers counted from the front."""
    if node.target is not SELECT and node.target is not SLICE:
        return None
    given = bind(SELECT if node.target is SELECT else SLICE, node.args, node.kwargs)
    shape = [size(s) for s in given["self"].meta["val"].shape]  # sympy: comparing torch's sizes would fix the dynamic ones
    start = given["index"] if node.target is SELECT else given.get("start") or 0
    stop = given.get("end") if node.target is SLICE else start + 1 if isinstance(start, int) else None
    if not isinstance(start, int) or not isinstance(stop, int) or not 0 <= start < stop or given.get("step", 1) != 1:
        return None
    dim, result = int(given.get("dim", 0)) % len(shape), [size(s) for s in node.meta["val"].shape]
    full = node.target is SLICE and (result == shape or result[dim] != stop - start)  # to the end, wherever that is
    return None if full else (dim, start, stop)


def needed(call: Described, wanted: Window) -> list[Window] | None:
    """The window of each operand that gives a window of the result; None where only whole operands do."""
    if call.factors is None or call.node.target in (PRUNE, RESTORE) or not isinstance(call.node.meta["val"], torch.Tensor):
        return None
    if (reading := read(call.node)) is not None:
        return [_through_read(call.node, reading, wanted)]
    found: list[list[tuple[int, int, int]]] = [[] for _ in call.operands]
    bound = {*call.factors.rigid, *call.factors.folds, *call.factors.reads}
    for d, start, stop in wanted:
        factor = call.factors.outs[0][d]
        if factor is not None and factor not in bound:
            for i, _ in enumerate(call.operands):
                found[i] += [(own, start, stop) for own in call.of(i, factor)]
        elif call.node.target is RESHAPE and (split := _split(call.node, d)) is not None:
            source, each = split
            found[0].append((source, start * each, stop * each))
        else:
            return None
    return [window(n, dims) for n, dims in zip(call.operands, found, strict=True)]


def _through_read(node: fx.Node, reading: tuple[int, int, int], wanted: Window) -> Window:
    """What a ``select`` or ``slice`` needs of its operand for a window of its result."""
    dim, start, stop = reading
    gone = node.target is SELECT
    dims = {d + (gone and d >= dim): (a, b) for d, a, b in wanted}
    a, b = dims.pop(dim, (0, stop - start)) if not gone else (0, 1)
    source: Any = node.args[0]
    return window(source, [(dim, start + a, start + b), *((d, a, b) for d, (a, b) in dims.items())])


def _split(node: fx.Node, dim: int) -> tuple[int, int] | None:
    """Of a reshape that splits one dim, with ``dim`` the first of its parts: that dim, and how many of its elements one step takes."""
    source: Any = node.args[0]
    ins, outs = [size(s) for s in source.meta["val"].shape], [size(s) for s in node.meta["val"].shape]
    for a, b in groups(ins, outs):
        inner = [outs[d] for d in b[1:]]
        if len(a) == 1 and b[0] == dim and len(b) > 1 and all(s.is_Integer for s in (outs[dim], *inner)):
            return a[0], math.prod(int(s) for s in inner)
    return None
