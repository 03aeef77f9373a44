"""Einsum, written in the ops that engines know: a product, or a matmul between permutes."""

from collections.abc import Sequence

import torch
from torch import fx

from tpcompile.passes.rules.forms import Writer, form

aten = torch.ops.aten


@form(aten.einsum.default)
def _einsum(w: Writer) -> fx.Node | None:
    """A product without a sum; or two operands with at most one dim of their own each, and one that is summed: a matmul of permutes."""
    left, arrow, out = w["equation"].replace(" ", "").partition("->")
    sides, operands = left.split(","), w["tensors"]
    if not arrow or "." in left or len(sides) != 2 or len(operands) != 2 or any(len(set(s)) < len(s) for s in sides):
        return None
    a, b = sides
    batch = [f for f in out if f in a and f in b]
    own = [[f for f in out if f in one and f not in other] for one, other in ((a, b), (b, a))]
    summed = [f for f in a if f in b and f not in out]
    if set(out) == set(left) - {","} and not summed:
        return w(aten.mul.Tensor, *(_spread_out(w, x, side, out) for x, side in zip(operands, sides, strict=True)))
    if len(summed) != 1 or any(len(o) > 1 for o in own) or len(out) != len(batch) + len(own[0]) + len(own[1]):
        return None
    if len(a) != len(batch) + len(own[0]) + 1 or len(b) != len(batch) + len(own[1]) + 1:
        return None
    x = _ordered(w, operands[0], a, [*batch, *own[0], *summed])
    y = _ordered(w, operands[1], b, [*batch, *summed, *own[1]])
    x = x if own[0] else w(aten.unsqueeze.default, x, -2)
    y = y if own[1] else w(aten.unsqueeze.default, y, -1)
    product = w(aten.matmul.default, x, y)
    gone = [d for d, o in ((-2, own[0]), (-1, own[1])) if not o]
    product = w(aten.squeeze.dims, product, gone) if gone else product
    return _ordered(w, product, [*batch, *own[0], *own[1]], list(out))


def _spread_out(w: Writer, x: fx.Node, have: str, want: str) -> fx.Node:
    """A tensor with its dims in an order, and dims of size 1 where it has none."""
    x = _ordered(w, x, have, [f for f in want if f in have])
    for place, letter in enumerate(want):
        x = x if letter in have else w(aten.unsqueeze.default, x, place)
    return x


def _ordered(w: Writer, x: fx.Node, have: Sequence[str], want: Sequence[str]) -> fx.Node:
    order = [list(have).index(f) for f in want]
    return x if order == sorted(order) else w(aten.permute.default, x, order)
