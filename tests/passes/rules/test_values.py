"""What ``values.py`` claims of an op's result holds for every tensor inside its operands' intervals."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpcompile.axes import NEG_INF
from tpcompile.passes.axesmap import Described
from tpcompile.passes.rules import RULES, Held, Rule
from tpcompile.passes.rules.law import Case, cases, run
from tpcompile.passes.values import BROKEN, TRUE, TRUTH, UNKNOWN, WILD, ZERO, Value, elementwise, generic, known

LEAST = torch.finfo(torch.float32).min
REAL = [
    ZERO, TRUE, TRUTH, UNKNOWN, BROKEN, Value.of(2.5), Value.of(-1e4), Value.of(LEAST), Value.of(NEG_INF), Value(-1.0, 1.0),
    Value(-1e4, 0.0), Value(LEAST, 0.0), Value(NEG_INF, 0.0, finite=False), Value(1e-12, 2.0), Value(-1e4, -1e4, about=True),
    Value(LEAST, LEAST, about=True), Value(1e-45, 1.0), Value(-30.0, 30.0), Value(0.0, 3e38), Value(3.0, 3.0, about=True),
    Value(0.0, 0.0, about=True, least=0.0), Value(0.0, 0.0, about=True, least=1e-6), Value(0.25, 0.75), Value(-8.0, -0.5),
]  # fmt: skip
WHOLE = [ZERO, TRUE, TRUTH, Value.of(3.0), Value(0.0, 5.0), Value(-3.0, 100.0), Value(0.0, 40000.0)]
ELEMENTWISE = [r for r in RULES.values() if r.held is Held.MAP]
FOLDED = [r for r in RULES.values() if r.held is Held.ZERO]


def some(dtype: torch.dtype) -> st.SearchStrategy[Value]:
    """Values that a tensor of a dtype may hold."""
    return st.sampled_from(REAL if dtype.is_floating_point else [ZERO, TRUE, TRUTH] if dtype is torch.bool else WHOLE)


def drawn(value: Value, like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of elements inside a value: its ends, what lies between them, and an activation added where it has one."""
    if value.exact:
        return torch.full(like.shape, value.lo, dtype=torch.float64).to(like.dtype)
    lo, hi = (max(min(end, 3e38), -3.4028234e38) for end in (value.lo, value.hi))
    place = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    snapped = torch.randint(0, 3, like.shape, generator=generator)
    place = torch.where(snapped == 0, 0.0, torch.where(snapped == 1, 1.0, place))
    numbers = lo * (1 - place) + hi * place
    if value.about:
        numbers = numbers + torch.randn(like.shape, generator=generator, dtype=torch.float64).clamp(-3, 3)
        numbers = numbers.clamp(min=value.least) if value.least > NEG_INF else numbers
    if not value.finite:
        numbers = torch.where(snapped == 2, value.lo, numbers)
        if value.wild:
            numbers = torch.where((snapped == 2) & (place > 0.5), math.nan, numbers)
    if not like.dtype.is_floating_point:
        numbers = numbers.floor()
    return numbers.to(like.dtype)


def outside(result: Tensor, value: Value) -> str:
    """What breaks a claim; empty where it holds."""
    found = result.double()
    if value.finite and not found.isfinite().all():
        return "not finite"
    if not value.wild and found.isnan().any():
        return "NaN"
    found = found[~found.isnan()]
    if not value.about and value.finite and found.numel():
        low, high = (1e-6 * abs(end) if math.isfinite(end) else 0.0 for end in (value.lo, value.hi))
        if (found < value.lo - low - 1e-37).any() or (found > value.hi + high + 1e-37).any():
            return f"[{found.min():.6g}, {found.max():.6g}]"
    if value.floor > NEG_INF and (found < value.floor - 1e-6 * abs(value.floor) - 1e-37).any():
        return f"least {found.min():.6g}"
    return ""


def described(case: Case) -> Described:
    return Described(case.node, case.factors, tuple(n for n in case.node.graph.nodes if n.op == "placeholder"), case.rule)


def each_case(rule: Rule) -> Iterator[tuple[Case, Described]]:
    yield from ((case, described(case)) for case in cases(rule))


@pytest.mark.parametrize("rule", ELEMENTWISE, ids=lambda rule: str(rule.op).removeprefix("aten."))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_elementwise_claims_hold(rule: Rule, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    for case, call in each_case(rule):
        values = [data.draw(some(t.dtype)) for t in case.tensors]
        claim = elementwise(call, values)
        tensors = [drawn(v, t, generator) for v, t in zip(values, case.tensors, strict=True)]
        try:
            (result,) = run(case, tensors)
        except RuntimeError:  # whole numbers divided by 0
            continue
        assert outside(result, claim) == "", f"{values} -> {claim}"


def test_a_product_beyond_float32_may_be_infinite() -> None:
    assert Value(LEAST, LEAST, about=True).scaled(-1e4) == BROKEN
    assert Value(LEAST, 0.0).scaled(2.0) == BROKEN
    assert Value(LEAST, 0.0).scaled(-1.0) == Value(0.0, -LEAST)
    assert UNKNOWN.scaled(-1e4) == WILD
    assert UNKNOWN.scaled(LEAST) == BROKEN


@pytest.mark.parametrize("rule", FOLDED, ids=lambda rule: str(rule.op).removeprefix("aten."))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_claims_on_combinations_hold(rule: Rule, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    for case, _ in each_case(rule):
        values = [data.draw(some(t.dtype)) for t in case.tensors]
        claim = generic(case.node, values)
        tensors = [drawn(v, t, generator) for v, t in zip(values, case.tensors, strict=True)]
        assert outside(run(case, tensors)[0], claim) == "", f"{values} -> {claim}"


@pytest.mark.parametrize(
    "numbers", [[0.0, 1.0], [-1e4], [math.nan, 1.0], [NEG_INF, 0.0], [NEG_INF, -NEG_INF], [1e9, 2.0], [0.5, 0.7], []]
)
def test_constants_lie_in_what_is_known_of_them(numbers: list[float]) -> None:
    constant = torch.tensor(numbers)
    assert outside(constant, known(constant)) == ""


def claim_of(op: Any, *values: Value, sample: int = 0) -> Value:
    case, call = list(each_case(RULES[op]))[sample]
    assert len(case.tensors) == len(values)
    return elementwise(call, values)


aten = torch.ops.aten


def test_what_must_be_known_of_masks() -> None:
    assert claim_of(aten.mul.Tensor, TRUTH, TRUTH) == TRUTH
    assert claim_of(aten.minimum.default, TRUTH, ZERO) == ZERO
    assert claim_of(aten.neg.default, TRUTH) == Value(-1.0, 0.0)
    assert claim_of(aten.sub.Tensor, TRUE, TRUTH) == TRUTH
    assert claim_of(aten.mul.Tensor, TRUTH, Value.of(-1e4)) == Value(-1e4, 0.0)
    assert claim_of(aten.log.default, ZERO) == Value.of(NEG_INF)
    assert claim_of(aten.add.Tensor, Value.of(LEAST), UNKNOWN) == Value(LEAST, LEAST, about=True)
    twice = claim_of(aten.add.Tensor, Value(LEAST, LEAST, about=True), Value.of(LEAST))
    assert (twice.lo, twice.finite, twice.below(UNKNOWN)) == (NEG_INF, False, True)
    assert claim_of(aten.add.Tensor, Value.of(NEG_INF), UNKNOWN) == Value.of(NEG_INF)
    assert claim_of(aten.minimum.default, BROKEN, Value.of(-1e4)).wild
    assert not claim_of(aten.mul.Tensor, Value(NEG_INF, 0.0, finite=False), TRUTH).finite


def test_what_stays_above_zero() -> None:
    square = claim_of(aten.abs.default, UNKNOWN)
    assert (square.floor, square.positive) == (0.0, False)
    assert claim_of(aten.add.Tensor, square, Value.of(1e-12)).positive
    assert not claim_of(aten.add.Tensor, square, Value.of(1e-45)).positive
    assert claim_of(aten.sqrt.default, square).finite
    assert not claim_of(aten.rsqrt.default, square).finite
    assert not claim_of(aten.reciprocal.default, UNKNOWN).finite
    assert not claim_of(aten.exp.default, WILD).finite


def test_a_number_that_an_op_writes_is_among_its_values() -> None:
    case = next(cases(RULES[aten.scatter.value]))
    case.node.args = (*case.node.args[:3], NEG_INF)
    assert not generic(case.node, [UNKNOWN, TRUTH]).finite
    case.node.args = (*case.node.args[:3], -1e4)
    assert generic(case.node, [UNKNOWN, TRUTH]) == WILD
