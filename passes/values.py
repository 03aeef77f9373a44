"""The abstract values of ``facts.py``: intervals of known numbers, exact or with something bounded added, finite or perhaps not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.passes.axesmap import Described
from tpcompile.passes.rules import call_of

LOW = -1000.0
"""How far below the living a finite mask must lie; the bound this puts on the logits' spread is a recorded assumption."""
TAME = 1000.0
"""Numbers up to here keep an unknown activation bounded when they are combined with it."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Value:
    """A set of numbers: the interval ``[lo, hi]``, and when ``about`` that plus any bounded activation.

    Attributes:
        lo: least.
        hi: greatest.
        about: an activation of unknown but bounded size is added.
        finite: no element is infinite or NaN.
    """

    lo: float
    hi: float
    about: bool = False
    finite: bool = True

    @classmethod
    def of(cls, number: float) -> "Value":
        """Exactly this number."""
        return cls(number, number, False, math.isfinite(number))

    @property
    def exact(self) -> bool:
        """Whether it is one known number."""
        return self.lo == self.hi and not self.about

    @property
    def tame(self) -> bool:
        """Whether it stays bounded when combined with activations."""
        return self.finite and self.lo >= -TAME and self.hi <= TAME

    @property
    def positive(self) -> bool:
        """Whether every element is surely above 0."""
        return self.lo > 0 and not self.about

    def below(self, other: "Value") -> bool:
        """Whether it lies so far below that a softmax or max over both never picks it."""
        if self.exact and self.lo == NEG_INF:
            return other.finite
        return self.hi - other.lo <= LOW

    def scaled(self, by: float) -> "Value":
        """Times a number."""
        if self.about and abs(by) > TAME:
            return WILD if self.finite else BROKEN
        ends = sorted((self.lo * by, self.hi * by))
        return BROKEN if any(map(math.isnan, ends)) else Value(ends[0], ends[1], self.about, self.finite)


ZERO, TRUE = Value(0.0, 0.0), Value(1.0, 1.0)
UNKNOWN = Value(0.0, 0.0, about=True)
"""An activation: bounded, by assumption."""
WILD = Value(NEG_INF, -NEG_INF, about=True)
"""Finite, of any size."""
BROKEN = Value(NEG_INF, -NEG_INF, about=True, finite=False)
"""Anything, perhaps infinite or NaN."""
TRUTH = Value(0.0, 1.0)

_ADDS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
_SCALES = (aten.mul.Tensor, aten.mul.Scalar)
_WHERES = (aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_LIKES = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.relu.default)
_NEEDS_POSITIVE = (
    aten.log.default,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.pow.Tensor_Scalar,
    aten.linalg_vector_norm.default,
)
WITHIN_ONE = (
    aten.tanh.default,
    aten.sigmoid.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.sin.default,
    aten.cos.default,
    aten.erf.default,
)
SELECTS = (*_WHERES, *_FILLS)
_NORMED = (aten.layer_norm.default,)


def known(constant: torch.Tensor) -> Value:
    """The values of a weight or buffer: exact where it has one element, unknown where they are as small as activations."""
    if constant.numel() == 0:
        return UNKNOWN
    lo, hi = float(constant.min()), float(constant.max())
    value = Value(lo, hi, finite=bool(constant.isfinite().all()))
    return value if constant.numel() == 1 or not value.tame else UNKNOWN


def hull_of(values: Sequence[Value]) -> Value:
    """The smallest set that holds them all."""
    about, finite = any(v.about for v in values), all(v.finite for v in values)
    return Value(min(v.lo for v in values), max(v.hi for v in values), about, finite)


def generic(node: fx.Node, values: Sequence[Value]) -> Value:
    """What any op makes of its operands when nothing better is known."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
        return TRUTH
    if not all(v.finite for v in values):
        return BROKEN
    if node.target in WITHIN_ONE:
        return Value(-1.0, 1.0)
    if node.target in _NORMED:
        return UNKNOWN
    return UNKNOWN if all(v.tame for v in values) else WILD


def elementwise(call: Described, values: Sequence[Value]) -> Value:
    """What an elementwise op makes of its operands' values."""
    assert call.rule is not None
    target, absorbs = call.node.target, call.rule.absorbs
    if target in _LIKES:
        return _number(call.node.args[1] if target is aten.full_like.default else float(target is aten.ones_like.default))
    if absorbs == 1.0 and call.node.meta["val"].dtype is not torch.bool:
        absorbs = None  # 1 | 2 is 3
    if absorbs is not None and Value.of(absorbs) in values and all(v.finite for v in values):
        return Value.of(absorbs)
    if all(v.exact for v in values):
        return _evaluate(call, [v.lo for v in values])
    if target in _WHERES:
        return choose(values[0], *_branches(call, values))
    if target in _FILLS:
        fill = call.node.args[2]
        return choose(values[1], values[2] if isinstance(fill, fx.Node) else _number(fill), values[0])
    if target in _ADDS:
        return _sum(call, values)
    if target in _SCALES and (scaled := _scaled(call, values)) is not None:
        return scaled
    return _bounded(call, values)


def _bounded(call: Described, values: Sequence[Value]) -> Value:
    """Ops that bound their result, or break outside their domain."""
    target = call.node.target
    if target in _CLAMPS:
        return _clamp(call, values[0])
    if target in (aten.maximum.default, aten.minimum.default):
        pick = max if target is aten.maximum.default else min
        about, finite = any(v.about for v in values), all(v.finite for v in values)
        return Value(pick(v.lo for v in values), pick(v.hi for v in values), about, finite)
    if target is aten._to_copy.default or target is aten.clone.default:
        return values[0] if call.node.meta["val"].dtype is not torch.bool else TRUTH
    if target in (aten.div.Tensor, aten.div.Scalar):
        divisor = _other(call, values)
        if divisor.exact and divisor.finite and divisor.lo != 0:
            return values[0].scaled(1.0 / divisor.lo)
        if not divisor.positive:
            return BROKEN
        return ZERO if values[0] == ZERO else generic(call.node, values)
    if target is aten.exp.default and values[0].hi <= TAME and values[0].finite:
        return UNKNOWN
    if target in _NEEDS_POSITIVE and not _in_domain(call, values[0]):
        return BROKEN
    return generic(call.node, values)


def _in_domain(call: Described, value: Value) -> bool:
    """Whether an op of ``_NEEDS_POSITIVE`` stays finite: squares of anything, positive operands."""
    given = call_of(call.node).args
    if call.node.target is aten.pow.Tensor_Scalar:
        exponent = given.get("exponent")
        return value.positive or (isinstance(exponent, (int, float)) and exponent >= 0 and exponent == int(exponent))
    if call.node.target is aten.linalg_vector_norm.default:
        order = given.get("ord", 2)
        return isinstance(order, (int, float)) and order > 0
    return value.positive


def _number(number: Any) -> Value:
    return Value.of(float(number)) if isinstance(number, (int, float)) else BROKEN


def _other(call: Described, values: Sequence[Value]) -> Value:
    """The second operand, which may be a number, or the size of a tensor: at least 1."""
    if len(values) > 1:
        return values[1]
    given = call.node.args[1]
    return Value(1.0, -NEG_INF) if isinstance(given, fx.Node) else _number(given)


def _branches(call: Described, values: Sequence[Value]) -> tuple[Value, Value]:
    """The values of the two branches of a ``where``; each is a tensor or a number."""
    tensors = iter(values[1:])
    first, second = (next(tensors) if isinstance(a, fx.Node) else _number(a) for a in call.node.args[1:3])
    return first, second


def choose(condition: Value, yes: Value, no: Value) -> Value:
    """What a selection gives: one side where the condition is known, else either."""
    if not condition.exact:
        return hull_of((yes, no))
    return yes if condition.lo else no


def _sum(call: Described, values: Sequence[Value]) -> Value:
    given = call_of(call.node).args
    alpha, both = given.get("alpha", 1), list(values)
    if len(both) == 1:
        both.append(_other(call, values))
    if not isinstance(alpha, (int, float)):
        return BROKEN
    subtracts = call.node.target in (aten.sub.Tensor, aten.sub.Scalar)
    other = both[1].scaled(-float(alpha) if subtracts else float(alpha))
    ends = both[0].lo + other.lo, both[0].hi + other.hi
    if any(map(math.isnan, ends)):
        return BROKEN
    return Value(*ends, both[0].about or other.about, both[0].finite and other.finite)


def _scaled(call: Described, values: Sequence[Value]) -> Value | None:
    """A product with one known number; None where neither side is known."""
    both = [*values, *([_other(call, values)] if len(values) == 1 else [])]
    for one, number in (both, both[::-1]):
        if number.exact and number.finite:
            return one.scaled(number.lo)
    if not any(v.about for v in both) and all(v.finite for v in both):
        ends = [a * b for a in (both[0].lo, both[0].hi) for b in (both[1].lo, both[1].hi)]
        return None if any(map(math.isnan, ends)) else Value(min(ends), max(ends))
    return None


def _clamp(call: Described, value: Value) -> Value:
    """A clamp bounds what it is given, known or not."""
    given = call_of(call.node).args
    low, high = given.get("min"), given.get("max")
    low = 0.0 if call.node.target is aten.relu.default else low
    if not all(b is None or isinstance(b, (int, float)) for b in (low, high)) or not value.finite:
        return BROKEN
    lo, hi = (NEG_INF, -NEG_INF) if value.about else (value.lo, value.hi)
    lo = lo if low is None else max(lo, low)
    hi = hi if high is None else min(hi, high)
    if lo == NEG_INF or (hi == -NEG_INF and not value.tame):
        return Value(lo, hi)
    return Value(lo, max(lo, hi))


def _evaluate(call: Described, numbers: Sequence[float]) -> Value:
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
        return BROKEN  # a size as a number: not a constant
    result = float(call.node.target(*args, **kwargs))  # type: ignore[operator]
    return BROKEN if math.isnan(result) else Value.of(result)
