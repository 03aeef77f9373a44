"""What a dropped token holds: abstract interpretation of the masked program, the ground of every soundness proof.

Tokens are sorted into *classes*: class ``k`` holds the tokens dropped at site ``k`` (1-based), class 0 is the token at position 0. For each
token dim of each tensor we follow what is surely stored at a class's positions: a known number, or *low* (a finite mask such as -1e4
added to something bounded). A fold over a set born at site ``j`` is sound when every class 1..j holds the fold's neutral value.

A softmax under a finite or infinite mask is only meaningful while some key is unmasked. Until that is proved its result is *pending*:
``pending`` holds the class up to which keys may all be gone. It is settled where dropped positions of a *row* dim hold a known value
(dead queries were zeroed: a living query is its own unmasked key, an assumption that is recorded), or when position 0 is never dropped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.ops import PRUNE
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.rules import Held, call_of

LOW = -1000.0
"""A finite mask value counts as a mask from here down; the bound it puts on the logits is a recorded assumption."""

aten = torch.ops.aten
_ADDS = (aten.add.Tensor, aten.sub.Tensor)


@dataclass(frozen=True, slots=True)
class Value:
    """What is stored at a class of positions: exactly ``number``, or, when ``low``, ``number`` plus something bounded."""

    number: float
    low: bool = False

    @property
    def masks(self) -> bool:
        """Whether a softmax or max over living values never picks it."""
        return self.number == NEG_INF or self.number <= LOW

    def neutral(self, fold: float) -> bool:
        """Whether it is neutral for a fold with that neutral value."""
        return self.masks if fold == NEG_INF else (not self.low and self.number == fold)


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        held: (dim, class) -> value at the class's positions along that dim.
        uniform: the value everywhere, if constant.
        pending: classes 1..pending may have taken every key of a softmax this came from; 0 when settled.
        hard: pending rows may be NaN (an infinite mask): a product with 0 does not hide them, a ``where`` does.
        keys: dims that are the pending softmax's own key axis: 0 at dropped keys says nothing of the rows.
    """

    held: Mapping[tuple[int, int], Value] = field(default_factory=dict)
    uniform: Value | None = None
    pending: int = 0
    hard: bool = False
    keys: frozenset[int] = frozenset()

    def at(self, dim: int | None, cls: int) -> Value | None:
        """The value at a class along a dim, or everywhere."""
        return self.uniform if dim is None else self.held.get((dim, cls), self.uniform)


NOTHING = Fact()


class Facts:
    """Facts for every node of a graph.

    Args:
        graph: the masked program.
        axes: its token dims.
        keeps: keep node -> class (site number) it decides.
        constants: placeholder -> tensor, for weights with a single element.
    """

    def __init__(self, graph: fx.Graph, axes: AxesMap, keeps: Mapping[str, int], constants: Mapping[str, torch.Tensor]) -> None:
        self.axes, self.keeps, self.classes = axes, keeps, range(max(keeps.values(), default=0) + 1)
        self.known: dict[str, Fact] = {}
        self.before: dict[str, Fact] = {}
        for node in graph.nodes:
            fact = self._start(node, constants)
            if node.name in keeps:
                self.before[node.name] = fact
                fact = self._decided(fact, keeps[node.name])
            self.known[node.name] = fact

    def __getitem__(self, node: fx.Node) -> Fact:
        return self.known[node.name]

    def first_kept(self, upto: int) -> bool:
        """Whether position 0 survives sites 1..upto in every run."""
        return all(self.known[n].at(1, 0) == Value(1.0) for n, k in self.keeps.items() if k <= upto)

    def _start(self, node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Fact:
        if node.op == "placeholder":
            value = constants.get(node.name)
            return Fact(uniform=Value(float(value.item()))) if value is not None and value.numel() == 1 else NOTHING
        call = self.axes.calls.get(node.name)
        if call is None:
            return self._source(node)
        if call.factors is None or not isinstance(node.meta.get("val"), torch.Tensor):
            return NOTHING
        if node.target is PRUNE:
            return self.known[call.operands[0].name]
        return self._settle(node, self._derive(call))

    def _decided(self, fact: Fact, cls: int) -> Fact:
        """A keep mask is False at its own class by definition, and True at later ones: they were still alive."""
        own = {(1, k): Value(0.0 if k == cls else 1.0) for k in self.classes if k >= cls and k > 0}
        return replace(fact, held={**fact.held, **own})

    def _source(self, node: fx.Node) -> Fact:
        """Ops without tensor inputs: filled tensors are uniform; ``arange`` has a known first element."""
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return NOTHING
        if node.target in (aten.full.default, aten.scalar_tensor.default):
            number = node.args[1] if node.target is aten.full.default else node.args[0]
            return Fact(uniform=Value(float(number))) if isinstance(number, (int, float, bool)) else NOTHING
        filled = {aten.zeros.default: 0.0, aten.ones.default: 1.0}.get(node.target)  # type: ignore[call-overload]
        if filled is not None:
            return Fact(uniform=Value(filled))
        if node.target is aten.arange.default:
            return Fact(held={(0, 0): Value(0.0)})
        if node.target is aten.arange.start_step and isinstance(node.args[0], (int, float)):
            return Fact(held={(0, 0): Value(float(node.args[0]))})
        return NOTHING

    def _derive(self, call: Described) -> Fact:
        assert call.factors is not None
        assert call.rule is not None
        facts = [self.known[n.name] for n in call.operands]
        pending = max((f.pending for f in facts), default=0)
        fact = Fact(pending=pending, hard=any(f.hard and f.pending for f in facts), keys=_keys(call, facts))
        held: dict[tuple[int, int], Value] = {}
        for d, factor in enumerate(call.factors.outs[0]):
            if factor is None or factor in call.factors.rigid:
                continue
            for cls in self.classes:
                value = self._result(call, facts, factor, cls)
                if value is not None:
                    held[d, cls] = value
        uniform = _uniform(call, facts)
        return self._softmax(call, facts, replace(fact, held=held, uniform=uniform))

    def _result(self, call: Described, facts: list[Fact], factor: str, cls: int) -> Value | None:
        assert call.factors is not None
        assert call.rule is not None
        if call.factors.product and any(f.hard for f in facts):
            return None
        values = [f.at(next(call.of(i, factor), None), cls) for i, f in enumerate(facts)]
        match call.rule.held:
            case Held.COPY:
                return values[0]
            case Held.MAP:
                return elementwise(call, values)
            case Held.ZERO if factor not in call.factors.folds:
                single = len(values) == 1 or call.factors.product
                return Value(0.0) if single and _finite(values) and any(v == Value(0.0) for v in values) else None
            case Held.SAME if factor not in call.factors.folds:
                return values[0]
        return None

    def _softmax(self, call: Described, facts: list[Fact], fact: Fact) -> Fact:
        """Along a softmax, masked positions become 0; the rows are pending until an unmasked key is sure."""
        assert call.factors is not None
        if NEG_INF not in call.factors.folds.values():
            return fact
        held, pending, hard, keys = dict(fact.held), fact.pending, fact.hard, fact.keys
        for factor in call.factors.folds:
            (dim,) = call.of(0, factor)
            masked = {cls: v for cls in self.classes if cls > 0 and (v := facts[0].at(dim, cls)) is not None and v.masks}
            if not masked:
                continue
            for cls in masked:
                if call.factors.outs[0][dim : dim + 1] == (factor,) and call.node.target is not aten.log_softmax.int:
                    held[dim, cls] = Value(0.0)
            if not self.first_kept(max(masked)):
                pending, keys = max(pending, *masked), keys | {dim}
                hard = hard or any(v.number == NEG_INF for v in masked.values())
        return replace(fact, held=held, pending=pending, hard=hard, keys=keys)

    def _settle(self, node: fx.Node, fact: Fact) -> Fact:
        """A pending row is settled where the dropped positions of some token dim all hold a known value."""
        if not fact.pending:
            return fact
        for dim in self.axes.token_dims(node):
            values = [fact.held.get((dim, cls)) for cls in range(1, fact.pending + 1)]
            if dim not in fact.keys and all(v is not None and not v.low for v in values):
                return replace(fact, pending=0, hard=False, keys=frozenset())
        return fact


def _keys(call: Described, facts: list[Fact]) -> frozenset[int]:
    """Output dims that are still the key axis of a pending softmax."""
    assert call.factors is not None
    factors = {call.factors.ins[i][d] for i, f in enumerate(facts) if f.pending for d in f.keys}
    return frozenset(d for d, factor in enumerate(call.factors.outs[0]) if factor is not None and factor in factors)


def _uniform(call: Described, facts: list[Fact]) -> Value | None:
    assert call.rule is not None
    if any(f.uniform is None for f in facts):
        return None
    match call.rule.held:
        case Held.MAP:
            return elementwise(call, [f.uniform for f in facts])
        case Held.COPY | Held.SAME:
            return facts[0].uniform
    return None


def _finite(values: list[Value | None]) -> bool:
    """Whether no operand is known to be infinite: 0 * inf is no 0."""
    return not any(v is not None and math.isinf(v.number) for v in values)


def elementwise(call: Described, values: list[Value | None]) -> Value | None:
    """What an elementwise op makes of known, low and unknown operands."""
    assert call.rule is not None
    target, absorbs = call.node.target, call.rule.absorbs
    if absorbs == 1.0 and call.node.meta["val"].dtype is not torch.bool:
        absorbs = None  # 1 | 2 is 3
    if absorbs is not None and _finite(values) and any(v is not None and not v.low and v.number == absorbs for v in values):
        return Value(absorbs)
    if all(v is not None and not v.low for v in values):
        return _evaluate(call, [v.number for v in values if v is not None])
    if target in (aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf):
        return _where(call, values)
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _masked_fill(call, values)
    if target in _ADDS:
        return _lowered(call, values)
    if target is aten.div.Tensor and values[0] == Value(0.0):
        return Value(0.0)  # 0 / x with x finite and not 0
    return _scaled(call, values)


def _evaluate(call: Described, numbers: list[float]) -> Value | None:
    """Run the op itself on the numbers, in the operands' own dtypes."""
    given = iter(numbers)

    def fill(value: Any) -> Any:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            return torch.tensor(next(given)).to(value.meta["val"].dtype)
        if isinstance(value, (list, tuple)):
            return [fill(v) for v in value]
        return value

    args = [fill(a) for a in call.node.args]
    kwargs = {k: fill(v) for k, v in call.node.kwargs.items()}
    if any(isinstance(a, fx.Node) for a in [*args, *kwargs.values()]):
        return None  # a size as a number: not a constant
    result = float(call.node.target(*args, **kwargs))  # type: ignore[operator]
    return None if math.isnan(result) else Value(result)


def _where(call: Described, values: list[Value | None]) -> Value | None:
    condition = values[0]
    if condition is None:
        return None
    first = call.node.args[1 if condition.number else 2]
    if isinstance(first, fx.Node):
        return values[1 + call.operands[1:].index(first)]
    return Value(float(first)) if isinstance(first, (int, float)) else None


def _masked_fill(call: Described, values: list[Value | None]) -> Value | None:
    condition = values[1]
    if condition is None:
        return None
    if not condition.number:
        return values[0]
    fill = call.node.args[2]
    if isinstance(fill, fx.Node):
        return values[2]
    return Value(float(fill)) if isinstance(fill, (int, float)) else None


def _lowered(call: Described, values: list[Value | None]) -> Value | None:
    """A sum of known numbers and something bounded stays a mask while the known part is one."""
    given = call_of(call.node).args
    alpha, other = given.get("alpha", 1), given.get("other")
    if len(values) == 1:  # the other operand is a number
        values = [values[0], Value(float(other))] if isinstance(other, (int, float)) else []
    if not isinstance(alpha, (int, float)) or not any(v is not None and v.masks for v in values):
        return None
    weights = (1.0, -float(alpha) if call.node.target is aten.sub.Tensor else float(alpha))
    total = sum(w * v.number for w, v in zip(weights, values, strict=True) if v is not None)
    value = Value(total, low=total != NEG_INF)
    return value if value.masks else None


def _scaled(call: Described, values: list[Value | None]) -> Value | None:
    """A low value times or over a positive constant stays low."""
    scales = call.node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
    if not scales or values[0] is None or not values[0].low:
        return None
    other = call_of(call.node).args.get("other")
    number = values[1].number if len(values) > 1 and values[1] is not None and not values[1].low else other
    if not isinstance(number, (int, float)) or number <= 0:
        return None
    scaled = values[0].number * number if call.node.target in (aten.mul.Tensor, aten.mul.Scalar) else values[0].number / number
    return Value(scaled, low=True)
