"""How many rows a site has to store at most: a number where the program itself shows it.

A rank below ``k`` holds for ``k`` tokens of each sample (``ops.rank`` gives a permutation), a position below ``k`` for the first ``k``.
Both sides of a conjunction bound it, a disjunction holds for no more than its sides together. Pinned rows are stored as well; of them,
those that a position bound covers are counted with it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from tpcompile.ops import RANK

aten = torch.ops.aten

_AND = (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)
_OR = (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)
_BELOW: dict[Any, Any] = {aten.lt.Scalar: math.ceil, aten.le.Scalar: lambda k: math.floor(k) + 1}
_POSITIONS = (aten.arange.default, aten.arange.start_step)


class _Most(NamedTuple):
    """A mask holds for at most ``anywhere`` tokens of a sample beside those among its first ``front``."""

    anywhere: int
    front: int


def most(keep: fx.Node, pinned: int) -> int | None:
    """The largest number of tokens of a sample that a mask keeps or that are pinned; None where the program does not show one.

    Args:
        keep: bool ``[B, N]``.
        pinned: number of leading rows that are stored in any case.
    """
    found = _most(keep)
    return None if found is None else found.anywhere + max(found.front, pinned)


def _most(mask: fx.Node) -> _Most | None:
    """What a mask shows; it is ``[B, N]``, or ``[N]`` and ``[1, N]`` where all samples share it."""
    if mask.target in _BELOW:
        source, number = mask.args
        if not isinstance(source, fx.Node) or not isinstance(number, (int, float)):
            return None
        count = max(int(_BELOW[mask.target](number)), 0)
        return _Most(count, 0) if source.target is RANK else _Most(0, count) if _positions(source) else None
    if mask.target not in (*_AND, *_OR):
        return None
    sides = [_most(side) if isinstance(side, fx.Node) else None for side in mask.args]
    found = [side for side in sides if side is not None]
    if mask.target in _AND:
        return min(found, key=lambda side: (sum(side), side.anywhere), default=None)
    return _Most(sum(s.anywhere for s in found), max(s.front for s in found)) if len(found) == len(sides) else None


def _positions(node: fx.Node) -> bool:
    """Whether a node holds positions, counted from 0 by ones, along its last dim."""
    while node.target is aten.unsqueeze.default and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]  # the first argument of unsqueeze is a tensor
    if node.target not in _POSITIONS or node.meta["val"].dtype not in (torch.int64, torch.int32):
        return False
    return node.target is aten.arange.default or (len(node.args) == 2 and isinstance(node.args[0], int) and node.args[0] == 0)
