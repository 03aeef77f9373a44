"""What differs between two graphs: ops that came, went or read something else, and weights by name."""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from tpcompile.compare.graphview import Graph, Op, Weight, is_anonymous


@dataclass(frozen=True, slots=True)
class OpChange:
    """One op.

    Attributes:
        change: ``added``, ``removed`` or ``rewired``: the same op reads something else.
        kind: its type.
        detail: its attributes; of a rewired op, what it read and what it reads.
        name: of its result, where it has a name; as in B, of a removed op as in A.
        module: dotted path.
        where: the user's line, ``file.py:12``; empty where unknown.
    """

    change: str
    kind: str
    detail: str
    name: str
    module: str
    where: str

    def __str__(self) -> str:
        sign = {"added": "+", "removed": "-", "rewired": "~"}[self.change]
        place = " ".join(part for part in (self.module, self.where) if part)
        what = f"{self.kind}({self.detail})" if self.change != "rewired" else f"{self.kind}: {self.detail}"
        return f"{sign} {self.name or '_'} = {what}" + (f"   # {place}" if place else "")


@dataclass(frozen=True, slots=True)
class WeightChange:
    """One weight.

    Attributes:
        name: of the weight.
        change: ``added``, ``removed``, ``type`` (another shape or dtype) or ``changed``.
        a: dtype and shape in A; empty where there is none.
        b: the same in B.
        max_abs: largest absolute difference; None where the two cannot be compared.
    """

    name: str
    change: str
    a: str
    b: str
    max_abs: float | None = None

    def __str__(self) -> str:
        if self.change == "changed":
            return f"~ {self.name} {self.b}: " + (f"by up to {self.max_abs:.3g}" if self.max_abs is not None else "other numbers")
        return (
            f"~ {self.name}: {self.a} -> {self.b}"
            if self.change == "type"
            else f"{'+-'[not self.b]} {self.name} {self.a or self.b}"
        )


@dataclass(frozen=True, slots=True)
class PortChange:
    """An input or output: ``input x``, its dtype and shape in A and in B; None where there is none."""

    port: str
    a: str | None
    b: str | None

    def __str__(self) -> str:
        return f"~ {self.port}: {'none' if self.a is None else self.a} -> {'none' if self.b is None else self.b}"


@dataclass(frozen=True)
class GraphDiff:
    """Two graphs compared.

    Attributes:
        file: name of the file.
        interface: inputs and outputs that differ.
        added: op type -> how many B has more of.
        removed: op type -> how many A has more of.
        ops: every op that changed, in the order of B, with A's at its place.
        weights: those that differ, by name.
        equal_weights: how many are equal.
    """

    file: str
    interface: tuple[PortChange, ...]
    added: Mapping[str, int]
    removed: Mapping[str, int]
    ops: tuple[OpChange, ...]
    weights: tuple[WeightChange, ...]
    equal_weights: int

    @property
    def differs(self) -> bool:
        """Whether anything that counts does."""
        return bool(self.interface or self.ops or self.weights)


def compare_graphs(file: str, a: Graph, b: Graph) -> GraphDiff:
    """Compare two graphs; names that an exporter counted out do not matter.

    Args:
        file: name for the result.
        a: before.
        b: after.
    """
    kinds = [Counter(op.kind for op in graph.ops) for graph in (a, b)]
    weights, equal = compare_weights(a, b)
    more, fewer = (dict(sorted((one - other).items())) for one, other in (kinds[::-1], kinds))
    ports = dict.fromkeys([*a.interface, *b.interface])
    interface = tuple(PortChange(p, old, new) for p in ports if (old := a.interface.get(p)) != (new := b.interface.get(p)))
    return GraphDiff(file, interface, more, fewer, tuple(_ops(a, b)), weights, equal)


def compare_weights(a: Graph, b: Graph) -> tuple[tuple[WeightChange, ...], int]:
    """The weights that differ, sorted by name, and the number of equal ones; each is read once, and none is kept."""
    ours, theirs = ({weight.name: weight for weight in graph.weights.values()} for graph in (a, b))
    found = [compare_weight(name, ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})]
    changed = tuple(change for change in found if change is not None)
    return changed, len(found) - len(changed)


def compare_weight(name: str, a: Weight | None, b: Weight | None) -> WeightChange | None:
    """How one weight differs; None where it is equal."""
    before, after = ("" if one is None else f"{one.dtype}{list(one.shape)}" for one in (a, b))
    if a is None or b is None or before != after:
        return WeightChange(name, "removed" if b is None else "added" if a is None else "type", before, after)
    old, new = a.read(), b.read()
    if old.dtype == new.dtype and old.tobytes() == new.tobytes():
        return None
    try:
        gap = np.abs(old.astype(np.float64) - new.astype(np.float64)).max(initial=0.0)
    except (TypeError, ValueError):  # strings, or bytes of a type that numpy does not have
        return WeightChange(name, "changed", before, after)
    return WeightChange(name, "changed", before, after, float(gap) if math.isfinite(gap) else None)


def _ops(a: Graph, b: Graph) -> Iterator[OpChange]:
    """Align both lists of ops by what they are, then look at what aligned ops read."""
    blocks = list(_align([_key(op) for op in a.ops], [_key(op) for op in b.ops]))
    partner: dict[str, str] = {}
    fresh: set[str] = set()
    for same, ours, theirs in blocks:
        for i, j in zip(ours, theirs, strict=False) if same else ():
            partner |= dict(zip(a.ops[i].outputs, b.ops[j].outputs, strict=False))
        if not same:
            fresh |= {value for i in ours for value in a.ops[i].outputs} | {value for j in theirs for value in b.ops[j].outputs}
    names = [{value: name for name, value in graph.values.items()} for graph in (a, b)]
    for same, ours, theirs in blocks:
        if same:
            for i, j in zip(ours, theirs, strict=True):
                detail = _rewiring(a, b, i, j, partner, fresh)
                if detail:
                    yield _change("rewired", b.ops[j], detail, names[1])
            continue
        yield from (_change("removed", a.ops[i], _shown(a.ops[i]), names[0]) for i in ours)
        yield from (_change("added", b.ops[j], _shown(b.ops[j]), names[1]) for j in theirs)


def _key(op: Op) -> Hashable:
    return op.kind, op.detail, op.where.module, len(op.inputs)


def _align(a: Sequence[Hashable], b: Sequence[Hashable]) -> Iterator[tuple[bool, range, range]]:
    """Runs of equal and of different keys, as positions in both; what both begin and end with costs nothing."""
    least = min(len(a), len(b))
    head = next((i for i in range(least) if a[i] != b[i]), least)
    tail = next((i for i in range(least - head) if a[-1 - i] != b[-1 - i]), least - head)
    ends = len(a) - tail, len(b) - tail
    yield True, range(head), range(head)
    matcher = SequenceMatcher(None, a[head : ends[0]], b[head : ends[1]], autojunk=False)
    for tag, start, stop, first, last in matcher.get_opcodes():
        yield tag == "equal", range(head + start, head + stop), range(head + first, head + last)
    yield True, range(ends[0], len(a)), range(ends[1], len(b))


def _rewiring(a: Graph, b: Graph, i: int, j: int, partner: Mapping[str, str], fresh: set[str]) -> str:
    """Which inputs of two aligned ops differ; empty where none does, or where an op that came or went explains it."""
    found = []
    for number, (old, new) in enumerate(zip(a.ops[i].inputs, b.ops[j].inputs, strict=True)):
        if old in fresh or new in fresh or partner.get(old) == new:
            continue
        before, after = _source(a, old), _source(b, new)
        if before != after or old in partner:
            found.append(f"input {number} {before} -> {after}")
    return ", ".join(found)


def _source(graph: Graph, value: str) -> str:
    """What an op reads, as both graphs call it: a weight or input by name, a constant by value, else the value's name."""
    return graph.weights[value].name if value in graph.weights else value.removeprefix("=")


def _shown(op: Op) -> str:
    constants = ", ".join(value.removeprefix("=") for value in op.inputs if value.startswith("="))
    return ", ".join(part for part in (constants, op.detail) if part)


def _change(change: str, op: Op, detail: str, names: Mapping[str, str]) -> OpChange:
    name = next((names[value] for value in op.outputs if value in names), "")
    shown = "" if is_anonymous(name) else name
    return OpChange(change, op.kind, detail, shown, op.where.module, op.where.short if op.where.file else "")
