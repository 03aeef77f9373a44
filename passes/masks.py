"""Masks in any dress: tensors that hold only a few known numbers, and what one mask says of the masks it was made from.

A mask may be bool, 0 and 1 in another dtype, or additive (0 and -1e4, 0 and -inf, sums of these). All are one thing here: a *set of
numbers* per node, found by running each elementwise op on every combination of its operands' numbers. Backwards the same combinations say
what a mask tells of its ingredients: where a conjunction is true both sides are.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from tpcompile.axes import NEG_INF
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.rules import Held
from tpcompile.passes.rules.ranges import NEVER_NEGATIVE, WITHIN_ONE, Value, exactly

aten = torch.ops.aten
Numbers = frozenset[float]
"""What a node holds, all told; empty where that is not known."""

BITS: Numbers = frozenset((0.0, 1.0))
NOTHING: Numbers = frozenset()
MOST = 8
"""Numbers a mask may hold: a sum of additive masks holds one more per layer."""
COMBINATIONS = 128
_STEPS = (aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default)
_SIDES = {aten.gt.Scalar: True, aten.ge.Scalar: True, aten.lt.Scalar: False, aten.le.Scalar: False}
"""Comparisons with a number: whether they are true above it."""
_NEVER = (*NEVER_NEGATIVE, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_CONSTANTS: dict[Any, float] = {
    aten.ones_like.default: 1.0, aten.zeros_like.default: 0.0, aten.ones.default: 1.0, aten.zeros.default: 0.0
}  # fmt: skip


class Masks:
    """Which nodes hold only a few known numbers, and which.

    Args:
        axes: the calls of a graph.
        constants: placeholder -> weight or buffer.
        bits: inputs that are taken to hold 0 and 1, and 1 at position 0.
    """

    def __init__(self, axes: AxesMap, constants: Mapping[str, torch.Tensor], bits: frozenset[str] = frozenset()) -> None:
        self.axes, self.constants, self.bits = axes, constants, bits
        self.known: dict[str, Numbers] = {}

    def __call__(self, node: fx.Node) -> Numbers:
        """The numbers that a node holds."""
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return NOTHING
        if node.name not in self.known:
            found = self._found(node)
            self.known[node.name] = found or (BITS if node.meta["val"].dtype is torch.bool else NOTHING)
        return self.known[node.name]

    def _found(self, node: fx.Node) -> Numbers:
        if node.op == "placeholder":
            return (
                _listed(self.constants[node.name]) if node.name in self.constants else BITS if node.name in self.bits else NOTHING
            )
        number = _CONSTANTS.get(node.target)
        if node.target in (aten.full.default, aten.full_like.default):
            number = node.args[1]  # type: ignore[assignment]
        elif node.target is aten.scalar_tensor.default:
            number = node.args[0]  # type: ignore[assignment]
        if isinstance(number, (bool, int, float)):
            held = float(torch.tensor(float(number), dtype=torch.float64).to(node.meta["val"].dtype))
            return NOTHING if math.isnan(held) or (math.isinf(number) and not math.isinf(held)) else frozenset((held,))
        call = self.axes.calls.get(node.name)
        return self._made(call) if call is not None and call.rule is not None else NOTHING

    def _made(self, call: Described) -> Numbers:
        assert call.rule is not None
        node = call.node
        match call.rule.held:
            case Held.MAP:
                return _steps(node) or frozenset(result for _, result in self.combinations(call))
            case Held.COPY | Held.SAME if len(call.operands) == 1:
                return self(call.operands[0])
            case Held.FRONT:
                sets = [self(operand) for operand in call.operands]
                together = NOTHING.union(*sets)
                return together if all(sets) and len(together) <= MOST else NOTHING
        chosen = (
            node.target in (aten.argmax.default, aten.argmin.default) and len(node.args) > 1 and isinstance(node.args[1], int)
        )
        return BITS if chosen and call.operands[0].meta["val"].shape[node.args[1]] == 2 else NOTHING

    def combinations(self, call: Described) -> list[tuple[tuple[float, ...], float]]:
        """What the operands of an elementwise op may hold together, with what the op makes of it; none where that is not known."""
        sets = tuple(self(operand) for operand in call.operands)
        count = math.prod(map(len, sets))
        if not 0 < count <= COMBINATIONS:
            return []
        kinds = tuple((operand.meta["val"].dtype, operand.meta["val"].dim() > 0) for operand in call.operands)
        arguments = _plain(call.node.args), _plain(tuple(sorted(call.node.kwargs.items())))
        if any(isinstance(a, fx.Node) for part in arguments for a in _leaves(part)):
            return []  # a size
        assert isinstance(call.node.target, OpOverload)
        found = _run(call.node.target, arguments, kinds, tuple(tuple(sorted(s)) for s in sets))
        results = {result for _, result in found}
        return [] if len(results) > MOST or any(map(math.isnan, results)) else list(found)


@dataclass(frozen=True, slots=True)
class _Written:
    """A number among an op's arguments, where 1, 1.0 and True differ; without one, the place of a tensor."""

    kind: type | None = None
    value: Any = None


def _plain(value: Any) -> Any:
    """Arguments that can be compared: tensors by their place only; sizes stay nodes."""
    if isinstance(value, fx.Node):
        return _Written() if isinstance(value.meta.get("val"), torch.Tensor) else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else _Written(type(value), value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


@lru_cache(maxsize=4096)
def _run(
    op: OpOverload, arguments: tuple[Any, Any], kinds: tuple[tuple[torch.dtype, bool], ...], sets: tuple[tuple[float, ...], ...]
) -> tuple[tuple[tuple[float, ...], float], ...]:
    """The op itself on every combination; an operand has a dtype, and a dim or none."""
    found = []
    for combined in itertools.product(*sets):
        tensors = (
            torch.full((1,) if wide else (), number, dtype=torch.float64).to(dtype)
            for number, (dtype, wide) in zip(combined, kinds, strict=True)
        )
        args, kwargs = (_filled(part, tensors) for part in arguments)
        found.append((combined, exactly(op, [dtype for dtype, _ in kinds], combined, op(*args, **dict(kwargs)))))
    return tuple(found)


def _filled(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(value, tuple):
        return [_filled(v, tensors) for v in value]
    return next(tensors) if value.kind is None else value.value


def _listed(constant: torch.Tensor) -> Numbers:
    """The numbers of a weight or buffer, where they are few."""
    if constant.numel() == 0 or constant.is_complex() or len(set(constant.flatten()[:64].tolist())) > MOST:
        return NOTHING
    values = frozenset(map(float, torch.unique(constant).tolist()))
    return NOTHING if len(values) > MOST or any(map(math.isnan, values)) else values


def _steps(node: fx.Node) -> Numbers:
    """Signs, and what rounding leaves of numbers between -1 and 1."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return NOTHING
    never = source.target in _NEVER or (_clamped(source) and source.args[1] >= 0)  # type: ignore[operator]
    within = source.target in WITHIN_ONE or _clamped(source)
    if node.target in (aten.sign.default, aten.sgn.default) or (node.target in _STEPS and within):
        return BITS if never else BITS | {-1.0}
    return NOTHING


def _clamped(node: fx.Node) -> bool:
    """Whether it is a clamp to bounds between -1 and 1."""
    bounds = node.args[1:]
    return (
        node.target is aten.clamp.default
        and len(bounds) == 2
        and all(isinstance(b, (int, float)) and abs(b) <= 1 for b in bounds)
    )


def moves(call: Described) -> bool:
    """Whether a call moves the elements of its one operand without changing them."""
    return call.rule is not None and call.rule.held is Held.COPY and len(call.operands) == 1


def whole(call: Described) -> bool:
    """Whether it moves every element: where only some positions are read, or their order changes, a dim of size 1 is all there is."""
    assert call.factors is not None
    sizes = dict(zip(call.factors.ins[0], call.operands[0].meta["val"].shape, strict=True))
    return moves(call) and all(sizes.get(factor, 1) == 1 for factor in {*call.factors.reads, *call.factors.rigid})


@dataclass(frozen=True, slots=True)
class Said:
    """What a keep mask says of a mask it was made from.

    Attributes:
        node: that mask.
        dim: its token dim.
        alive: what it holds at tokens that live on.
        dropped: what it may hold at tokens dropped there; empty where nothing is known.
    """

    node: fx.Node
    dim: int
    alive: float
    dropped: Numbers

    @property
    def same(self) -> bool:
        """Whether it tells dropped tokens from living ones: it is the keep mask in another form."""
        return bool(self.dropped) and self.alive not in self.dropped


def kept(keep: fx.Node) -> Said:
    """What a keep mask, bool ``[B, N]``, says of itself."""
    return Said(keep, 1, 1.0, frozenset((0.0,)))


Known = Mapping[tuple[str, int], float]
"""(node, token dim) -> what it is known to hold at the tokens in question."""


def said(start: Said, axes: AxesMap, masks: Masks, known: Known | None = None) -> Iterator[Said]:
    """Every mask that a mask determines, followed backwards through views and elementwise ops on masks.

    Args:
        start: the mask.
        axes: the calls of its graph.
        masks: the numbers that nodes hold.
        known: of the tokens dropped there: what survived every earlier site was alive in what these were made from.
    """
    stack, seen = [start], set[Said]()
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if at is not start:
            yield at
        stack.extend(_behind(at, axes, masks, known or {}))


def _behind(at: Said, axes: AxesMap, masks: Masks, known: Known) -> Iterator[Said]:
    call = axes.calls.get(at.node.name)
    if call is None or call.factors is None or call.rule is None:
        return
    factor = call.factors.outs[0][at.dim]
    if factor is None or factor in call.factors.rigid or factor in call.factors.reads or factor in call.factors.folds:
        return
    if call.rule.held is Held.MAP:
        combined = masks.combinations(call)
    else:
        combined = [((number,), number) for number in masks(call.operands[0])] if whole(call) else []
    spots = [(operand.name, next(call.of(i, factor), -1)) for i, operand in enumerate(call.operands)]
    gone = [
        given
        for given, result in combined
        if result in at.dropped and all(known.get(spot, number) == number for spot, number in zip(spots, given, strict=True))
    ]
    for index, operand in enumerate(call.operands):
        alive = {given[index] for given, result in combined if result == at.alive}
        if len(alive) == 1:
            dropped = frozenset(given[index] for given in gone)
            yield from (Said(operand, dim, min(alive), dropped) for dim in call.of(index, factor))


def compared(one: Said, axes: AxesMap) -> Iterator[tuple[fx.Node, int, Value]]:
    """Where a mask is a comparison with a number: what is compared, its token dim, and the numbers it holds at dropped tokens."""
    node, call = one.node, axes.calls.get(one.node.name)
    if node.target not in _SIDES or len(one.dropped) != 1 or not one.same or call is None or call.factors is None:
        return
    number, factor = node.args[1], call.factors.outs[0][one.dim]
    if not isinstance(number, (int, float)) or not call.operands[0].meta["val"].is_floating_point():
        return
    bound = float(torch.tensor(float(number), dtype=call.operands[0].meta["val"].dtype))
    above = _SIDES[node.target] == (1.0 in one.dropped)
    value = Value(bound, -NEG_INF) if above else Value(NEG_INF, bound)
    yield from ((call.operands[0], dim, value) for dim in call.of(0, str(factor)))
