"""placed -> placed: a score reads the attention map once, and as a product.

1. a sum of a sum, perhaps scaled by a number in between, is one sum: the mean over heads is no map of its own;
2. a sum over the rows of a map over tokens, ``p.sum(-2)``, is ``ones @ p``: runtimes add rows up several times slower than they multiply.

Both hold for any numbers, so nothing new has to be proved; sums come in another order, within float32 noise. A map that was just multiplied
by a mask is left to ``hoist``, which takes the mask for the ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.base import GraphPass
from tpcompile.passes.optimize.edit import rewritten
from tpcompile.passes.optimize.hoist import MATMUL, PRODUCTS, SCALES, SUM
from tpcompile.passes.rules.forms import Writer
from tpcompile.program import Program, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class Tally(GraphPass):
    """Add the rows of maps up by products; the module docstring lists the cases."""

    name: ClassVar[str] = "tally"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.PLACED
    masked: ClassVar[bool] = True

    def run(self, program: Program) -> Program:
        """Return the program with its sums over maps rewritten."""
        draft, axes = program.draft(), AxesMap(program.graph)
        maps = {n.name for n in program.graph.nodes if {-1, -2} <= {d - n.meta["val"].dim() for d in axes.token_dims(n)}}
        renamed: dict[str, str] = {}
        for node in [n for n in draft.graph.nodes if n.target is SUM]:
            made = _joined(node, maps) or node
            new = _product(made, maps) or made
            if new is not node:
                renamed[node.name] = new.name
                node.replace_all_uses_with(new)
        return rewritten(program, draft, renamed, f"tally: {len(renamed)} sums over maps")


def _joined(node: fx.Node, maps: set[str]) -> fx.Node | None:
    """Case 1: the sum of a sum that nobody else reads, over the dims of both, then the scale."""
    w, inner = Writer(node), node.args[0]
    scale = inner if isinstance(inner, fx.Node) and inner.target in SCALES and not isinstance(inner.args[1], fx.Node) else None
    first = scale.args[0] if scale is not None else inner
    if not isinstance(first, fx.Node) or first.target is not SUM or any(len(n.users) > 1 for n in (first, scale or first)):
        return None
    before = Writer(first)
    source = before["self"]
    if source.name not in maps or {n.meta["val"].dtype for n in (node, first, source)} != {torch.float32} or w["keepdim"]:
        return None
    gone, rank = before.dims(source), source.meta["val"].dim()
    left = [d for d in range(rank) if before["keepdim"] or d not in gone]
    dims = sorted({*gone, *(left[d] for d in w.dims(first))})
    with node.graph.inserting_before(node):
        total = w(SUM, source, dims, False)
        return total if scale is None else w(scale.target, total, scale.args[1])


def _product(node: fx.Node, maps: set[str]) -> fx.Node | None:
    """Case 2: ones times the map, and what is left of the sum; behind a scale the sum stands one step back."""
    if node.target is not SUM:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.target is not SUM or (made := _product(source, maps)) is None:
            return None
        with node.graph.inserting_before(node):
            node.replace_input_with(source, made)
        return node
    w = Writer(node)
    p, dims = w["self"], w.dims(w["self"])
    value = p.meta["val"]
    if p.name not in maps or value.dtype != torch.float32 or w["dtype"] not in (None, torch.float32) or _masked(p):
        return None
    if value.dim() - 2 not in dims or value.dim() - 1 in dims:
        return None
    with node.graph.inserting_before(node):
        one = w(aten.full.default, [1, 1], 1.0, dtype=torch.float32)
        over = w(MATMUL, w(aten.expand.default, one, [1, w.size(p, -2)]), p)
        return w(SUM, over, dims, w["keepdim"])


def _masked(p: fx.Node) -> bool:
    """Whether a map is a product that ``hoist`` may take apart."""
    return p.target in PRODUCTS and all(isinstance(a, fx.Node) for a in p.args[:2])
