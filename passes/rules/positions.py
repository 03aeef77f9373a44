"""An index that names every position in order picks nothing: it is a view. Libraries write masks over pairs of tokens so."""

import torch
from torch import fx

from tpcompile.passes.rules.base import size
from tpcompile.passes.rules.forms import Writer, form

aten = torch.ops.aten
_STEPS = (aten.unsqueeze.default, aten.reshape.default, aten.view.default, aten.clone.default, aten.alias.default)


@form(aten.index.Tensor)
def _all_positions(w: Writer) -> fx.Node | None:
    """``mask[rows, columns]`` where each index counts a dim of its own from 0 to its end."""
    x: fx.Node = w["self"]
    indices: list[fx.Node] = w["indices"]
    rank = w.out.dim()
    if len(indices) != x.meta["val"].dim() or not all(isinstance(i, fx.Node) and _counts(i, x, d) for d, i in enumerate(indices)):
        return None
    along = [_spans(i, rank) for i in indices]
    spread = [d for d in along if d is not None]
    if len(set(spread)) < len(spread):
        return None
    for d in reversed([d for d, to in enumerate(along) if to is None]):
        x = w(aten.select.int, x, d, 0)
    order = sorted(range(len(spread)), key=spread.__getitem__)
    x = w(aten.permute.default, x, order) if order != sorted(order) else x
    for d in (d for d in range(rank) if d not in spread):
        x = w(aten.unsqueeze.default, x, d)
    return x


def _counts(index: fx.Node, x: fx.Node, dim: int) -> bool:
    """Whether an index is ``0, 1, ..., n - 1`` over a dim of ``n``, along one dim of its own."""
    if sum(size(s) != 1 for s in index.meta["val"].shape) > 1:
        return False
    while (before := _same(index)) is not None:
        index = before
    first = index.args[0] if index.target is aten.arange.start_step else 0
    plain = index.target in (aten.arange.default, aten.arange.start_step) and first == 0 and len(index.args) < 3
    return bool(plain and size(index.meta["val"].shape[0]) == size(x.meta["val"].shape[dim]))


def _same(node: fx.Node) -> fx.Node | None:
    """The operand of an op that leaves every number as it is; None for another op."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], torch.Tensor):
        return None
    whole = node.target is aten.slice.Tensor and [*map(size, source.meta["val"].shape)] == [*map(size, node.meta["val"].shape)]
    return source if whole or node.target in _STEPS or (node.target is aten.add.Tensor and node.args[1] == 0) else None


def _spans(index: fx.Node, rank: int) -> int | None:
    """The dim of the result over which an index counts; None for the one position of a dim of size 1."""
    shape = index.meta["val"].shape
    long = [d + rank - len(shape) for d, s in enumerate(shape) if size(s) != 1]
    return long[0] if long else None
