"""captured -> captured: the dense program, every keep constant true.

1. each ``prune`` gives its hidden states back, each ``restore`` the rows it was to bring back;
2. its keep mask reads true everywhere, so that scores and comparisons behind it die.

For batch 1 without padding. A method that knows its dense model (``Pruned.dense``) is the better baseline: it keeps padding masks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tpcompile.errors import UsageError
from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.base import GraphPass
from tpcompile.program import Program, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepAll(GraphPass):
    """Keep every token; the module docstring lists the cases."""

    name: ClassVar[str] = "keepall"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, program: Program) -> Program:
        """Return the program without its sites.

        Raises:
            UsageError: the model gathers by itself: nothing in it says what it would compute with every token.
        """
        if program.gathered:
            raise UsageError(
                "a model that gathers by itself has no dense form in it", fix="pass dense=module, the unpruned model"
            )
        draft = program.draft()
        for node in list(draft.graph.nodes):
            if node.op == "call_function" and node.target is PRUNE:
                x, keep = node.args[:2]
                assert isinstance(keep, fx.Node)
                node.replace_all_uses_with(x)
                draft.graph.erase_node(node)
                _true(draft.graph, keep)
            elif node.op == "call_function" and node.target is RESTORE:
                node.replace_all_uses_with(node.args[0])
        return program.adopt(draft)


def _true(graph: fx.Graph, keep: fx.Node) -> None:
    """Put a constant in the place of a keep mask; its sizes are read from the inputs, so that nothing needs the mask."""
    with graph.inserting_after(next(n for n in reversed(graph.nodes) if n.op == "placeholder")):
        sizes = [_size(graph, keep, d) for d in range(2)]
    with graph.inserting_before(keep if keep.op != "placeholder" else next(n for n in graph.nodes if n.op != "placeholder")):
        true = graph.call_function(aten.full.default, (sizes, True), {"dtype": torch.bool})
    for made in [s for s in sizes if isinstance(s, fx.Node)]:
        true.prepend(made)
    keep.replace_all_uses_with(true)


def _size(graph: fx.Graph, keep: fx.Node, dim: int) -> int | fx.Node:
    size = keep.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    for node in graph.find_nodes(op="placeholder"):
        for d, other in enumerate(node.meta["val"].shape):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return graph.call_function(aten.sym_size.int, (node, d))
    return graph.call_function(aten.sym_size.int, (keep, dim))
