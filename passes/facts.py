"""What a token holds: abstract interpretation of the masked program, the ground of every soundness proof.

Tokens are sorted into *classes*: class ``k`` holds the tokens dropped at site ``k`` (1-based), class 0 is the token at position 0, and
``LIVE`` those that no site drops. For each token dim of each tensor we follow what stands at a class's positions (``values.py``): a known
number, an interval, or something bounded about one. A fold over a set born at site ``j`` is sound when every class 1..j holds the fold's
neutral value, and a mask is one only *relative to the living*: dropped keys must lie far below them.

A softmax is only meaningful while some key is unmasked. Until that is proved its result is *pending*: ``pending`` holds the class up to
which keys may all be gone. It is settled where the dropped positions of a query dim hold a known value (dead queries were zeroed: a living
query is its own unmasked key), or when position 0 is never dropped and never masked.

With a batch, a class is a set of (sample, position) pairs. What is known along a token dim holds for every sample, so an op that mixes
samples loses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.masks import Binary, Said, said
from tpcompile.passes.rules import Held
from tpcompile.passes.values import SELECTS, TRUE, UNKNOWN, WITHIN_ONE, ZERO, Value, choose, elementwise, generic, hull_of, known

LIVE = -1
"""The class of tokens that no site drops."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        held: (dim, class) -> what stands at the class's positions along that dim.
        rest: what stands anywhere in the tensor.
        pending: classes 1..pending may have taken every key of a softmax this came from; 0 when settled.
        hard: pending rows may be NaN (an infinite mask): a product with 0 does not hide them, a ``where`` does.
        rows: dims that are the pending softmax's query axis; only zeros along them settle it.
    """

    held: Mapping[tuple[int, int], Value] = field(default_factory=dict)
    rest: Value = UNKNOWN
    pending: int = 0
    hard: bool = False
    rows: frozenset[int] = frozenset()

    def at(self, dim: int | None, cls: int) -> Value:
        """What stands at a class along a dim; anywhere, for an operand that lacks the dim."""
        return self.rest if dim is None else self.held.get((dim, cls), self.rest)


class Facts:
    """Facts for every node of a graph.

    Args:
        graph: the masked program.
        axes: its token dims.
        keeps: keep node -> class (site number) it decides.
        constants: placeholder -> weight or buffer.

    Attributes:
        attended: softmaxes under an infinite mask of the model's own, of which every row is taken to have an unmasked key.
    """

    def __init__(self, graph: fx.Graph, axes: AxesMap, keeps: Mapping[str, int], constants: Mapping[str, torch.Tensor]) -> None:
        self.axes, self.keeps = axes, keeps
        self.classes = (LIVE, *range(max(keeps.values(), default=0) + 1))
        self.known: dict[str, Fact] = {}
        self.before: dict[str, Fact] = {}
        self.attended: list[fx.Node] = []
        binary, nodes = Binary(axes, constants), {n.name: n for n in graph.nodes}
        told: dict[str, list[tuple[int, Said]]] = {}
        for name, cls in keeps.items():
            for one in said(nodes[name], axes, binary):
                told.setdefault(one.node.name, []).append((cls, one))
        for node in graph.nodes:
            fact = self._start(node, constants)
            if node.name in keeps:
                self.before[node.name] = fact
                fact = self._decided(fact, keeps[node.name], Said(node, 1, alive=True, same=True))
            for cls, one in told.get(node.name, ()):
                fact = self._decided(fact, cls, one)
            self.known[node.name] = fact

    def __getitem__(self, node: fx.Node) -> Fact:
        return self.known[node.name]

    def first_kept(self, upto: int) -> bool:
        """Whether position 0 survives sites 1..upto in every run."""
        return all(n in self.known and self.known[n].at(1, 0) == TRUE for n, k in self.keeps.items() if k <= upto)

    def masked(self, fact: Fact, dim: int) -> dict[int, Value]:
        """The classes along a dim that lie so far below every other that a softmax or max over them all never picks one.

        Far below position 0 is enough: it is stored in every run.
        """
        values = {cls: fact.at(dim, cls) for cls in self.classes if cls != 0}
        low = {cls for cls, value in values.items() if cls > 0 and value.below(values[LIVE])}
        others = [value for cls, value in values.items() if cls not in low]
        first = fact.at(dim, 0)
        return {
            cls: value
            for cls, value in sorted(values.items())
            if cls > 0 and (value.below(first) or (cls in low and all(value.below(other) for other in others)))
        }

    def _decided(self, fact: Fact, cls: int, one: Said) -> Fact:
        """A keep mask is False at its own class by definition, and True at later ones and at the living: they were not dropped."""
        held = {(one.dim, k): TRUE if one.alive else ZERO for k in self.classes if k > cls or k == LIVE}
        own = {(one.dim, cls): ZERO if one.alive else TRUE} if one.same else {}
        return replace(fact, held={**fact.held, **held, **own})

    def _start(self, node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Fact:
        if node.op == "placeholder":
            return Fact(rest=known(constants[node.name])) if node.name in constants else Fact()
        call = self.axes.calls.get(node.name)
        if call is not None and node.target is PRUNE:
            return self.known[call.operands[0].name]
        if call is not None and node.target is RESTORE:
            return self._restored(*(self.known[n.name] for n in call.operands))
        if call is None or call.factors is None or not isinstance(node.meta.get("val"), torch.Tensor):
            return self._opaque(node)
        fact = _settle(call, self._derive(call))
        return replace(fact, held={}, rows=frozenset()) if self.axes.mixes(call) else fact

    def _restored(self, x: Fact, keep: Fact, base: Fact) -> Fact:
        """Kept tokens hold what ``x`` holds, dropped ones what ``base`` holds; a pending row of ``x`` is a dropped token's."""
        held = {(1, cls): choose(keep.at(1, cls), x.at(1, cls), base.at(1, cls)) for cls in self.classes}
        settled = 1 in x.rows and all(keep.at(1, cls) == ZERO for cls in range(1, x.pending + 1))
        worst = base if settled or base.pending > x.pending else x
        hard = base.hard or (x.hard and not settled)
        return Fact(held, hull_of((x.rest, base.rest)), worst.pending, hard, base.rows & x.rows if not settled else base.rows)

    def _opaque(self, node: fx.Node) -> Fact:
        """Ops without a rule, with several outputs, or without tensor inputs: what is pending stays pending."""
        facts = [self.known[n.name] for n in node.all_input_nodes if n.name in self.known]
        pending = max((f.pending for f in facts), default=0)
        hard = any(f.hard and f.pending for f in facts)
        if facts and any(isinstance(n.meta.get("val"), (torch.Tensor, tuple, list)) for n in node.all_input_nodes):
            return Fact(rest=generic(node, [f.at(None, LIVE) for f in facts]), pending=pending, hard=hard)
        return _source(node)

    def _derive(self, call: Described) -> Fact:
        assert call.factors is not None
        assert call.rule is not None
        facts = [self.known[n.name] for n in call.operands]
        pending = max((f.pending for f in facts), default=0)
        held: dict[tuple[int, int], Value] = {}
        for d, factor in enumerate(call.factors.outs[0]):
            if factor is not None and factor not in call.factors.rigid:
                held |= {(d, cls): value for cls in self.classes if (value := self._result(call, facts, factor, cls)) is not None}
        joins = call.rule.held is Held.FRONT and len(call.factors.ins[0]) == len(call.factors.outs[0])
        if joins:  # a prefix in front of a token axis is its position 0
            sizes = call.operands[0].meta["val"].shape
            joined = [
                d
                for d, f in enumerate(call.factors.outs[0])
                if f in call.factors.rigid and isinstance(sizes[d], int) and sizes[d]
            ]
            held |= {(d, 0): facts[0].at(d, 0) for d in joined}
        hard = any(f.hard and f.pending for f in facts)
        fact = Fact(held, self._anywhere(call, facts), pending, hard, _rows(call, facts))
        return self._softmax(call, facts[0], fact) if NEG_INF in call.factors.folds.values() else fact

    def _result(self, call: Described, facts: list[Fact], factor: str, cls: int) -> Value | None:
        """What the result holds at a class along a factor; None where that is no more than what stands anywhere."""
        assert call.factors is not None
        assert call.rule is not None
        values = [f.at(next(call.of(i, factor), None), cls) for i, f in enumerate(facts)]
        match call.rule.held:
            case Held.COPY:
                return values[0]
            case Held.MAP:
                return elementwise(call, values)
            case Held.ZERO if factor not in call.factors.folds:
                single = len(values) == 1 or call.factors.product
                zero = single and ZERO in values and all(v.finite for v in values)
                return ZERO if zero else generic(call.node, values)
            case Held.SAME if factor not in call.factors.folds:
                return values[0]
        return None

    def _anywhere(self, call: Described, facts: list[Fact]) -> Value:
        assert call.rule is not None
        values = [f.at(None, LIVE) for f in facts]
        match call.rule.held:
            case Held.COPY | Held.SAME | Held.PICK:
                return values[0]
            case Held.MAP:
                return elementwise(call, values)
            case Held.FRONT:
                return hull_of(values)
        return generic(call.node, values)

    def _softmax(self, call: Described, source: Fact, fact: Fact) -> Fact:
        """Along a softmax, masked positions become 0; the rows are pending until an unmasked key is sure."""
        assert call.factors is not None
        held, pending, hard, rows, rest = dict(fact.held), fact.pending, fact.hard, fact.rows, fact.rest
        for factor in call.factors.folds:
            (dim,) = call.of(0, factor)
            masked = self.masked(source, dim)
            if call.node.target in WITHIN_ONE:
                rest = Value(-1.0, 1.0)  # NaN rows are the pending ones, and those that the model masks whole: assumed away
                if not all(source.at(dim, cls).finite for cls in self.classes if cls not in masked):
                    self.attended.append(call.node)
            if not masked:
                continue
            if call.factors.outs[0][dim : dim + 1] == (factor,) and call.node.target is not aten.log_softmax.int:
                held |= {(dim, cls): ZERO for cls in masked}
            if not (self.first_kept(max(masked)) and all(value.below(source.at(dim, 0)) for value in masked.values())):
                queries = frozenset(d for d in self.axes.token_dims(call.node) if d != dim)
                rows = rows & queries if pending else queries
                pending, hard = max(pending, *masked), hard or any(v.lo == NEG_INF for v in masked.values())
        return replace(fact, held=held, pending=pending, hard=hard, rows=rows, rest=rest)


def _settle(call: Described, fact: Fact) -> Fact:
    """A pending row is settled where the dropped positions of a query dim all hold a known value."""
    if fact.hard and call.node.target not in SELECTS:
        return fact
    for dim in fact.rows if fact.pending else ():
        values = [fact.held.get((dim, cls)) for cls in range(1, fact.pending + 1)]
        if all(v is not None and v.exact and v.finite for v in values):
            return replace(fact, pending=0, hard=False, rows=frozenset())
    return fact


def _rows(call: Described, facts: list[Fact]) -> frozenset[int]:
    """Output dims that are the query axis of every pending softmax among the operands."""
    assert call.factors is not None
    sides = [{call.factors.ins[i][d] for d in f.rows} for i, f in enumerate(facts) if f.pending]
    factors = set[str | None].intersection(*sides) - {None} if sides else set()
    return frozenset(d for d, factor in enumerate(call.factors.outs[0]) if factor in factors)


def _source(node: fx.Node) -> Fact:
    """Ops without tensor inputs: filled tensors are known everywhere; ``arange`` has a known first element."""
    number: object = None
    match node.target:
        case aten.full.default:
            number = node.args[1]
        case aten.scalar_tensor.default:
            number = node.args[0]
        case aten.zeros.default:
            number = 0.0
        case aten.ones.default:
            number = 1.0
        case aten.arange.default | aten.arange.start_step:
            start = 0.0 if node.target is aten.arange.default else node.args[0]
            first = {(0, 0): Value.of(float(start))} if isinstance(start, (int, float)) else {}
            return Fact(held=first, rest=Value(NEG_INF, -NEG_INF))
    return Fact(rest=Value.of(float(number))) if isinstance(number, (int, float, bool)) else Fact()
