"""What the passes over placed programs share: a rewritten graph gets its token sets anew."""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.levels import Levels, native
from tpcompile.program import Program


def rewritten(program: Program, draft: fx.GraphModule, renamed: Mapping[str, str], report: str) -> Program:
    """A placed program around a graph that computes the same.

    Args:
        program: the placed program that the graph came from.
        draft: the changed graph.
        renamed: old name of a node -> the name of what now gives its value.
        report: one line.

    Returns:
        The program, without the bounds whose logits are gone: bounds are measured on the program as ``place`` left it.
    """
    sites, told = program.renamed(renamed), (*program.report, report)
    made = program.adopt(draft, refresh=bool(renamed) or not program.gathered, sites=sites, report=told)
    if program.gathered:
        return replace(made, placements=native(made, AxesMap(made.graph)))
    levels, names = Levels(made, AxesMap(made.graph)), {node.name for node in made.graph.nodes}
    placements = {node.name: placement for node in made.graph.nodes if (placement := levels.placement(node))}
    return replace(made, placements=placements, bounds=tuple(b for b in program.bounds if {b.logits, b.keep} <= names))
