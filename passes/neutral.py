"""What changes nothing is not computed: a sum with 0, a product with 1, an ``and`` with True, a mask that hides nothing."""

import operator
from collections.abc import Collection

import torch
from torch import fx

from tpcompile.ops import COMPACT
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.facts import Facts
from tpcompile.passes.rules import Meta
from tpcompile.passes.values import Value
from tpcompile.program import Program

aten = torch.ops.aten
ALIVE, INDEX = 1, 2
"""Outputs of ``compact``: which stored rows are kept, and where they stood."""


def plain(program: Program, exact: Collection[int] = ()) -> Program:
    """A compact program in which whoever read an op with such an operand reads the other one.

    Args:
        program: compact.
        exact: levels of the sets that hold their kept tokens, position 0 among them, and nothing else.
    """
    draft = program.draft()
    axes = AxesMap(draft.graph)
    keeps = {site.keep: site.tokens.level for site in program.sites if site.tokens.level in exact}
    facts = Facts(draft.graph, axes, keeps, program.constants(), fetched=_fetched(draft.graph, program, exact))
    gone: dict[fx.Node, fx.Node] = {}
    for call in [axes.calls[node.name] for node in draft.graph.nodes if node.name in axes.calls]:
        left = _left(call, facts)
        if left is not None:
            gone[call.node] = gone.get(left, left)
            call.node.replace_all_uses_with(gone[call.node])
    if not gone:
        return program
    return program.adopt(draft, refresh=False, sites=program.renamed({node.name: left.name for node, left in gone.items()}))


def _fetched(graph: fx.Graph, program: Program, exact: Collection[int]) -> dict[str, tuple[str, int, int]]:
    """What holds rows of those sets: node -> the node they were fetched from, along which dim, and the set."""
    found: dict[str, tuple[str, int, int]] = {}
    sets: dict[fx.Node, int] = {}
    levels = {site.node: site.tokens.level for site in program.sites}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node) and source.target is COMPACT:
            level, keep = levels[source.name], source.args[1]
            assert isinstance(keep, fx.Node)
            sets |= {node: level} if node.args[1] == INDEX else {}
            found |= {node.name: (keep.name, 1, level)} if node.args[1] == ALIVE and level in exact else {}
        elif node.target is aten.select.int and source in sets:
            sets[node] = sets[source]
        elif node.target is aten.index_select.default and node.args[2] in sets:
            sets[node] = level = sets[node.args[2]]  # positions too are fetched: those of an older set, for a newer one
            assert isinstance(source, fx.Node)
            found |= {node.name: (source.name, int(str(node.args[1])), level)} if level in exact else {}
    return found


def _left(call: Described, facts: Facts) -> fx.Node | None:
    """The operand that an op gives as it is; None where it makes something of it."""
    neutral = call.rule.neutral if call.rule is not None else ()
    out = call.node.meta["val"]
    if len(call.operands) != len(neutral) or call.node.kwargs or not (out.dtype is torch.bool or out.dtype.is_floating_point):
        return None  # 1 & 3 is 1, and a factor of its own may stand before an operand of a sum
    for one, other, number in zip(call.operands, call.operands[::-1], neutral, strict=True):
        holds = number is not None and facts[one].rest == Value.of(number)
        if holds and Meta.of(other.meta["val"]) == Meta.of(out):  # as expressions: to compare sizes would fix them
            return other
    return None
