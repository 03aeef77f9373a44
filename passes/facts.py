"""What a token holds: abstract interpretation of the masked program, the ground of every soundness proof.

Tokens are sorted into *classes*: class ``k`` holds the tokens dropped at site ``k`` (1-based), class 0 is the token at position 0, and
``LIVE`` those that no site drops. For each token dim of each tensor we follow what stands at a class's positions (``values.py``): a known
number, an interval, or something bounded about one. A fold over a set born at site ``j`` is sound when every class 1..j holds the fold's
neutral value, and a mask is one only *relative to the living*: dropped keys must lie far below them.

A softmax is only meaningful while some key is unmasked. Until that is proved its rows are in *doubt*, with the class up to which keys may
all be gone. A doubt is settled where the dropped positions of a query dim hold a known value (dead queries were zeroed: a living query is
its own unmasked key), or when position 0 is never dropped and never masked.

A tensor over two token dims, queries and keys, may hold one thing where both are the same token and another elsewhere: ``Pair``. A dropped
key that only its own query sees is as good as masked, because a row is stored with its own key.

With a batch, a class is a set of (sample, position) pairs. What is known along a token dim holds for every sample, so an op that mixes
samples loses it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.fact import LIVE, Doubt, Fact, Pair, hidden, paired, placed, source
from tpcompile.passes.masks import Masks, Said, compared, kept, said
from tpcompile.passes.rules import Held
from tpcompile.passes.rules.ranges import WHERES
from tpcompile.passes.values import (
    SELECTS,
    TRUE,
    TRUTH,
    WITHIN_ONE,
    ZERO,
    Value,
    choose,
    elementwise,
    generic,
    hull_of,
    known,
)

aten = torch.ops.aten


class Facts:
    """Facts for every node of a graph.

    Args:
        graph: the masked program.
        axes: its token dims.
        keeps: keep node -> class (site number) it decides.
        constants: placeholder -> weight or buffer.
        bits: inputs ``[B, N]`` that are taken to hold 0 and 1, and 1 at position 0.
        nested: whether, in a call, every token stored along the first factor is stored along the second.
        fetched: of a gathered program, node -> the node whose rows it holds, the dim they are fetched along, and the site whose set
            they are; there, position 0 survives every site of ``keeps``, by another proof.

    Attributes:
        attended: softmaxes under an infinite mask of the model's own, of which every row is taken to have an unmasked key.
    """

    def __init__(
        self,
        graph: fx.Graph,
        axes: AxesMap,
        keeps: Mapping[str, int],
        constants: Mapping[str, torch.Tensor],
        bits: frozenset[str] = frozenset(),
        nested: Callable[[Described, str, str], bool] = lambda call, rows, keys: False,
        fetched: Mapping[str, tuple[str, int, int]] = MappingProxyType({}),
    ) -> None:
        self.axes, self.keeps, self.nested, self.bits, self.fetched = axes, keeps, nested, bits, fetched
        self.classes = (LIVE, *range(max(keeps.values(), default=0) + 1))
        self.known: dict[str, Fact] = {}
        self.before: dict[str, Fact] = {}
        self.attended: list[fx.Node] = []
        masks, nodes = Masks(axes, constants, bits), {n.name: n for n in graph.nodes}
        told: dict[str, list[tuple[int, Said]]] = {}
        bounded: dict[str, list[tuple[int, int, Value]]] = {}
        survived: dict[tuple[str, int], float] = {}
        for name, cls in sorted(keeps.items(), key=lambda item: item[1]):
            found = [kept(nodes[name]), *said(kept(nodes[name]), axes, masks, survived)]
            survived |= {(one.node.name, one.dim): one.alive for one in found}
            for one in found:
                told.setdefault(one.node.name, []).append((cls, one))
                for operand, dim, value in compared(one, axes):
                    bounded.setdefault(operand.name, []).append((cls, dim, value))
        for node in graph.nodes:
            fact = self._start(node, constants)
            if node.name in keeps:
                self.before[node.name] = fact
            for cls, one in told.get(node.name, ()):
                fact = self._decided(fact, cls, one)
            for cls, dim, value in bounded.get(node.name, ()):
                old = fact.at(dim, cls)  # a score that may be NaN fails every comparison, and is bounded by none
                fact = replace(fact, held={**fact.held, (dim, cls): value}) if old.finite and not old.exact else fact
            self.known[node.name] = fact

    def __getitem__(self, node: fx.Node) -> Fact:
        return self.known[node.name]

    def first_kept(self, upto: int) -> bool:
        """Whether position 0 survives sites 1..upto in every run."""
        return all(n in self.known and self.known[n].at(1, 0) == TRUE for n, k in self.keeps.items() if k <= upto)

    def folded(self, call: Described, factor: str, cls: int) -> list[Value]:
        """What a fold along a factor reads of a class, per operand that has it; a row that is stored with its own key reads it apart."""
        assert call.factors is not None
        found = []
        for i, operand in enumerate(call.operands):
            fact = self[operand]
            for dim in call.of(i, factor):
                other = [d for d in fact.pair.dims if d != dim] if fact.pair is not None and dim in fact.pair.dims else []
                rows = call.factors.ins[i][other[0]] if other else None
                apart = fact.pair is not None and rows is not None and self.nested(call, rows, factor)
                found.append(fact.pair.off[dim, cls] if apart and fact.pair is not None else fact.at(dim, cls))
        return found

    def masked(self, call: Described, factor: str) -> dict[int, Value]:
        """The classes along a factor that lie so far below the rest that a softmax or max over them all never picks one.

        Far below position 0 is enough, which is stored in every run, and far below each row's own key, which is stored with the row. A safe
        softmax gives -inf no weight whatever else the row holds.
        """
        assert call.factors is not None
        fact, (dim, *_) = self[call.operands[0]], call.of(0, factor)
        values = {cls: self.folded(call, factor, cls)[0] for cls in self.classes if cls > 0}
        first, living = fact.at(dim, 0), fact.at(dim, LIVE)
        if call.rule is not None and call.rule.held is Held.ORDER:  # behind all the living, not only the largest
            last = {cls: value for cls, value in values.items() if value.exact and value.lo == NEG_INF}
            return last if all(v.finite for v in (living, *(values[c] for c in values if c not in last))) else {}
        rows, safe = self._own(call, factor), call.node.target is aten._safe_softmax.default
        found: dict[int, Value] = {}
        for against in (lambda cls: living if cls == LIVE else values[cls], rows):
            if against is None:
                continue
            low = {cls for cls, value in values.items() if value.below(against(LIVE))}
            while above := {c for c in low if not all(values[c].below(against(o)) for o in (LIVE, *values) if o not in low)}:
                low -= above
            found |= {cls: values[cls] for cls in low}
        found |= {
            cls: value for cls, value in values.items() if value.below(first) or (safe and value.exact and value.lo == NEG_INF)
        }
        return dict(sorted(found.items()))

    def _own(self, call: Described, factor: str) -> Callable[[int], Value] | None:
        """What each class of rows sees at its own key; None where that is not known, or a row may be stored without it."""
        assert call.factors is not None
        fact, (dim, *_) = self[call.operands[0]], call.of(0, factor)
        if fact.pair is None or dim not in fact.pair.dims:
            return None
        rows = next(call.factors.ins[0][d] for d in fact.pair.dims if d != dim)
        return fact.pair.own.__getitem__ if rows is not None and self.nested(call, rows, factor) else None

    def _decided(self, fact: Fact, cls: int, one: Said) -> Fact:
        """A keep mask is False at its own class by definition, and True at later ones and at the living: they were not dropped."""
        alive = (LIVE, 0) if self.fetched else (LIVE,)
        held = {(one.dim, k): Value.of(one.alive) for k in self.classes if k > cls or k in alive}
        own = {(one.dim, cls): hull_of([Value.of(number) for number in one.dropped])} if one.same else {}
        return replace(fact, held={**fact.held, **held, **own})

    def _start(self, node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Fact:
        if (value := self._stored(node)) is not None:
            return Fact(rest=value)
        if node.op == "placeholder":
            if node.name in self.bits:
                return Fact({(1, 0): TRUE}, TRUTH)
            if node.name in constants:
                return Fact(rest=known(constants[node.name]))
            return Fact(rest=TRUTH) if node.meta["val"].dtype is torch.bool else Fact()
        call = self.axes.calls.get(node.name)
        if call is not None and node.target is PRUNE:
            return self.known[call.operands[0].name]
        if call is not None and node.target is RESTORE:
            return self._restored(*(self.known[n.name] for n in call.operands))
        if call is None or call.factors is None or call.rule is None or not isinstance(node.meta.get("val"), torch.Tensor):
            return self._opaque(node)
        fact = self._settle(call, self._derive(call))
        if self.axes.mixes(call):
            return Fact(rest=fact.rest, doubts=frozenset(replace(doubt, rows=frozenset()) for doubt in fact.doubts))
        return fact

    def _stored(self, node: fx.Node) -> Value | None:
        """The number that fetched rows hold everywhere: what their source holds at every class that is stored there."""
        if node.name not in self.fetched:
            return None
        source, dim, level = self.fetched[node.name]
        values = {self.known[source].at(dim, cls) for cls in self.classes if cls in (LIVE, 0) or cls > level}
        value = values.pop()
        return value if not values and value.exact else None

    def _restored(self, x: Fact, keep: Fact, base: Fact) -> Fact:
        """Kept tokens hold what ``x`` holds, dropped ones what ``base`` holds; a pending row of ``x`` is a dropped token's."""
        held = {(1, cls): choose(keep.at(1, cls), x.at(1, cls), base.at(1, cls)) for cls in self.classes}
        own = {d for d in x.doubts if 1 not in d.rows or any(keep.at(1, cls) != ZERO for cls in range(1, d.level + 1))}
        return Fact(held, hull_of((x.rest, base.rest)), base.doubts | own)

    def _opaque(self, node: fx.Node) -> Fact:
        """Ops without a rule, with several outputs, or without tensor inputs: what is pending stays pending."""
        facts = [self.known[n.name] for n in node.all_input_nodes if n.name in self.known]
        if facts and any(isinstance(n.meta.get("val"), (torch.Tensor, tuple, list)) for n in node.all_input_nodes):
            doubts = frozenset(replace(doubt, rows=frozenset()) for f in facts for doubt in f.doubts)
            return Fact(rest=generic(node, [f.at(None, LIVE) for f in facts]), doubts=doubts)
        return source(node)

    def _derive(self, call: Described) -> Fact:
        assert call.factors is not None
        assert call.rule is not None
        facts = [self.known[n.name] for n in call.operands]
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
        doubts = frozenset(self._doubts(call, facts))
        fact = Fact(held, self._anywhere(call, facts), doubts, self._paired(call, facts), placed(call, facts))
        picks = NEG_INF in call.factors.folds.values() and call.rule.held is not Held.ORDER
        return self._softmax(call, facts[0], fact) if picks else fact

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

    def _doubts(self, call: Described, facts: list[Fact]) -> Iterator[Doubt]:
        """The doubts of the operands as the result has them; what is combined along is no longer a row."""
        assert call.factors is not None
        for i, fact in enumerate(facts):
            for doubt in fact.doubts:
                ins = call.factors.ins[i]
                factors = {f for d in doubt.rows if (f := ins[d]) is not None and ins.count(f) == 1}  # a diagonal has no rows
                if not any(self._hidden(call, i, factor, doubt) for factor in factors & set(call.factors.folds)):
                    free = factors - set(call.factors.folds)
                    yield replace(doubt, rows=frozenset(d for d, f in enumerate(call.factors.outs[0]) if f in free))

    def _hidden(self, call: Described, index: int, factor: str, doubt: Doubt) -> bool:
        """Whether a fold does not see the rows in doubt: masked in a softmax, or multiplied by 0 as masked pooling does."""
        assert call.factors is not None
        classes = range(1, doubt.level + 1)
        if doubt.hard:
            return False
        if call.factors.folds[factor] == NEG_INF:
            return set(classes) <= set(self.masked(call, factor))
        free = {f for f in call.factors.outs[0] if f is not None} - set(call.factors.folds)
        for i, operand in enumerate(call.operands):
            fact, ins = self[operand], call.factors.ins[i]
            lasting = all(
                {ins[d] for d in other.rows} & free for other in fact.doubts
            )  # where its zeros are doubted, the result is
            for dim in call.of(i, factor) if i != index and lasting else ():
                if call.factors.product and all(fact.at(dim, cls) == ZERO for cls in classes):
                    return True
        return False

    def _settle(self, call: Described, fact: Fact) -> Fact:
        """A doubt is settled where, whatever its rows hold, the result is known at their dropped positions."""
        left = frozenset(doubt for doubt in fact.doubts if not any(self._known_along(call, doubt, d) for d in doubt.rows))
        return replace(fact, doubts=left) if left != fact.doubts else fact

    def _known_along(self, call: Described, doubt: Doubt, dim: int) -> bool:
        """Whether an operand without doubts decides the result at a doubt's classes: a zero in a product, or the choice of a side."""
        assert call.factors is not None
        assert call.rule is not None
        factor, classes = call.factors.outs[0][dim], range(1, doubt.level + 1)

        def held(index: int) -> list[Value]:
            fact = self[call.operands[index]]
            return [] if fact.doubts else [fact.at(next(call.of(index, str(factor)), None), cls) for cls in classes]

        if call.node.target in SELECTS:
            chosen = held(0 if call.node.target in WHERES else 1)
            sides = {bool(value.lo) for value in chosen}
            return bool(chosen) and all(v.exact for v in chosen) and all(self._plain_side(call.node, side) for side in sides)
        absorbs = call.rule.absorbs if call.rule.held is Held.MAP else 0.0 if call.factors.product else None
        if absorbs is None or doubt.hard:
            return False
        number = Value.of(absorbs)
        return any(found and all(v == number for v in found) for found in map(held, range(len(call.operands))))

    def _plain_side(self, node: fx.Node, side: bool) -> bool:
        """Whether one side of a selection has no doubts: a number, or a tensor that has none."""
        given = node.args[1 if side else 2] if node.target in WHERES else node.args[2 if side else 0]
        return not isinstance(given, fx.Node) or not self[given].doubts

    def _paired(self, call: Described, facts: list[Fact]) -> Pair | None:
        if not any(f.pair is not None or f.place is not None for f in facts):
            return None
        return paired(call, facts, self.axes.token_dims(call.node), self.classes, self._anywhere(call, facts))

    def _anywhere(self, call: Described, facts: list[Fact]) -> Value:
        assert call.factors is not None
        assert call.rule is not None
        values = [f.at(None, LIVE) for f in facts]
        match call.rule.held:
            case Held.COPY if first := [d for f, (_, stop) in call.factors.reads.items() if stop == 1 for d in call.of(0, f)]:
                return facts[0].at(first[0], 0)  # a window of position 0 alone
            case Held.COPY | Held.SAME | Held.PICK:
                return values[0]
            case Held.MAP:
                return elementwise(call, values)
            case Held.FRONT:
                return hull_of(values)
        return generic(call.node, values)

    def _softmax(self, call: Described, source: Fact, fact: Fact) -> Fact:
        """Along a softmax, masked positions become 0; the rows are in doubt until an unmasked key is sure."""
        assert call.factors is not None
        held, doubts, rest, pair = dict(fact.held), set(fact.doubts), fact.rest, fact.pair
        for factor in call.factors.folds:
            (dim,) = call.of(0, factor)
            masked, own = self.masked(call, factor), self._own(call, factor)
            if call.node.target in WITHIN_ONE:
                rest = Value(-1.0, 1.0)  # NaN rows are those in doubt, and those that the model masks whole: assumed away
                if not self._attends(call, factor, masked):
                    self.attended.append(call.node)
            if not masked:
                continue
            if call.factors.outs[0][dim : dim + 1] == (factor,) and call.node.target is not aten.log_softmax.int:
                whole = {cls for cls, value in masked.items() if source.at(dim, cls) == value}
                held |= {(dim, cls): ZERO for cls in whole}
                pair = hidden(source.pair, dim, masked, rest) if own is not None and source.pair is not None else pair
            if not self._keyed(call, factor, masked):
                queries = frozenset(d for d in self.axes.token_dims(call.node) if d != dim)
                doubts.add(Doubt(max(masked), any(v.lo == NEG_INF for v in masked.values()), queries))
        return replace(fact, held=held, doubts=frozenset(doubts), rest=rest, pair=pair)

    def _attends(self, call: Described, factor: str, masked: Mapping[int, Value]) -> bool:
        """Whether every row of the masked program surely has a key that is not masked by -inf, or needs none."""
        fact, (dim, *_) = self[call.operands[0]], call.of(0, factor)
        own = self._own(call, factor)
        alone = own is not None and all(own(cls).finite for cls in self.classes)
        open_ = all(fact.at(dim, cls).finite for cls in self.classes if cls not in masked)
        return call.node.target is aten._safe_softmax.default or fact.at(dim, 0).finite or alone or open_

    def _keyed(self, call: Described, factor: str, masked: Mapping[int, Value]) -> bool:
        """Whether no row may lose every key, or a row that does is the same in both runs.

        A maximum over nothing but dropped tokens is what each of them holds, and one of them is stored; a safe softmax over nothing is 0.
        """
        fact, (dim, *_) = self[call.operands[0]], call.of(0, factor)
        values, own = list(masked.values()), self._own(call, factor)
        alike = all(value.exact and value == values[0] for value in values)
        if alike and call.rule is not None and call.rule.held is Held.SAME:
            return True
        if alike and values[0].lo == NEG_INF and call.node.target is aten._safe_softmax.default:
            return True
        if own is not None and all(own(cls).finite and all(v.below(own(cls)) for v in values) for cls in self.classes):
            return True
        return self.first_kept(max(masked)) and all(value.below(fact.at(dim, 0)) for value in values)
