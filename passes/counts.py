"""How many tokens a keep mask lets live at most: a number where the program itself shows it.

A rank below ``k`` holds for ``k`` tokens of each sample (``ops.rank`` gives a permutation), a position below ``k`` for ``k``. Both sides of a
conjunction bound it, a disjunction holds for no more than its sides together.
"""

import math

import torch
from torch import fx

from tpcompile.ops import RANK

aten = torch.ops.aten

_AND = (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)
_OR = (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)
_BELOW = {aten.lt.Scalar: lambda k: math.ceil(k), aten.le.Scalar: lambda k: math.floor(k) + 1}
_POSITIONS = (aten.arange.default, aten.arange.start_step)


def most(keep: fx.Node) -> int | None:
    """The largest number of tokens of a sample that a mask can keep; None where the program does not show one.

    Args:
        keep: bool ``[B, N]``, or ``[N]`` and ``[1, N]`` where all samples share it.
    """
    if keep.target in _BELOW:
        source, number = keep.args
        counted = isinstance(source, fx.Node) and _distinct(source) and isinstance(number, (int, float))
        return max(_BELOW[keep.target](number), 0) if counted else None  # type: ignore[index]  # a key, as tested above
    if keep.target not in (*_AND, *_OR):
        return None
    sides = [most(side) if isinstance(side, fx.Node) else None for side in keep.args]
    found = [side for side in sides if side is not None]
    if keep.target in _AND:
        return min(found, default=None)
    return sum(found) if len(found) == len(sides) else None


def _distinct(node: fx.Node) -> bool:
    """Whether no two tokens of a sample hold one number: ranks, or positions counted by ones."""
    if node.target is aten.unsqueeze.default and node.args[1] == 0:
        inner = node.args[0]
        return isinstance(inner, fx.Node) and inner.target in _POSITIONS and _distinct(inner)
    ones = node.target in _POSITIONS and len(node.args) <= 2 and node.meta["val"].dtype in (torch.int64, torch.int32)
    started = node.target is aten.arange.default or (ones and node.args[0] == 0)
    return node.target is RANK or (ones and started)
