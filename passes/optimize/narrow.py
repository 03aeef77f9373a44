"""placed -> placed: what nobody reads is not computed, and what a decision needs is computed apart.

1. a result of which every reader takes the same window (the first row, for a head that reads CLS) is computed in that window only, back to
   where somebody needs more of it;
2. a result of which a decision takes a window and others more (the attention row of CLS, for a score) is computed twice, in each window:
   the whole of it then leads to no decision, and ``sink`` may put it behind;
3. so is a product whose readers take different parts of it to different decisions, or not all of it (queries, keys and values in one
   projection).

A window of a result is the op on windows of its operands: that holds for any numbers, so nothing new has to be proved. A position that a
window reads is one that was read before: ``place`` has pinned it, and every older set stores what a newer one stores.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tpcompile.passes.base import GraphPass
from tpcompile.passes.optimize.edit import rewritten
from tpcompile.passes.optimize.parts import Parts
from tpcompile.passes.optimize.windows import SELECT, Window, inside, read, within
from tpcompile.passes.rules import bind
from tpcompile.passes.rules.forms import Writer
from tpcompile.program import Program, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class Narrow(GraphPass):
    """Compute what is read; the module docstring lists the cases."""

    name: ClassVar[str] = "narrow"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.PLACED
    masked: ClassVar[bool] = True

    def run(self, program: Program) -> Program:
        """Return the program with its results in windows."""
        draft, renamed, count = narrowed(program)
        return rewritten(program, draft, renamed, f"narrow: {count} results in windows")


@dataclass(frozen=True)
class Trim(GraphPass):
    """captured -> captured: case 1 alone, for the dense baseline: it is not to lose for what pruning did not save."""

    name: ClassVar[str] = "trim"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, program: Program) -> Program:
        """Return the program without what nobody reads."""
        return program.adopt(narrowed(program)[0])


def narrowed(program: Program) -> tuple[fx.GraphModule, dict[str, str], int]:
    """A program's graph of any stage with its results in windows, what took which node's place, and how many results are in windows."""
    draft = program.draft()
    decisions: dict[str, int] = {}
    for site in program.sites:
        for name in (site.keep, site.score):
            decisions[name] = min(site.tokens.level, decisions.get(name, site.tokens.level))
    parts = Parts(draft.graph, decisions)
    count = sum(bool(window) for windows in parts.of.values() for window in windows)
    return draft, _Build(parts).run() if count else {}, count


class _Build:
    """Writes the parts of every result.

    Args:
        parts: which there are.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.made: dict[tuple[fx.Node, Window], fx.Node] = {}

    def run(self) -> dict[str, str]:
        """Rewrite the graph; return what took which node's place."""
        for node in list(self.parts.graph.nodes):
            for part in sorted(self.parts.of[node], key=len, reverse=True):  # all of it last: that changes the node
                self.made[node, part] = self._write(node, part)
        return {node.name: new.name for (node, part), new in self.made.items() if not part and new is not node}

    def _write(self, node: fx.Node, part: Window) -> fx.Node:
        """A part of a node: the node itself where that is all of it, else a call of its own before it."""
        if (reading := read(node)) is not None:
            return self._read(node, part, reading)
        given = iter([self._get(n, w, node) for n, w in self.parts.operands(node, part) if _tensor(n)])

        def swap(n: fx.Node) -> fx.Node:
            return next(given) if _tensor(n) else self._get(n, (), node)  # by place: a tensor may stand twice

        args, kwargs = fx.map_arg(node.args, swap), fx.map_arg(node.kwargs, swap)
        if not part:
            node.args, node.kwargs = args, kwargs
            return node
        call = self.parts.calls[node]
        assert call is not None
        assert isinstance(node.target, torch._ops.OpOverload)
        if call.rule is not None and call.rule.sized:
            named = bind(node.target, args, kwargs)
            sizes = {d: stop - start for d, start, stop in part}
            named[call.rule.sized] = [sizes.get(d, written) for d, written in enumerate(named[call.rule.sized])]
            args, kwargs = tuple(named.values()), {}
        with node.graph.inserting_before(node):
            return Writer(node)(node.target, *args, **kwargs)

    def _read(self, node: fx.Node, part: Window, reading: tuple[int, int, int]) -> fx.Node:
        """A part of a ``select`` or ``slice``: as it was where all of its operand is there, else a window of that."""
        source, wanted = self.parts.operands(node, part)[0]
        windows = self.parts.of[source]
        if not part and () in windows and (wanted not in windows or not wanted):
            node.replace_input_with(source, self.made[source, ()])
            return node
        rows = self._get(source, wanted, node)
        with node.graph.inserting_before(node):
            return _squeezed(Writer(node), rows, reading[0]) if node.target is SELECT else rows

    def _get(self, node: fx.Node, part: Window, reader: fx.Node) -> fx.Node:
        """A window of a node, cut from a larger one where it has none of its own."""
        if (node, part) not in self.made:
            larger = next(p for p in self.parts.of[node] if within(part, p))
            rows = self.made[node, larger]
            with reader.graph.inserting_before(reader):
                for d, start, stop in inside(part, larger):
                    rows = Writer(reader)(aten.slice.Tensor, rows, d, start, stop)
            self.made[node, part] = rows
        return self.made[node, part]


def _tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _squeezed(w: Writer, rows: fx.Node, dim: int) -> fx.Node:
    """A tensor without a dim of size 1: where a permute or a reshape made it, without that dim from there on."""
    source: Any = rows.args[0] if rows.args else None
    if rows.target is aten.permute.default:
        order = [int(str(d)) for d in rows.args[1]]  # type: ignore[union-attr]  # a list
        gone = order.pop(dim)
        return w(aten.permute.default, _squeezed(w, source, gone), [d - (d > gone) for d in order])
    sizes: Any = rows.args[1] if rows.target is aten.reshape.default else []
    if sizes and sizes[dim] == 1:
        return w(aten.reshape.default, source, [*sizes[:dim], *sizes[dim + 1 :]])
    return w(aten.squeeze.dim, rows, dim)
