"""Sets of numbers, and how ops bound what they make of them: the tables behind ``passes/values.py``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from tpcompile.axes import NEG_INF
from tpcompile.passes.rules.base import call_of, tensor_nodes

LOW = -1000.0
"""How far below the living a finite mask must lie; the bound this puts on the logits' spread is a recorded assumption."""
TAME = 1000.0
"""Numbers up to here keep an unknown activation bounded when they are combined with it."""
TINY = 1.2e-38
"""Engines may flush smaller numbers to 0."""

STEEP = 40.0
"""The exponential of an activation about no more than this is an activation."""
HUGE = 1e15
"""Known numbers above it may overflow when they are combined with activations."""
MOST = torch.finfo(torch.float32).max
"""What is larger is infinite."""
WHOLE = 2.0**15
"""Whole numbers up to here neither wrap nor round when two are added or multiplied."""
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Value:
    """A set of numbers: the interval ``[lo, hi]``, and when ``about`` that plus any bounded activation.

    Attributes:
        lo: least.
        hi: greatest.
        about: an activation of unknown but bounded size is added.
        finite: no element is infinite or NaN. Where it is not set, NaN is excluded only if one end is a finite number.
        least: no element is smaller, whatever activation is added.
    """

    lo: float
    hi: float
    about: bool = False
    finite: bool = True
    least: float = field(default=NEG_INF, repr=False)

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
    def floor(self) -> float:
        """What no element is smaller than."""
        return self.least if self.about else self.lo

    @property
    def positive(self) -> bool:
        """Whether every element is surely above 0."""
        return self.floor >= TINY

    @property
    def wild(self) -> bool:
        """Whether an element may be NaN."""
        return not self.finite and self.lo == NEG_INF and self.hi == -NEG_INF

    def below(self, other: "Value") -> bool:
        """Whether it lies so far below that a softmax or max over both never picks it."""
        if self.exact and self.lo == NEG_INF:
            return other.finite
        return self.hi - other.lo <= LOW

    def scaled(self, by: float) -> "Value":
        """Times a number; anything where an end leaves float32."""
        ends = sorted((self.lo * by, self.hi * by))
        if any(map(math.isnan, ends)) or any(math.isfinite(end) and abs(end * by) > MOST for end in (self.lo, self.hi)):
            return BROKEN
        if self.about and abs(by) > TAME:
            return WILD if self.finite and abs(by) <= HUGE else BROKEN
        least = self.least * by if self.about and by > 0 else NEG_INF
        return Value(ends[0], ends[1], self.about, self.finite, least)


ZERO, TRUE = Value(0.0, 0.0), Value(1.0, 1.0)
UNKNOWN = Value(0.0, 0.0, about=True)
"""An activation: bounded, by assumption."""
WILD = Value(NEG_INF, -NEG_INF, about=True)
"""Finite, of any size."""
BROKEN = Value(NEG_INF, -NEG_INF, about=True, finite=False)
"""Anything, perhaps infinite or NaN."""
TRUTH = Value(0.0, 1.0)


aten = torch.ops.aten

ADDS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
SUBS = (aten.sub.Tensor, aten.sub.Scalar)
MULS = (aten.mul.Tensor, aten.mul.Scalar)
DIVS = (aten.div.Tensor, aten.div.Scalar)
WHERES = (aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
LIKES = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0, aten.full_like.default: None}
CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.relu.default)
PICKS = (aten.maximum.default, aten.minimum.default)
COPIES = (aten._to_copy.default, aten.clone.default)
POWERS = (aten.exp.default, aten.exp2.default, aten.expm1.default, aten.sinh.default, aten.cosh.default)
QUOTIENTS = (
    aten.remainder.Tensor, aten.remainder.Scalar, aten.fmod.Tensor, aten.fmod.Scalar, aten.floor_divide.default,
    aten.div.Tensor_mode, aten.div.Scalar_mode,
)  # fmt: skip
DOMAINS: dict[Any, float] = {
    aten.log.default: TINY, aten.log2.default: TINY, aten.log10.default: TINY, aten.rsqrt.default: TINY, aten.reciprocal.default: TINY,
    aten.sqrt.default: 0.0, aten.log1p.default: -0.999999, aten.acosh.default: 1.0,
}  # fmt: skip
"""Ops that are finite from here upwards."""
MONOTONE = (
    *ADDS, *CLAMPS, *PICKS, *DOMAINS, aten.neg.default, aten.exp.default, aten.exp2.default, aten.expm1.default, aten.sinh.default,
    aten.tanh.default, aten.sigmoid.default, aten.erf.default, aten.atan.default, aten.sign.default, aten.floor.default,
    aten.ceil.default, aten.trunc.default, aten.round.default, aten.relu6.default, aten.hardsigmoid.default,
    aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar,
)  # fmt: skip
"""Ops that never fall, or never rise, in each operand alone: their ends bound them."""
ON_BOOLS = (
    aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.__or__.Tensor, aten.bitwise_or.Tensor,
    aten.logical_or.default, aten.bitwise_not.default, aten.logical_not.default,
)  # fmt: skip
ARITHMETIC = (*ADDS, *MULS, *CLAMPS, *PICKS, *COPIES, aten.neg.default, aten.sign.default)
"""Ops that every engine rounds alike; others get some slack."""
NORMED = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default)
GROWS = (aten.prod.dim_int, aten.cumprod.default)
NEVER_NEGATIVE = (
    aten.abs.default, aten.exp.default, aten.exp2.default, aten.cosh.default, aten.sqrt.default, aten.rsqrt.default,
    aten.sigmoid.default, aten.relu.default, aten.relu6.default, aten.hardsigmoid.default, aten.erfc.default, aten.softplus.default,
    aten.linalg_vector_norm.default, aten.hypot.default,
)  # fmt: skip
KEEPS_SIGN = (
    *MULS, *DIVS, aten.sum.dim_IntList, aten.mean.dim, aten.cumsum.default, aten.matmul.default, aten.bmm.default, aten.mm.default,
    aten.reciprocal.default, aten.floor.default, aten.trunc.default, aten.round.default,
)  # fmt: skip
"""Ops that make nothing negative of operands that are not."""

WITHIN_ONE = (
    aten.tanh.default, aten.sigmoid.default, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.sin.default,
    aten.cos.default, aten.erf.default,
)  # fmt: skip
SELECTS = (*WHERES, *FILLS)
EQUALS = {aten.eq.Scalar: True, aten.eq.Tensor: True, aten.ne.Scalar: False, aten.ne.Tensor: False}
"""Comparisons for equality, and for the contrary."""
SAME_AT_EQUALS = (
    aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.sub.Tensor,
)  # fmt: skip
"""Ops that give one number wherever both operands are equal."""


def hull_of(values: Sequence[Value]) -> Value:
    """The smallest set that holds them all."""
    about, finite = any(v.about for v in values), all(v.finite for v in values)
    least = min(v.floor for v in values) if about else NEG_INF
    return Value(min(v.lo for v in values), max(v.hi for v in values), about, finite, least)


def choose(condition: Value, yes: Value, no: Value) -> Value:
    """What a selection gives: one side where the condition is known, else either."""
    if not condition.exact:
        return hull_of((yes, no))
    return yes if condition.lo else no


def epsilon(node: fx.Node) -> bool:
    """Whether a norm adds something to the variance; without, a constant row is divided by 0."""
    given = call_of(node).args.get("eps", 1e-5)
    return given is None or (isinstance(given, (int, float)) and given >= TINY)


def shifted(node: fx.Node) -> bool:
    """Whether it is ``x - amax(x)``: never above 0."""
    if node.target is not aten.sub.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    x, most = node.args
    return (
        isinstance(most, fx.Node)
        and most.target is aten.amax.default
        and most.args[0] is x
        and bool(call_of(most).args.get("keepdim"))
    )


SIGNED = (
    *DIVS, aten.div.Tensor_mode, aten.div.Scalar_mode, aten.reciprocal.default, aten.rsqrt.default, aten.atan2.default,
    aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.floor_divide.default, aten.remainder.Tensor,
    aten.remainder.Scalar, aten.fmod.Tensor, aten.fmod.Scalar, aten.copysign.Tensor, aten.copysign.Scalar,
)  # fmt: skip
"""Ops that tell 0.0 from -0.0, which are one number here."""
WIDEST = 2.0**53
"""Whole numbers up to here are floats."""


def exactly(op: OpOverload, dtypes: Sequence[torch.dtype], numbers: Sequence[float], result: torch.Tensor) -> float:
    """What an op made of known numbers; NaN where the sign of a zero decides, or a whole number is too large to be kept as it is."""
    number = float(result)
    signed = op in SIGNED and 0.0 in numbers and (math.isinf(number) or op is aten.atan2.default)
    wide = [n for n, dtype in zip(numbers, dtypes, strict=True) if not dtype.is_floating_point and abs(n) > WIDEST]
    return math.nan if signed or wide or (not result.is_floating_point() and abs(number) > WIDEST) else number


def run(node: fx.Node, numbers: Sequence[float]) -> float:
    """The op itself on numbers, in the operands' own dtypes; NaN where that is not known (see ``exactly``), or a size enters."""
    given = iter(numbers)

    def fill(value: Any) -> Any:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            like = value.meta["val"]
            return torch.full((1,) if like.dim() else (), next(given), dtype=torch.float64).to(like.dtype)
        if isinstance(value, (list, tuple)):
            return [fill(v) for v in value]
        return value

    args = [fill(a) for a in node.args]
    kwargs = {k: fill(v) for k, v in node.kwargs.items()}
    if any(isinstance(a, fx.Node) for a in [*args, *kwargs.values()]):
        return math.nan
    assert isinstance(node.target, OpOverload)
    dtypes = [n.meta["val"].dtype for n in tensor_nodes(node)]
    return exactly(node.target, dtypes, numbers, node.target(*args, **kwargs))
