"""placed -> compact: dropped tokens are gone.

1. the first ``prune`` of a site becomes ``compact``; the others gather by its index;
2. an operand on an older set than its factor's is gathered, once per set;
3. a size argument of a dim on a newer set becomes that set's size; a size used as a *number* stays the full sequence's;
4. position 0 is always stored, and every pinned prefix with it: a set is never empty.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from tpcompile.axes import Factors
from tpcompile.ops import COMPACT, PRUNE
from tpcompile.passes.axesmap import Described, describe
from tpcompile.passes.base import GraphPass
from tpcompile.passes.rules import bind, tensor_nodes
from tpcompile.program import Program, Site, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class Compact(GraphPass):
    """Gather at sites and joins; the module docstring lists the cases."""

    name: ClassVar[str] = "compact"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.COMPACT

    def run(self, program: Program) -> Program:
        """Return the gathered program; its placements are kept for the nodes that remain."""
        return _Rewrite(program).run()


class _Rewrite:
    """One rewrite of one program; holds the gathers made so far.

    Args:
        program: a placed program.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.draft = program, program.draft()
        self.placements = dict(program.placements)
        self.graph = self.draft.graph
        self.nodes = {n.name: n for n in self.graph.nodes}
        self.sites = {s.keep: s for s in program.sites}
        self.flat: dict[tuple[int, int], fx.Node] = {}
        self.sizes: dict[int, fx.Node] = {}
        self.alive: dict[tuple[str, int], fx.Node] = {}
        self.made: dict[tuple[str, int, int], fx.Node] = {}
        self.done: dict[str, Site] = {}
        self.first: fx.Node | None = None

    def run(self) -> Program:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is PRUNE:
                self._site(node)
            elif node.target is aten.sym_size.int:
                self._number(node)
            else:
                self._call(node)
        sites = tuple(self.done.get(s.keep, s) for s in self.program.sites)
        return self.program.adopt(self.draft, sites=sites, placements=self.placements)

    def _level(self, node: fx.Node, dim: int) -> int:
        placement = self.placements.get(node.name)
        return placement.dims.get(dim, 0) if placement else 0

    def _site(self, node: fx.Node) -> None:
        x, keep = node.args[:2]
        assert isinstance(x, fx.Node)
        assert isinstance(keep, fx.Node)
        site = self.sites[keep.name]
        level = site.tokens.level
        with self.graph.inserting_before(node):
            if keep.name in self.done:
                rows = self._gather(x, 1, self._level(x, 1), level, node)
            else:
                x = self._gather(x, 1, self._level(x, 1), level - 1, node)
                keep = self._gather(keep, 1, self._level(keep, 1), level - 1, node)
                rows = self._compact(site, x, keep, node)
        if "val" not in rows.meta:  # the readers' rules look at the masked shapes until the whole graph is rewritten
            rows.meta["val"], self.placements[rows.name] = node.meta["val"], self.program.placements[node.name]
        node.replace_all_uses_with(rows)
        self.graph.erase_node(node)

    def _compact(self, site: Site, x: fx.Node, keep: fx.Node, node: fx.Node) -> fx.Node:
        level = site.tokens.level
        score = node.args[2] if len(node.args) > 2 else None
        if isinstance(score, fx.Node):
            score = self._gather(score, 1, self._level(score, 1), level - 1, node)
        pinned = self._gather(self._prefix(site, keep), 1, 0, level - 1, node)
        made = self._new(node, COMPACT, x, keep, pinned, score)
        rows, alive, index = (self._new(node, operator.getitem, made, i) for i in range(3))
        self.flat[level - 1, level] = self._new(node, aten.select.int, index, 0, 0)
        self.alive[keep.name, level] = alive
        self.sizes[level] = self._new(node, aten.sym_size.int, index, 1)
        tap = score.name if isinstance(score, fx.Node) else ""
        self.done[site.keep] = replace(site, node=made.name, keep=keep.name, score=tap, index=index.name)
        return rows

    def _prefix(self, site: Site, keep: fx.Node) -> fx.Node:
        """Bool ``[1, N]`` over the full sequence, true at the pinned positions: made once per width, where the sequence is first seen."""
        width = max(site.pinned, 1)
        name = f"prefix{width}"
        if (name, 0, 0) not in self.made:
            size = self._full()
            with self.graph.inserting_after(size):
                positions = self._new(size, aten.arange.default, size)
            with self.graph.inserting_after(positions):
                below = self._new(size, aten.lt.Scalar, positions, width)
            with self.graph.inserting_after(below):
                self.made[name, 0, 0] = self._new(size, aten.unsqueeze.default, below, 0)
        return self.made[name, 0, 0]

    def _full(self) -> fx.Node:
        """The size of the full sequence, read where a full-length tensor first exists."""
        if 0 not in self.sizes:
            source, dim = next((n, d) for n in self.graph.nodes for d in self._full_dims(n))
            last = source if source.op != "placeholder" else [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self.sizes[0] = self._new(source, aten.sym_size.int, source, dim)
        return self.sizes[0]

    def _full_dims(self, node: fx.Node) -> list[int]:
        placement = self.placements.get(node.name)
        return [d for d, level in placement.dims.items() if level == 0] if placement else []

    def _number(self, node: fx.Node) -> None:
        source, dim = node.args
        if isinstance(source, fx.Node) and self._level(source, int(str(dim))) > 0:
            node.replace_all_uses_with(self._full())

    def _call(self, node: fx.Node) -> None:
        call = describe(node, tuple(tensor_nodes(node)))
        if call is None or call.factors is None:
            return
        levels = self._factors(call, call.factors)
        if not any(levels.values()):
            return
        with self.graph.inserting_before(node):
            gathered = iter([self._operand(call, i, levels) for i in range(len(call.operands))])

        def swap(n: fx.Node) -> fx.Node:
            return next(gathered) if isinstance(n.meta.get("val"), torch.Tensor) else n  # by place: a tensor may stand twice

        node.args, node.kwargs = fx.map_arg(node.args, swap), fx.map_arg(node.kwargs, swap)
        if call.rule is not None and call.rule.sized:
            self._resize(node, call.rule.sized)

    def _factors(self, call: Described, factors: Factors) -> dict[str, int]:
        """The set each factor runs over: the newest among its operands and its result, as ``place`` left them."""
        found: dict[str, int] = {}
        for node, dims in [*zip(call.operands, factors.ins, strict=False), (call.node, factors.outs[0])]:
            for d, factor in enumerate(dims):
                if factor is not None:
                    found[factor] = max(found.get(factor, 0), self._level(node, d))
        return found

    def _operand(self, call: Described, index: int, levels: Mapping[str, int]) -> fx.Node:
        node = call.operands[index]
        assert call.factors is not None
        for dim, factor in enumerate(call.factors.ins[index]):
            placement = self.placements.get(call.operands[index].name)
            if factor is not None and placement is not None and dim in placement.dims:
                node = self._gather(node, dim, placement.dims[dim], levels[factor], call.node)
        return node

    def _gather(self, source: fx.Node, dim: int, old: int, new: int, at: fx.Node) -> fx.Node:
        """The rows of set ``new`` along a dim that runs over set ``old``."""
        if old >= new:
            return source
        if old == new - 1 and dim == 1 and (source.name, new) in self.alive:
            return self.alive[source.name, new]
        key = (source.name, dim, new)
        if key not in self.made:
            self.made[key] = self._new(at, aten.index_select.default, source, dim, self._positions(old, new, at))
        return self.made[key]

    def _positions(self, old: int, new: int, at: fx.Node) -> fx.Node:
        """int64 ``[K]``: where the rows of set ``new`` stand in set ``old``."""
        if (old, new) not in self.flat:
            self.flat[old, new] = self._new(
                at, aten.index_select.default, self._positions(old, new - 1, at), 0, self.flat[new - 1, new]
            )
        return self.flat[old, new]

    def _resize(self, node: fx.Node, argument: str) -> None:
        assert isinstance(node.target, torch._ops.OpOverload)
        given = bind(node.target, node.args, node.kwargs)
        sizes = list(given[argument])
        for d, written in enumerate(sizes):
            if written != -1 and self._level(node, d) > 0:
                sizes[d] = self.sizes[self._level(node, d)]
        node.args, node.kwargs = tuple({**given, argument: sizes}.values()), {}

    def _new(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        made = self.graph.call_function(target, args)
        made.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")}
        return made
