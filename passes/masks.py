"""Masks held as bool, int or float, and what a keep mask says of the masks it was made from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.rules import Held

aten = torch.ops.aten

ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor, aten.minimum.default)
ORS = (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, aten.maximum.default)
NOTS = (aten.bitwise_not.default, aten.logical_not.default)
_SCALARS = (aten.ne.Scalar, aten.eq.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)
_MINUS = (aten.rsub.Scalar, aten.sub.Tensor)


class Binary:
    """Which nodes hold nothing but 0 and 1.

    Args:
        axes: the calls of a graph.
        constants: placeholder -> weight or buffer.
    """

    def __init__(self, axes: AxesMap, constants: Mapping[str, torch.Tensor]) -> None:
        self.axes, self.constants = axes, constants
        self.known: dict[str, bool] = {}

    def __call__(self, node: Any) -> bool:
        """Whether a node, or a number, is 0 or 1 everywhere."""
        if isinstance(node, (bool, int, float)):
            return node in (0, 1)
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            return False
        if node.name not in self.known:
            self.known[node.name] = self._decide(node)
        return self.known[node.name]

    def _decide(self, node: fx.Node) -> bool:
        if node.meta["val"].dtype is torch.bool:
            return True
        if node.op == "placeholder":
            value = self.constants.get(node.name)
            return value is not None and bool(torch.isin(value, torch.tensor([0, 1], dtype=value.dtype)).all())
        if node.target in (aten.full.default, aten.scalar_tensor.default):
            return self(node.args[1] if node.target is aten.full.default else node.args[0])
        if node.target in (aten.ones_like.default, aten.zeros_like.default, aten.ones.default, aten.zeros.default):
            return True
        if node.target in (*ANDS, *ORS) or node.target is aten._to_copy.default:
            return all(self(a) for a in node.args)
        if complement(node) is not None:
            return self(complement(node))
        if node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
            return self(node.args[1]) and self(node.args[2])
        call = self.axes.calls.get(node.name)
        return call is not None and moves(call) and self(call.operands[0])


def moves(call: Described) -> bool:
    """Whether a call moves the elements of its one operand without changing them."""
    return call.rule is not None and call.rule.held is Held.COPY and len(call.operands) == 1


def whole(call: Described) -> bool:
    """Whether it moves every element: where only some positions are read, or their order changes, a dim of size 1 is all there is."""
    assert call.factors is not None
    sizes = dict(zip(call.factors.ins[0], call.operands[0].meta["val"].shape, strict=True))
    return moves(call) and all(sizes.get(factor, 1) == 1 for factor in {*call.factors.reads, *call.factors.rigid})


def complement(node: fx.Node) -> fx.Node | None:
    """``x`` of ``1 - x``, else None."""
    if node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if node.target is aten.rsub.Scalar:
        return first if second == 1 and isinstance(first, fx.Node) else None
    if node.target is aten.sub.Tensor and isinstance(first, fx.Node) and isinstance(second, fx.Node):
        return second if _ones(first) else None
    return None


def _ones(node: fx.Node) -> bool:
    match node.target:
        case aten.ones_like.default | aten.ones.default:
            return True
        case aten.full.default | aten.full_like.default:
            return bool(node.args[1] == 1)
        case aten.scalar_tensor.default:
            return bool(node.args[0] == 1)
    return False


@dataclass(frozen=True, slots=True)
class Said:
    """What a keep mask says of a mask it was made from.

    Attributes:
        node: that mask.
        dim: its token dim.
        alive: what it holds at tokens that live on.
        same: it is the keep mask or its complement, so it holds the other value at the tokens dropped there.
    """

    node: fx.Node
    dim: int
    alive: bool
    same: bool


def said(keep: fx.Node, axes: AxesMap, binary: Binary, dim: int = 1) -> Iterator[Said]:
    """Every mask that a mask determines, followed backwards.

    Through views, casts, complements and comparisons with a number between 0 and 1 it is the same mask in another form. At tokens that
    live on all sides of a conjunction are true, and all sides of a disjunction of complements false.

    Args:
        keep: 0 and 1, true at tokens that live.
        axes: the calls of its graph.
        binary: which nodes are masks.
        dim: its token dim.
    """
    stack = [Said(keep, dim, alive=True, same=True)]
    seen: set[tuple[str, bool, bool]] = set()
    while stack:
        at = stack.pop()
        key = (at.node.name, at.alive, at.same)
        if key in seen:
            continue
        seen.add(key)
        if at.node is not keep:
            yield at
        stack.extend(_behind(at, axes, binary))


def _behind(at: Said, axes: AxesMap, binary: Binary) -> Iterator[Said]:
    node = at.node
    call = axes.calls.get(node.name)
    if call is None or call.factors is None or call.rule is None or not binary(node):
        return
    if node.target in (ANDS if at.alive else ORS):
        yield from (replace(one, same=False) for one in _operands(at, call) if binary(one.node))
    elif node.target in NOTS or complement(node) is not None:
        other = complement(node) or node.args[0]
        yield from (replace(one, alive=not at.alive) for one in _operands(at, call) if one.node is other and binary(one.node))
    elif node.target in _SCALARS and binary(node.args[0]):
        sense = _sense(node)
        yield from (replace(one, alive=at.alive == sense) for one in _operands(at, call) if sense is not None)
    elif node.target is aten._to_copy.default or whole(call):
        yield from (one for one in _operands(at, call) if binary(one.node))


def _operands(at: Said, call: Described) -> Iterator[Said]:
    """The operands that have the token dim, in the sense of the result."""
    assert call.factors is not None
    factor = call.factors.outs[0][at.dim]
    if factor is None or factor in call.factors.rigid or factor in call.factors.reads or factor in call.factors.folds:
        return
    for index, operand in enumerate(call.operands):
        for dim in call.of(index, factor):
            yield Said(operand, dim, at.alive, at.same)


def _sense(node: fx.Node) -> bool | None:
    """Whether a comparison of a 0-1 mask with a number is the mask (True) or its complement (False); None where it is neither."""
    if not isinstance(node.args[1], (bool, int, float)):
        return None
    results = [bool(node.target(torch.tensor(float(value)), node.args[1])) for value in (0, 1)]  # type: ignore[operator]
    return None if results[0] == results[1] else results[1]
