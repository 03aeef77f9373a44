"""The abstract values of ``facts.py``: intervals of known numbers, exact or with something bounded added, finite or perhaps not.

Ends are computed by the op itself, in the operands' own dtypes: rounding is monotone, so what float32 makes of the ends bounds what it
makes of anything between them, and an overflow shows as an infinity.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from tpcompile.axes import NEG_INF
from tpcompile.passes.axesmap import Described
from tpcompile.passes.rules import bind, call_of
from tpcompile.passes.rules.ranges import (
    ADDS,
    ARITHMETIC,
    BROKEN,
    CLAMPS,
    COPIES,
    DIVS,
    DOMAINS,
    EQUALS,
    FILLS,
    GROWS,
    HUGE,
    KEEPS_SIGN,
    LIKES,
    LOW,
    MONOTONE,
    MULS,
    NEVER_NEGATIVE,
    NORMED,
    ON_BOOLS,
    PICKS,
    POWERS,
    QUOTIENTS,
    SELECTS,
    STEEP,
    SUBS,
    TAME,
    TINY,
    TRUE,
    TRUTH,
    UNKNOWN,
    WHERES,
    WHOLE,
    WILD,
    WITHIN_ONE,
    ZERO,
    Value,
    choose,
    epsilon,
    hull_of,
    run,
    shifted,
)  # fmt: skip

__all__ = [
    "BROKEN", "LOW", "SELECTS", "TRUE", "TRUTH", "UNKNOWN", "WILD", "WITHIN_ONE", "ZERO", "Value", "between", "choose", "elementwise",
    "generic", "hull_of", "known", "written",
]  # fmt: skip

aten = torch.ops.aten


def known(constant: torch.Tensor) -> Value:
    """The values of a weight or buffer: exact where it has one element, unknown where they are as small as activations."""
    if constant.numel() == 0:
        return UNKNOWN
    if constant.is_complex() or bool(constant.isnan().any()):
        return BROKEN
    lo, hi = float(constant.min()), float(constant.max())
    value = Value(lo, hi, finite=bool(constant.isfinite().all()))
    return value if constant.numel() == 1 or not value.tame else replace(UNKNOWN, least=lo)


def generic(node: fx.Node, values: Sequence[Value]) -> Value:
    """What any op makes of its operands when nothing better is known."""
    value, target = node.meta.get("val"), node.target
    if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
        return TRUTH
    if isinstance(target, OpOverload) and isinstance(written := bind(target, node.args, node.kwargs).get("value"), (int, float)):
        values = [*values, Value.of(float(written))]  # a scatter or a padding writes it among the others
    if not all(v.finite for v in values):
        return BROKEN
    if any(HUGE < abs(end) < -NEG_INF for v in values for end in (v.lo, v.hi)):
        return BROKEN  # finfo.min, times anything
    if target in WITHIN_ONE:
        return TRUTH if target is aten.sigmoid.default else Value(-1.0, 1.0)
    if target in NORMED:
        return UNKNOWN if epsilon(node) else BROKEN
    if target in GROWS and not all(v.lo >= -1.0 and v.hi <= 1.0 and not v.about for v in values):
        return BROKEN
    least = 0.0 if target in NEVER_NEGATIVE or (target in KEEPS_SIGN and all(v.floor >= 0 for v in values)) else NEG_INF
    return replace(UNKNOWN if all(v.tame for v in values) else WILD, least=least)


def elementwise(call: Described, values: Sequence[Value]) -> Value:
    """What an elementwise op makes of its operands' values."""
    assert call.rule is not None
    target, absorbs = call.node.target, call.rule.absorbs
    if target in LIKES:
        number = LIKES[target]
        return written(call.node, call_of(call.node).args.get("fill_value") if number is None else number)
    if target in QUOTIENTS and any(v.exact and abs(v.lo) > HUGE for v in values):
        return BROKEN  # kernels differ there
    if all(v.exact for v in values):
        result = run(call.node, [v.lo for v in values])
        return BROKEN if math.isnan(result) else Value.of(result)
    if absorbs == 1.0 and call.node.meta["val"].dtype is not torch.bool:
        absorbs = None  # 1 | 2 is 3
    if absorbs is not None and Value.of(absorbs) in values and all(v.finite for v in values):
        return Value.of(absorbs)
    if target in WHERES:
        return choose(values[0], *_branches(call, values))
    if target in FILLS:
        fill = call.node.args[2]
        return choose(values[1], values[2] if isinstance(fill, fx.Node) else written(call.node, fill), values[0])
    if any(v.wild for v in values):
        return generic(call.node, values)
    if not any(v.about for v in values) and (bounds := _apart(call, values) or _between(call, values)) is not None:
        return bounds
    return _around(call, values)


def _apart(call: Described, values: Sequence[Value]) -> Value | None:
    """What a comparison for equality gives where both sides can never be equal."""
    if call.node.target not in EQUALS:
        return None
    one, other = values[0], _other(call, values)
    apart = not other.about and (one.hi < other.lo or other.hi < one.lo)
    return (ZERO if EQUALS[call.node.target] else TRUE) if apart else None


def _between(call: Described, values: Sequence[Value]) -> Value | None:
    """The image of intervals under a monotone op, from its ends; None where the op is not, or its domain is left."""
    target, dtype = call.node.target, call.node.meta["val"].dtype
    if not (target in MONOTONE or _monotone_here(call, values)) or (target in DOMAINS and values[0].lo < DOMAINS[target]):
        return None
    whole = not dtype.is_floating_point and dtype is not torch.bool
    ends = [end for v in values for end in (v.lo, v.hi)]
    if any(abs(end) > WHOLE for end in ends) and (whole or any(not n.meta["val"].is_floating_point() for n in call.operands)):
        return None
    if whole and torch.iinfo(dtype).bits < 32:
        return None
    found = [run(call.node, corner) for corner in itertools.product(*((v.lo, v.hi) for v in values))]
    if any(map(math.isnan, found)):
        return None if all(v.finite for v in values) else BROKEN
    lo, hi = min(found), max(found)
    if target not in ARITHMETIC and dtype.is_floating_point and all(map(math.isfinite, (lo, hi))):
        lo, hi = lo - 1e-5 * abs(lo), hi + 1e-5 * abs(hi)
    lo, hi = 0.0 if 0 < lo < TINY else lo, 0.0 if -TINY < hi < 0 else hi
    given = all(v.finite for v in values)
    overflow = all(map(math.isfinite, ends)) and not all(map(math.isfinite, (lo, hi)))
    finite = (given and not overflow) or (math.isfinite(lo) and math.isfinite(hi))
    return Value(lo, hi, False, finite)


def _monotone_here(call: Described, values: Sequence[Value]) -> bool:
    """Ops that are monotone for some operands only."""
    target, dtype = call.node.target, call.node.meta["val"].dtype
    bounded = all(math.isfinite(end) for v in values for end in (v.lo, v.hi))
    if target in MULS:
        return bounded  # 0 * inf lies between the ends
    if target in DIVS:
        divisor = _other(call, values)
        return bounded and not divisor.about and (divisor.lo >= TINY or divisor.hi <= -TINY)
    if target in ON_BOOLS:
        return all(n.meta["val"].dtype is torch.bool for n in call.operands)
    if target in COPIES:
        return dtype is not torch.bool or call.operands[0].meta["val"].dtype is torch.bool or values[0].lo > 0 or values[0].hi < 0
    if target is aten.pow.Scalar:
        base = call_of(call.node).args.get("self")
        return isinstance(base, (int, float)) and TINY < base < HUGE and bounded
    if target is aten.pow.Tensor_Scalar:
        exponent = call_of(call.node).args.get("exponent")
        return isinstance(exponent, (int, float)) and exponent > 0 and values[0].lo >= 0
    return False


def _around(call: Described, values: Sequence[Value]) -> Value:
    """Ops on activations: sums keep what they are about, other ops at most a bound."""
    target, node = call.node.target, call.node
    if target in ADDS:
        return _sum(call, values)
    if target is aten.neg.default:
        return values[0].scaled(-1.0)
    if target in MULS:
        return _times(call, values)
    if target in CLAMPS:
        return _clamp(call, values[0])
    if target in PICKS:
        pick = max if target is aten.maximum.default else min
        about, finite = any(v.about for v in values), all(v.finite for v in values)
        return Value(pick(v.lo for v in values), pick(v.hi for v in values), about, finite, pick(v.floor for v in values))
    if target in COPIES:
        return _cast(call, values[0])
    return _guarded(call, values) if node.meta["val"].dtype is not torch.bool else TRUTH


def _guarded(call: Described, values: Sequence[Value]) -> Value:
    """Ops that break outside their domain."""
    target, node = call.node.target, call.node
    if target in DIVS:
        divisor = _other(call, values)
        if divisor.exact and divisor.finite and abs(divisor.lo) >= TINY:
            return _fitted(call, values[0].scaled(1.0 / divisor.lo))
        if divisor.floor < TINY:
            return BROKEN
        return ZERO if values[0] == ZERO and divisor.finite else generic(node, values)
    if target in QUOTIENTS:
        divisor = _other(call, values)
        apart = divisor.floor >= 1.0 / TAME or (not divisor.about and divisor.hi <= -1.0 / TAME)
        return generic(node, values) if apart and divisor.finite else BROKEN
    if target in POWERS and target in NEVER_NEGATIVE and values[0].finite and shifted(call.operands[0]):
        return TRUTH if target is not aten.cosh.default else BROKEN
    if target in POWERS:
        bounded = all(v.finite and v.hi <= STEEP and v.lo >= -STEEP for v in values)
        fine = bounded if target in (aten.sinh.default, aten.cosh.default) else values[0].finite and values[0].hi <= STEEP
        return replace(UNKNOWN, least=0.0 if target in NEVER_NEGATIVE else NEG_INF) if fine and values[0].about else BROKEN
    if target in DOMAINS:
        result = generic(node, values) if values[0].floor >= DOMAINS[target] else BROKEN
        root = target is aten.sqrt.default and result.about and result.finite
        return replace(result, least=math.sqrt(values[0].floor) * (1 - 1e-5)) if root else result
    if not _in_domain(call, values):
        return BROKEN
    result = generic(node, values)
    even = target is aten.pow.Tensor_Scalar and call_of(node).args["exponent"] in (2, 4)
    return replace(result, least=max(result.least, 0.0)) if even and result.about else result


def _in_domain(call: Described, values: Sequence[Value]) -> bool:
    """Whether an op with a domain of its own stays finite."""
    target, given = call.node.target, call_of(call.node).args
    if target is aten.pow.Tensor_Scalar:
        exponent = given.get("exponent")
        whole = isinstance(exponent, (int, float)) and exponent >= 0 and exponent == int(exponent)
        return whole or values[0].floor >= TINY
    if target in (aten.pow.Tensor_Tensor, aten.special_xlogy.default):
        number = values[0] if target is aten.pow.Tensor_Tensor else values[1]
        small = all(v.finite and not v.about and max(abs(v.lo), abs(v.hi)) <= 8 for v in values)
        return number.floor >= 1e-3 and small
    if target is aten.pow.Scalar:
        return False
    if target is aten.logit.default:
        return isinstance(given.get("eps"), float) and TINY < given["eps"] < 0.5
    return target is not aten.tan.default


def written(node: fx.Node, number: Any) -> Value:
    """A number as the result's dtype holds it."""
    if not isinstance(number, (int, float)):
        return BROKEN
    if math.isnan(number) or (math.isinf(number) and not node.meta["val"].is_floating_point()):
        return BROKEN
    return Value.of(float(torch.tensor(float(number), dtype=torch.float64).to(node.meta["val"].dtype)))


def _other(call: Described, values: Sequence[Value]) -> Value:
    """The second operand, which may be a number, or made of sizes."""
    if len(values) > 1:
        return values[1]
    given = call.node.args[1]
    if isinstance(given, fx.Node):
        return between(given.meta["val"])
    return Value.of(float(given)) if isinstance(given, (int, float)) else BROKEN


def between(number: Any) -> Value:
    """The range of a whole number made of sizes."""
    if isinstance(number, int):
        return Value.of(float(number))
    if not isinstance(number, torch.SymInt):
        return BROKEN
    ends = number.node.shape_env.bound_sympy(number.node.expr)
    lo, hi = (float(e) if isinstance(e, sympy.Integer) else None for e in (ends.lower, ends.upper))
    return Value(NEG_INF if lo is None else lo, -NEG_INF if hi is None else hi)


def _branches(call: Described, values: Sequence[Value]) -> tuple[Value, Value]:
    """The values of the two branches of a ``where``; each is a tensor or a number."""
    tensors = iter(values[1:])
    first, second = (next(tensors) if isinstance(a, fx.Node) else written(call.node, a) for a in call.node.args[1:3])
    return first, second


def _sum(call: Described, values: Sequence[Value]) -> Value:
    given = call_of(call.node).args
    alpha, both = given.get("alpha", 1), list(values)
    if len(both) == 1:
        both.append(_other(call, values))
    if not isinstance(alpha, (int, float)):
        return BROKEN
    if call.node.target is aten.rsub.Scalar:
        both = [both[1], both[0].scaled(-float(alpha))]
    else:
        both[1] = both[1].scaled(-float(alpha) if call.node.target in SUBS else float(alpha))
    ends = both[0].lo + both[1].lo, both[0].hi + both[1].hi
    if any(v.wild for v in both) or any(map(math.isnan, ends)):
        return BROKEN
    return _fitted(
        call, Value(*ends, both[0].about or both[1].about, both[0].finite and both[1].finite, both[0].floor + both[1].floor)
    )


def _fitted(call: Described, value: Value) -> Value:
    """A sum as the result's dtype holds it: an infinity stays one, and what is near the largest number may become one."""
    dtype = call.node.meta["val"].dtype
    least = value.least if abs(value.least) > TAME * TINY or value.least < 0 else 0.0
    value = replace(value, least=NEG_INF if math.isnan(least) or not value.about else least * (1 - 1e-5) if least > 0 else least)
    if value.lo == value.hi == NEG_INF and value.about and not value.finite:
        return Value.of(NEG_INF)
    if not dtype.is_floating_point and dtype is not torch.bool:
        wraps = torch.iinfo(dtype).bits < 32 or max(abs(value.lo), abs(value.hi)) > WHOLE
        return (WILD if value.finite else BROKEN) if wraps else value
    if not dtype.is_floating_point or not value.finite:
        return value
    most = torch.finfo(dtype).max * (
        0.5 if dtype is torch.float16 else 1.0
    )  # elsewhere an activation is less than half a step there
    lo = NEG_INF if NEG_INF < value.lo < -most else value.lo
    hi = -NEG_INF if most < value.hi < -NEG_INF else value.hi
    return value if (lo, hi) == (value.lo, value.hi) else replace(value, lo=lo, hi=hi, finite=False)


def _times(call: Described, values: Sequence[Value]) -> Value:
    """A product: with a known number a scaled activation; of two equal operands a square."""
    both = [*values, *([_other(call, values)] if len(values) == 1 else [])]
    for one, number in (both, both[::-1]):
        if number.exact and number.finite:
            return _fitted(call, one.scaled(number.lo))
    result = generic(call.node, both)
    square = len(call.operands) > 1 and call.operands[0] is call.operands[1]
    return replace(result, least=max(result.least, 0.0)) if square and result.about else result


def _clamp(call: Described, value: Value) -> Value:
    """A clamp bounds what it is given, known or not."""
    given = call_of(call.node).args
    low, high = given.get("min"), given.get("max")
    low = 0.0 if call.node.target is aten.relu.default else low
    if not all(b is None or isinstance(b, (int, float)) for b in (low, high)) or not value.finite:
        return BROKEN
    if high is None and value.tame and low is not None and abs(low) <= TAME:
        least = max(float(low), value.least)
        return Value(max(value.lo, low), max(value.hi, low), True, True, least if least >= TINY or least < 0 else 0.0)
    lo = NEG_INF if low is None else float(low)
    hi = -NEG_INF if high is None else float(high)
    return Value(min(lo, hi), hi)


def _cast(call: Described, value: Value) -> Value:
    """Another dtype: narrower ones overflow, whole numbers are cut."""
    dtype = call.node.meta["val"].dtype
    if dtype is torch.bool:
        return TRUTH
    if dtype.is_floating_point:
        return _fitted(call, value)
    return generic(call.node, [value]) if value.tame else (WILD if value.finite else BROKEN)
