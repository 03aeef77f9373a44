"""Which parts of each result of a graph are computed: read backwards, from what its readers want of it.

A part is a window (``passes/optimize/windows.py``) with the first decision that it leads to: until there all of its rows are needed.
"""

import sys
from collections.abc import Mapping

import torch
from torch import fx

from tpcompile.passes.axesmap import Described, describe
from tpcompile.passes.optimize.windows import Window, needed, share, within
from tpcompile.passes.rules import tensor_nodes

NEVER = sys.maxsize
"""The decision of what leads to none."""
TWICE = 1.25
"""How much of a result may be computed for its parts to stand apart: where they overlap, work is done twice."""
MOST = 4
"""Parts of one result, at most: every part is another op."""


class Parts:
    """The parts of each result.

    Args:
        graph: the graph.
        decisions: name of a node that a site decides by -> the site's level.

    Attributes:
        graph: the graph.
        of: node -> its parts, each with its decision.
        calls: node -> its factors.
    """

    def __init__(self, graph: fx.Graph, decisions: Mapping[str, int]) -> None:
        self.graph = graph
        self.of: dict[fx.Node, dict[Window, int]] = {}
        self.calls: dict[fx.Node, Described | None] = {}
        self.wanted: dict[fx.Node, dict[Window, int]] = {node: {} for node in graph.nodes}
        for node in graph.nodes:
            known = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
            self.calls[node] = describe(node, tuple(tensor_nodes(node))) if known else None
        for node in reversed(graph.nodes):
            if node.name in decisions:
                self._want(node, (), decisions[node.name])
            self.of[node] = self._found(node)
            for part, decision in self.of[node].items():
                for operand, window in self.operands(node, part):
                    self._want(operand, window, decision)

    def operands(self, node: fx.Node, part: Window) -> list[tuple[fx.Node, Window]]:
        """What a part of a node needs: its tensors in the order of its arguments, each with a window, then all else."""
        call, tensors = self.calls[node], tensor_nodes(node)
        windows = needed(call, part) if call is not None else None
        others = [n for n in node.all_input_nodes if n not in tensors]
        return [*zip(tensors, windows or [()] * len(tensors), strict=True), *((n, ()) for n in others)]

    def _want(self, node: fx.Node, part: Window, decision: int) -> None:
        self.wanted[node][part] = min(decision, self.wanted[node].get(part, NEVER))

    def _found(self, node: fx.Node) -> dict[Window, int]:
        """The parts of a node, given those that are wanted."""
        wanted = self.wanted[node]
        if not wanted:
            return {(): NEVER} if node.op in ("output", "placeholder") else {}
        found: dict[Window, int] = {}
        apart, call = self._apart(node, wanted), self.calls[node]
        for part, decision in sorted(wanted.items(), key=lambda item: (len(item[0]), item[1])):
            own = part if apart and call is not None and needed(call, part) is not None else ()
            found[own] = min(decision, found.get(own, NEVER))
        return {p: to for p, to in found.items() if not any(q != p and within(p, q) and found[q] <= to for q in found)}

    def _apart(self, node: fx.Node, wanted: Mapping[Window, int]) -> bool:
        """Whether parts are worth an op each: it is the only one, another can move, or something is left out."""
        if len(wanted) == 1:
            return True
        total = sum(share(node, part) for part in wanted)
        return len(wanted) <= MOST and total <= TWICE and (total < 1 or len(set(wanted.values())) > 1)
