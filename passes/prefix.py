"""A prefix joined in front of what was computed without it: ``cat([a, f(x[:, k:])])`` is ``where(position < k, a, f(x))``.

A decision is often made for patches only, and ones for the class token are laid in front of it. As a join, the mask's positions depend on
how many tokens there are; read as a selection by position, it follows the tokens. ``f`` is anything that works row by row;
tables that it reads, such as rotary angles without a row for the class token, get rows of zeros in front, which are never picked.
"""

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from tpcompile.passes.axesmap import Described, describe
from tpcompile.passes.rules import Held, bind, tensor_nodes
from tpcompile.passes.rules.base import size
from tpcompile.passes.rules.forms import Writer
from tpcompile.passes.rules.ranges import QUOTIENTS

aten = torch.ops.aten


def joined(cat: fx.Node, constants: Collection[str] = ()) -> fx.Node | None:
    """What takes the place of a join, written before it; None where it is another kind of join.

    Args:
        cat: two tensors; the first has one row along the joined dim, rows of one number, or the first rows of what the second follows from.
        constants: names of the placeholders that are weights and buffers.
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
    body = _Lift(length, w, constants).full(rest, dim)
    row = None if body is None else _row(first, body, dim)
    if body is None or row is None:
        return None
    front = w(aten.lt.Scalar, w.positions(body, dim), length)
    if not isinstance(row, fx.Node):
        row = w(aten.scalar_tensor.default, row, dtype=w.out.dtype)
    made = w(aten.where.self, front, row, body)
    return made if made.meta["val"].dtype is w.out.dtype and _alike(made, cat) else None


def _row(first: fx.Node, body: fx.Node, dim: int) -> fx.Node | float | None:
    """What stands in front, so that it broadcasts over the body; None where it does not."""
    if first.meta["val"].shape[dim] == 1:
        return first
    source = first.args[0] if first.target is aten.slice.Tensor else None
    cut = first.target is aten.slice.Tensor and first.args[1:3] == (dim, 0)
    return source if cut and isinstance(source, fx.Node) and _alike(source, body) else _number(first)


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
        constants: names of the placeholders that are weights and buffers.
    """

    def __init__(self, length: int, at: Writer, constants: Collection[str]) -> None:
        self.length, self.at, self.constants = length, at, constants
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
        lifted: list[fx.Node | None] = []
        for index, operand in enumerate(operands):
            where = [d for d in call.of(index, factor) if operand.meta["val"].shape[d] != 1]
            whole = self.full(operand, where[0]) if len(where) == 1 else None if where else operand
            lifted.append(whole)
        if not any(whole is not None and whole is not operand for whole, operand in zip(lifted, operands, strict=True)):
            return None
        for index, (whole, operand) in enumerate(zip(lifted, operands, strict=True)):
            lifted[index] = whole if whole is not None else self._padded(operand, call, index, factor)
        if None in lifted:
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

    def _padded(self, table: fx.Node, call: Described, index: int, factor: str) -> fx.Node | None:
        """A table of constants with rows of zeros in front; None where it is no such table."""
        where = list(call.of(index, factor))
        stack, seen = [table], {table}
        while stack:
            node = stack.pop()
            if node.op == "placeholder" and node.name not in self.constants:
                return None
            stack += (fresh := [n for n in node.all_input_nodes if n not in seen])
            seen.update(fresh)
        if len(where) != 1:
            return None
        sizes = [self.length if d == where[0] else self.at.size(table, d) for d in range(table.meta["val"].dim())]
        zeros = self.at(aten.full.default, sizes, 0.0, dtype=table.meta["val"].dtype)
        return self.at(aten.cat.default, [zeros, table], where[0])
