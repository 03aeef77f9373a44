"""A prefix joined in front of what was computed without it: ``cat([a, f(x[:, k:])])`` is ``where(position < k, a, f(x))``.

A decision is often made for patches only, and ones for the class token are laid in front of it. As a join, the mask's positions depend on
how many tokens there are; read as a selection by position, it follows the tokens. ``f`` is anything that works row by row.
"""

import sys
from typing import Any

import torch
from torch import fx

from tpcompile.passes.axesmap import describe
from tpcompile.passes.rules import Held, bind, tensor_nodes
from tpcompile.passes.rules.base import size
from tpcompile.passes.rules.forms import Writer
from tpcompile.passes.rules.ranges import QUOTIENTS

aten = torch.ops.aten


def joined(cat: fx.Node) -> fx.Node | None:
    """What takes the place of a join, written before it; None where it is another kind of join.

    Args:
        cat: two tensors; the first has one row along the joined dim, or rows of one number.
    """
    w = Writer(cat)
    (dim,) = w.dims(cat)
    parts = w["tensors"]
    if len(parts) != 2 or any(part.meta["val"].dtype is not w.out.dtype for part in parts):
        return None
    first, rest = parts
    length = first.meta["val"].shape[dim]
    if not isinstance(length, int) or length < 1:
        return None
    row: Any = first if length == 1 else _number(first)
    body = _Lift(length, w).full(rest, dim) if row is not None else None
    if body is None:
        return None
    front = w(aten.lt.Scalar, w.positions(body, dim), length)
    if not isinstance(row, fx.Node):
        row = w(aten.scalar_tensor.default, row, dtype=w.out.dtype)
    made = w(aten.where.self, front, row, body)
    return made if made.meta["val"].dtype is w.out.dtype and _alike(made, cat) else None


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have one shape."""
    return [*map(size, one.meta["val"].shape)] == [*map(size, other.meta["val"].shape)]


def _number(node: fx.Node) -> float | None:
    """The number that a filled tensor holds."""
    while node.target is aten.expand.default:
        node = node.args[0]  # type: ignore[assignment]
    known: dict[Any, float] = {
        aten.ones.default: 1.0,
        aten.zeros.default: 0.0,
        aten.ones_like.default: 1.0,
        aten.zeros_like.default: 0.0,
    }
    number = node.args[1] if node.target in (aten.full.default, aten.full_like.default) else known.get(node.target)
    return number if isinstance(number, (int, float)) else None


class _Lift:
    """Computes rows together with the prefix that was cut off before them.

    Args:
        length: of the prefix.
        at: a writer at the join.
    """

    def __init__(self, length: int, at: Writer) -> None:
        self.length, self.at = length, at
        self.made: dict[tuple[fx.Node, int], fx.Node] = {}

    def full(self, node: fx.Node, dim: int) -> fx.Node | None:
        """A tensor of which ``node`` is the part from ``length`` on along ``dim``; None where it is not made row by row from a slice."""
        key = node, dim
        if key in self.made:
            return self.made[key]
        source = self._sliced(node, dim)
        found = source if source is not None else self._again(node, dim)
        if found is not None:
            self.made[key] = found
        return found

    def _sliced(self, node: fx.Node, dim: int) -> fx.Node | None:
        if node.target is not aten.slice.Tensor:
            return None
        given = {"dim": 0, "start": 0, "step": 1} | bind(aten.slice.Tensor, node.args, node.kwargs)
        source = given["self"]
        rest = given.get("end") in (None, sys.maxsize)
        there = given["dim"] % source.meta["val"].dim() == dim and given["start"] == self.length and given["step"] == 1
        return source if rest and there else None

    def _again(self, node: fx.Node, dim: int) -> fx.Node | None:
        """The op once more, on operands with the prefix."""
        operands = tensor_nodes(node)
        call = describe(node, tuple(operands))
        if call is None or call.factors is None or call.rule is None or len(call.factors.outs) != 1:
            return None
        if call.rule.held is Held.PICK or node.target in QUOTIENTS:
            return None  # the prefix may hold what is no index, or a divisor of 0
        factor = call.factors.outs[0][dim]
        if factor is None or factor in {*call.factors.rigid, *call.factors.folds, *call.factors.reads}:
            return None
        lifted = []
        for index, operand in enumerate(operands):
            where = list(call.of(index, factor))
            whole = self.full(operand, where[0]) if len(where) == 1 else None if where else operand
            if whole is None:
                return None
            lifted.append(whole)
        if lifted == operands:
            return None
        given = iter(lifted)
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: next(given) if isinstance(n.meta.get("val"), torch.Tensor) else n
        )
        if call.rule.sized:
            bound = bind(node.target, args, kwargs)  # type: ignore[arg-type]
            sizes = list(bound[call.rule.sized])
            if -1 in sizes and sizes[dim] != -1:
                return None
            sizes[dim] = -1
            args, kwargs = tuple({**bound, call.rule.sized: sizes}.values()), {}
        return Writer(node)(node.target, *args, **kwargs)
