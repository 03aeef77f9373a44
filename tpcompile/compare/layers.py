"""Which inner value is the first to differ between two sides of the same model, when their outputs do?

Values of one name are compared on the rows of tokens that are alive on both sides: a side that gathers has fewer rows than one that masks.
Then the graph is walked from the outputs that differ back through values that differ; where all that a value was computed from agrees, the
fault lies between. A value that differs, but whose difference cancels before an output (a softmax's shift), is never reached.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.compare.graphdiff import WeightChange, compare_weight
from tpcompile.compare.graphview import Graph, Op, is_anonymous
from tpcompile.compare.watch import Batch, Law, Seen, Side
from tpcompile.errors import Where

CHUNK = 64
"""Inner values asked for at once: each is memory, and each set of them compiles the engine once."""
FEW = 36
"""Ways to lay a value's dims along token sets that are tried; with more the value is left out."""

Level = int | None
"""Which tokens a dim runs over: 0 all, i those stored after site i - 1; None: no tokens."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How far apart two values are.

    Attributes:
        max_abs: largest absolute difference.
        required: the smallest tolerance under which they count as equal.
        sample: number of the sample where it is largest.
    """

    max_abs: float = 0.0
    required: float = 0.0
    sample: int = -1


@dataclass(frozen=True)
class Root:
    """A value that differs though all it was computed from agrees.

    Attributes:
        name: of the value.
        where: module and user's line of the op that gives it.
        gap: the difference.
        inputs: the values it was computed from that were compared, and agree.
        ops: types of the ops between them and it, in order.
        weights: of those that these ops read, the ones that differ.
    """

    name: str
    where: Where
    gap: Gap
    inputs: tuple[str, ...]
    ops: tuple[str, ...]
    weights: tuple[WeightChange, ...] = ()


@dataclass(frozen=True)
class Found:
    """The result of ``locate``.

    Attributes:
        roots: in the order of the graph; empty where the outputs agree as soon as inner values are watched.
        compared: how many values were.
        skipped: how many of one name could not be: other shapes, or rows that no token set explains.
        dims: value -> the token set of each of its dims, as they were compared.
        gaps: value -> how far apart the sides are.
    """

    roots: tuple[Root, ...]
    compared: int
    skipped: int
    dims: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    gaps: Mapping[str, Gap] = field(default_factory=dict)


def locate(a: Side, b: Side, batches: Sequence[Batch], seen: tuple[Sequence[Seen], Sequence[Seen]], law: Law,
           progress: Callable[[int, int], None] = lambda done, total: None) -> Found:  # fmt: skip
    """Find where ``a`` leaves ``b``.

    Args:
        a: what is at fault; its graph is walked.
        b: what is right.
        batches: samples on which the outputs differ; others only add work.
        seen: what ``watch.observe`` saw of both sides.
        law: what counts as equal.
        progress: called with the values compared, and with all of them.
    """
    rows = _Rows(batches, *seen)
    gaps, dims = _compare(a, b, batches, rows, progress)
    bad = {name for name, gap in gaps.items() if gap.required > law.tolerance}
    graph = _Walk(a.graph, dims)
    roots = [graph.root(name, gaps[name], b) for name in graph.roots(bad & {*a.outputs, *a.taps}, bad)]
    shared = {name for name in a.graph.values if name in b.graph.values}
    return Found(tuple(roots), len(gaps), len(shared) - len(gaps), dims, gaps)


# --- rows -------------------------------------------------------------------------------------------------------------------


class _Rows:
    """Which rows of a stored dim hold the same tokens on both sides.

    Args:
        batches: the samples.
        a: what was seen of one side.
        b: of the other.
    """

    def __init__(self, batches: Sequence[Batch], a: Sequence[Seen], b: Sequence[Seen]) -> None:
        self.pairs: list[list[list[tuple[NDArray[np.int64], NDArray[np.int64]]]]] = []
        self.stored: list[list[tuple[int, int]]] = []
        for batch, one, other in zip(batches, a, b, strict=True):
            levels = min(len(one.positions[0]), len(other.positions[0]))
            self.stored.append([(one.positions[0][n].size, other.positions[0][n].size) for n in range(levels)])
            self.pairs.append([
                [common_rows(one, other, i, n, sample.length) for n in range(levels)] for i, sample in enumerate(batch.samples)
            ])  # fmt: skip
        self.levels = self._distinct(min(map(len, self.stored)))

    def _distinct(self, levels: int) -> list[int]:
        """The levels, without those whose rows are everywhere a later one's."""
        keys: dict[Any, int] = {}
        for n in range(levels):
            stored = tuple(sizes[n] for sizes in self.stored)
            keys[stored, tuple(part.tobytes() for batch in self.pairs for row in batch for part in row[n])] = n
        return sorted(keys.values())

    def options(self, shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], first: int) -> list[list[Level]]:
        """For each dim from ``first`` on, what it may run over, given a value's shapes on both sides for every batch."""
        found: list[list[Level]] = []
        for d in range(first, len(shapes[0][0])):
            sizes = [(x[d], y[d]) for x, y in shapes]
            fits: list[Level] = [
                n for n in self.levels if all(s == stored[n] for s, stored in zip(sizes, self.stored, strict=True))
            ]
            plain: list[Level] = [None] if all(x == y for x, y in sizes) else []
            found.append(fits + plain)
        return found


def common_rows(a: Seen, b: Seen, sample: int, level: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of one level on either side that hold the same living token of one sample, int64 ``[R]`` each."""
    ours, theirs = a.positions[sample][level], b.positions[sample][level]
    masks = [side.kept[sample].masks[level - 1] for side in (a, b) if level and side.kept]
    alive = np.zeros(max(ours.max(initial=0) + 1, theirs.max(initial=0) + 1, *map(len, masks)), dtype=bool)
    alive[:length] = True
    for mask in masks:
        alive[: len(mask)] &= mask
    _, rows, others = np.intersect1d(ours, theirs, return_indices=True)
    living = alive[ours[rows]]
    return rows[living].astype(np.int64), others[living].astype(np.int64)


# --- values -----------------------------------------------------------------------------------------------------------------


def _compare(
    a: Side, b: Side, batches: Sequence[Batch], rows: _Rows, progress: Callable[[int, int], None]
) -> tuple[dict[str, Gap], dict[str, tuple[Level, ...]]]:
    """The gap of every value that both sides have and that can be compared, and how its dims were laid along token sets."""
    names = _order(a, b)
    gaps: dict[str, Gap] = {}
    dims: dict[str, tuple[Level, ...]] = {}
    for start in range(0, len(names), CHUNK):
        part = names[start : start + CHUNK]
        shapes: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {name: [] for name in part}
        with ExitStack() as stack:
            sessions = [stack.enter_context(side.open([n for n in part if n not in side.outputs])) for side in (a, b)]
            for batch in batches:
                ours, theirs = _alike(*(session.run(batch.feeds) for session in sessions))
                for name in part:
                    shapes[name].append((ours[name].shape, theirs[name].shape))
            ways = {name: _ways(shapes[name], rows, batches) for name in part}
            found: dict[str, dict[tuple[Level, ...], Gap]] = {name: {way: Gap() for way in ways[name]} for name in part}
            for number, batch in enumerate(batches):
                ours, theirs = _alike(*(session.run(batch.feeds) for session in sessions))
                for name in part:
                    for way in ways[name]:
                        gap = _gap(ours[name], theirs[name], way, rows.pairs[number], batch)
                        found[name][way] = max(found[name][way], gap, key=lambda one: one.required)
        for name in part:
            if found[name]:
                dims[name] = min(found[name], key=lambda way: found[name][way].required)
                gaps[name] = found[name][dims[name]]
        progress(start + len(part), len(names))
    return gaps, dims


def _alike(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], ...]:
    """Both sides' values with a batch of one in front where only the other side wrote that down; see ``tpcompile/onnx/flat.py``."""
    a, b = dict(ours), dict(theirs)
    for one, other in ((a, b), (b, a)):
        for name in one.keys() & other.keys():
            if other[name].shape[:1] == (1,) and one[name].ndim == other[name].ndim - 1:
                one[name] = one[name][None]
    return a, b


def _order(a: Side, b: Side) -> list[str]:
    """One name that both sides know for every value of ``a``, in the order in which they are computed; outputs and taps keep theirs."""
    finals = {*a.outputs, *a.taps}
    named: dict[str, str] = {}
    for name, key in a.graph.values.items():
        if name in b.graph.values and not is_anonymous(name) and (key not in named or name in finals):
            named[key] = name
    return [named[value] for op in a.graph.ops for value in op.outputs if value in named]


def _ways(
    shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], rows: _Rows, batches: Sequence[Batch]
) -> list[tuple[Level, ...]]:
    """How a value's dims may lie along token sets; empty where none explains its shapes. Behind a batch the first dim is that."""
    if any(len(x) != len(y) for x, y in shapes):
        return []
    several = max(len(batch.samples) for batch in batches) > 1
    batched = several and all(x[:1] == y[:1] == (len(batch.samples),) for (x, y), batch in zip(shapes, batches, strict=True))
    options = rows.options(shapes, int(batched))
    if several and not batched:  # shared by all samples: its rows are no sample's own
        options = [[level for level in dim if level is None] for dim in options]
    if math.prod(map(len, options)) > FEW:
        return []
    return [(None,) * batched + way for way in itertools.product(*options)]


def _gap(
    x: NDArray[Any], y: NDArray[Any], way: tuple[Level, ...], rows: Sequence[Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]],
    batch: Batch,
) -> Gap:  # fmt: skip
    """The largest gap over the samples of a batch."""
    worst = Gap()
    for b, number in enumerate(batch.numbers):
        several = len(batch.numbers) > 1 and x.shape[:1] == (len(batch.numbers),)
        one, other = (x[b : b + 1], y[b : b + 1]) if several else (x, y)
        for d, level in enumerate(way):
            if level is not None:
                one, other = one.take(rows[b][level][0], d), other.take(rows[b][level][1], d)
        max_abs, required = distance(one, other)
        if worst.sample < 0 or required > worst.required:
            worst = Gap(max_abs, required, number)
    return worst


def distance(x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """Largest absolute difference, and the tolerance it needs; equal infinities and NaN in the same place are equal.

    Args:
        x: what is judged, any dtype.
        y: of the same shape, what is right; numbers that are no floats must be equal.
    """
    floats = y.dtype.kind == "f"
    a, b = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    gap[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    gap[np.isnan(gap)] = np.inf
    max_abs = float(gap.max(initial=0.0))
    scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0)) if floats else 1.0
    return max_abs, max_abs / max(1.0, scale)


# --- the walk ---------------------------------------------------------------------------------------------------------------


class _Walk:
    """A graph seen through the values that were compared.

    Args:
        graph: the graph.
        compared: their names, in the order in which they are computed, and the token set of each dim.
    """

    def __init__(self, graph: Graph, compared: Mapping[str, tuple[Level, ...]]) -> None:
        self.graph, self.producers, self.dims = graph, graph.producers, compared
        self.names = {graph.values[name]: name for name in compared}
        self.order = {name: i for i, name in enumerate(compared)}

    def roots(self, finals: Iterable[str], bad: set[str]) -> list[str]:
        """Values that differ, reached from outputs that differ through values that differ, all of whose sources agree."""
        reached, waiting, found = set[str](), list(finals), []
        while waiting:
            name = waiting.pop()
            if name in reached:
                continue
            reached.add(name)
            behind = self._sources(name) & bad
            waiting += behind
            if not behind:
                found.append(name)
        return sorted(found, key=self.order.__getitem__)

    def _sources(self, name: str) -> set[str]:
        """What a value was computed from; which rows it and those have is what the sites decided."""
        found = {self.names[key] for _, key in self.behind(name) if key in self.names}
        return found | {f"site{level - 1}.keep" for one in (name, *found) for level in self.dims[one] if level} - {name}

    def behind(self, name: str) -> Iterator[tuple[Op, str]]:
        """The ops between a value and what was compared before it, each with every id that it reads."""
        waiting, done = [self.graph.values[name]], set[str]()
        while waiting:
            op = self.producers.get(waiting.pop())
            if op is None or op.outputs[0] in done:
                continue
            done.add(op.outputs[0])
            for key in op.inputs:
                yield op, key
                if key not in self.names:
                    waiting.append(key)

    def root(self, name: str, gap: Gap, right: Side) -> Root:
        """What is known of a value at fault."""
        pairs = list(self.behind(name))
        read = {key for _, key in pairs}
        own = self.producers[self.graph.values[name]]
        kinds = {op.outputs[0]: op.kind for op, _ in pairs} | {own.outputs[0]: own.kind}
        ops = tuple(op.kind for op in self.graph.ops if op.outputs and op.outputs[0] in kinds)
        theirs = {weight.name: weight for weight in right.graph.weights.values()}
        weights = (self.graph.weights[key] for key in self.graph.weights if key in read)
        changes = (compare_weight(w.name, theirs[w.name], w) for w in weights if w.name in theirs)
        inputs = tuple(sorted({self.names[key] for key in read if key in self.names}, key=self.order.__getitem__))
        return Root(name, self._where(name, own, right.graph), gap, inputs, ops, tuple(c for c in changes if c is not None))

    def _where(self, name: str, own: Op, right: Graph) -> Where:
        """The op's own place; where its runtime's files do not say, that of the same value on the other side."""
        if own.where.file or own.where.module or name not in right.values:
            return own.where
        other = right.producers.get(right.values[name])
        return other.where if other is not None else own.where
