"""The law over the whole registry, and wrong rules that it must catch."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from tpcompile.axes import NEG_INF, Factors
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.fact import Fact
from tpcompile.passes.facts import Facts
from tpcompile.passes.rules import RULES, Call, Held, Rule, register
from tpcompile.passes.rules.base import names
from tpcompile.passes.rules.law import Case, breaches, cases, put, run, unexercised
from tpcompile.passes.values import Value, known

aten = torch.ops.aten
EVERY = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: str(rule.op).removeprefix("aten."))
NUMBERS = (0.0, 1.0, 2.5, -1e4, NEG_INF)


@EVERY
def test_the_law_holds(rule: Rule) -> None:
    assert breaches(rule) == []


@EVERY
def test_the_samples_exercise_every_factor(rule: Rule) -> None:
    assert unexercised(rule) == []


@EVERY
def test_what_dropped_tokens_hold_is_predicted(rule: Rule) -> None:
    if rule.held is Held.NONE:
        pytest.skip("nothing is claimed")
    assert list(mispredicted(rule)) == []


def mispredicted(rule: Rule) -> Iterator[str]:
    """Where ``facts`` says a dropped position holds a value, and the op says otherwise."""
    for number, case in enumerate(cases(rule)):
        graph = case.node.graph
        facts = Facts(graph, AxesMap(graph), {}, {})
        call = Described(case.node, case.factors, tuple(n for n in graph.nodes if n.op == "placeholder"), rule)
        for factor, size in case.lawful().items():
            for held in placed(case, factor, size):
                given = [
                    Fact(held={(d, 1): held[i] for d in call.of(i, factor)} if i in held else {}, rest=known(tensor))
                    for i, tensor in enumerate(case.tensors)
                ]
                value = facts._result(call, given, factor, 1)
                filled = [
                    filled_at(t, dims, factor, held.get(i))
                    for i, (t, dims) in enumerate(zip(case.tensors, case.factors.ins, strict=True))
                ]
                if value is not None and not all(
                    stored(r, dims, factor, value) for r, dims in zip(run(case, filled), case.factors.outs, strict=True)
                ):
                    yield f"sample {number}, factor {factor}, {held}: {value} is predicted"


def placed(case: Case, factor: str, size: int) -> Iterator[dict[int, Value]]:
    """Which operands hold what at the dropped position: every number in every operand alone, and in pairs."""
    having = [i for i, dims in enumerate(case.factors.ins) if factor in dims]
    values = [*(Value.of(n) for n in NUMBERS), Value(-1e4, -1e4, about=True)]
    for i in having:
        yield from ({i: v} for v in values if fits(case.tensors[i], v))
        for j in (j for j in having if j > i):
            yield from ({i: v, j: w} for v in values for w in values if fits(case.tensors[i], v) and fits(case.tensors[j], w))


def fits(tensor: Tensor, value: Value) -> bool:
    """Whether a tensor's dtype can hold the value."""
    return tensor.is_floating_point() or (value.exact and value.lo in (0.0, 1.0))


def filled_at(tensor: Tensor, dims: tuple[str | None, ...], factor: str, value: Value | None) -> Tensor:
    """The operand with the value at the last position of the factor; a low value is the number plus what was there."""
    if value is None:
        return tensor
    for d, f in enumerate(dims):
        if f == factor:
            keep = torch.arange(tensor.shape[d] - 1)
            tensor = (
                torch.where(put(torch.zeros_like(tensor), d, keep, 1.0) == 1, tensor + value.lo, tensor)
                if value.about
                else put(tensor, d, keep, value.lo)
            )
    return tensor


def stored(result: Tensor, dims: tuple[str | None, ...], factor: str, value: Value) -> bool:
    """Whether the last position along the factor holds the value."""
    for d, f in enumerate(dims):
        if f == factor:
            found = result.select(d, -1).double()
            if not value.finite:
                continue
            slack = 50.0 if value.about else 1e-5 * max(1.0, abs(value.lo) if value.exact else 1.0)
            near = (found >= value.lo - slack) & (found <= value.hi + slack)
            if not near.all():
                return False
    return True


def wrong(op: OpOverload, factors: Callable[[Call], Factors], samples: list[tuple[Any, ...]], **more: Any) -> Rule:
    """A rule outside the registry."""
    options = {"held": Held.NONE, "sized": "", "absorbs": None, "neutral": ()} | more
    return Rule(op=op, factors=factors, samples=lambda: samples, where="here.py:1", **options)


def free(call: Call) -> Factors:
    letters = names(call.out.rank)
    return Factors(tuple(letters for _ in call.tensors), (letters,))


def mean_with_zero(call: Call) -> Factors:
    return Factors((("d0", "d1", "d2"),), (("d0", "d2"),), folds={"d1": 0.0})


def fold_with_one(call: Call) -> Factors:
    return Factors((("d0", "d1", "d2"),), (("d0", "d2"),), folds={"d1": 1.0})


def swapped(call: Call) -> Factors:
    return Factors((("b", "n", "c"),), (("b", "c", "n"),))


def square(call: Call) -> Factors:
    return Factors((("b", "n", "m"),), (("b", "n", "m"),))


def first_only(call: Call) -> Factors:
    return Factors((("d0", "d1", "d2"),), (("d0", "d2"),), reads={"d1": (0, 1)})


def kept_apart(call: Call) -> Factors:
    return Factors(((None, None, None),), ((None, None, None),))


WRONG = {
    "cumsum as pointwise": (wrong(aten.cumsum.default, free, [(torch.randn(3, 5, 4), 1)]), "factor d1, kept"),
    "mean folds with 0": (wrong(aten.mean.dim, mean_with_zero, [(torch.randn(3, 5, 4), [1])]), "factor d1, kept"),
    "softmax is free along its dim": (wrong(aten.softmax.int, free, [(torch.randn(3, 5, 4), 1)]), "factor d1, kept"),
    "a view swaps factors": (wrong(aten.reshape.default, swapped, [(torch.randn(3, 5, 4), [3, 4, 5])], sized="shape"), "factor n, kept"),
    "a transpose keeps factors": (wrong(aten.transpose.int, square, [(torch.randn(3, 5, 4), 1, 2)]), "factor n has dims of sizes [4, 5]"),
    "a view swaps equal factors": (wrong(aten.transpose.int, square, [(torch.randn(3, 5, 5), 1, 2)]), "factor n, kept"),
    "position 1 is called 0": (wrong(aten.select.int, first_only, [(torch.randn(3, 5, 4), 1, 1)]), "factor d1, kept"),
    "sum folds with 1": (wrong(aten.sum.dim_IntList, fold_with_one, [(torch.randn(3, 5, 4), [1])]), "factor d1, kept"),
    "max folds with 0": (wrong(aten.amax.default, mean_with_zero, [(torch.randn(3, 5, 4) - 5, [1])]), "factor d1, kept"),
    "dims without factors": (
        wrong(aten.neg.default, kept_apart, [(torch.randn(3, 5, 4),)]),
        "operand 0: dim 0 of size 3 belongs to no factor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(name: str) -> None:
    rule, reason = WRONG[name]
    found = breaches(rule)
    assert found
    assert found[0].startswith(f"{rule.op} (here.py:1) sample 0: {reason}")


def test_a_wrong_claim_on_held_values_is_caught() -> None:
    cosine = wrong(aten.cos.default, free, [(torch.randn(3, 5),)], held=Held.COPY)
    zero = "Value(lo=0.0, hi=0.0, about=False, finite=True)"
    assert list(mispredicted(cosine))[:1] == [f"sample 0, factor d0, {{0: {zero}}}: {zero} is predicted"]
    added = wrong(aten.add.Tensor, free, [(torch.randn(3, 5), torch.randn(3, 5))], held=Held.MAP, absorbs=0.0)
    assert list(mispredicted(added))


def biased(rule: Rule) -> list[str]:
    """Samples in which an operand full of its neutral value does not leave the other one as it is."""
    found = []
    for number, case in enumerate(cases(rule)):
        for i, value in enumerate(rule.neutral):
            other = case.tensors[1 - i]
            if value is None or other.dtype is not case.results[0].dtype or other.dtype is torch.int64:
                continue  # of whole numbers nothing is said: 1 & 3 is 1
            given = iter(torch.full_like(t, value) if j == i else t for j, t in enumerate(case.tensors))
            args = [next(given) if isinstance(arg, Tensor) else arg for arg in case.args]
            result = rule.op(*args, **case.kwargs)
            if len(case.tensors) != len(rule.neutral) or not torch.equal(result, other.broadcast_to(result.shape)):
                found.append(f"sample {number}, operand {i}")
    return found


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.neutral], ids=lambda rule: str(rule.op))
def test_a_neutral_operand_changes_nothing(rule: Rule) -> None:
    assert biased(rule) == []


def test_a_wrong_neutral_is_caught() -> None:
    samples = [(torch.randn(3, 5), torch.randn(3, 5))]
    assert biased(wrong(aten.sub.Tensor, free, samples, neutral=(0.0, 0.0))) == ["sample 0, operand 0"]


def test_short_samples_are_named() -> None:
    assert unexercised(wrong(aten.neg.default, free, [(torch.randn(2, 5, 4),)])) == ["d0"]
    assert unexercised(wrong(aten.select.int, first_only, [(torch.randn(3, 2, 4), 1, 0)])) == ["d1"]


def test_registering_twice_names_both_places() -> None:
    known = RULES[aten.tanh.default]
    here = inspect.currentframe()
    assert here is not None
    with pytest.raises(ValueError, match=r"^aten\.tanh\.default has a rule at") as caught:
        register(aten.tanh.default, free, list)
    assert str(caught.value) == f"aten.tanh.default has a rule at {known.where} and another at test_laws.py:{here.f_lineno - 1}"
    assert RULES[aten.tanh.default] is known


def test_a_rule_remembers_where_it_was_registered() -> None:
    assert RULES[aten.layer_norm.default].where.startswith("reductions.py:")
    assert isinstance(next(cases(RULES[aten.cat.default])).node, fx.Node)
