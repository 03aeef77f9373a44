"""placed -> compact: dropped tokens are gone.

1. a site becomes one ``compact`` (of constant count where its keep mask shows one), of what its first ``prune`` takes; where that is
   computed on the new set already, of the first rows that are gathered to it. Every other row is gathered by its index;
2. an operand on an older set than its factor's is gathered, once per set; what stands on a set comes behind its decision (``schedule``);
3. a size argument of a dim on a newer set becomes that set's size; a size used as a *number* stays the full sequence's;
4. position 0 is always stored, and every pinned prefix with it: a set is never empty;
5. ``restore`` becomes ``put``: rows written to the positions they came from;
6. with a batch, every gather is ``take``: each sample by its own positions. What all samples share gets a batch first.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from tpcompile.axes import Factors, Placement
from tpcompile.errors import RigidAxis
from tpcompile.ops import COMPACT, MIN_COUNT, PRUNE, PUT, RESTORE, TAKE
from tpcompile.passes.axesmap import AxesMap, Described, broadcasting, describe
from tpcompile.passes.base import GraphPass
from tpcompile.passes.rules import bind, tensor_nodes
from tpcompile.passes.schedule import Step, schedule
from tpcompile.program import Program, Site, Stage, where_of
from tpcompile.text import line

aten = torch.ops.aten


@dataclass(frozen=True)
class Compact(GraphPass):
    """Gather at sites and joins; the module docstring lists the cases."""

    name: ClassVar[str] = "compact"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.COMPACT
    masked: ClassVar[bool] = True

    def run(self, program: Program) -> Program:
        """Return the gathered program; its placements are kept for the nodes that remain."""
        return _Rewrite(program).run()


class _Rows(NamedTuple):
    """A tensor with the dim that runs over its tokens, and, with a batch, the dim that runs over samples."""

    node: fx.Node
    dim: int
    batch: int | None


class _Rewrite:
    """One rewrite of one program; holds the gathers made so far.

    Args:
        program: a placed program.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.draft = program, program.draft()
        self.placements = dict(program.placements)
        self.axes = AxesMap(program.graph)
        self.graph = self.draft.graph
        self.nodes: dict[str, fx.Node] = {n.name: n for n in self.graph.nodes}
        self.first = {n.args[1].name: n for n in reversed(self.graph.find_nodes(op="call_function", target=PRUNE))}
        self.stored: dict[tuple[int, int], fx.Node] = {}
        self.sizes: dict[int, fx.Node] = {}
        self.index: dict[int, fx.Node] = {}
        self.fetched: dict[tuple[str, int], fx.Node] = {}
        self.made: dict[tuple[Any, ...], fx.Node] = {}
        self.done: dict[str, Site] = {}

    def run(self) -> Program:
        order = self._order()
        for i, step in enumerate(order):
            if isinstance(step, int):
                self._open(self.program.sites[step - 1], order[i + 1 :])
            elif step.op == "call_function":
                self._node(step)
        sites = tuple(self.done.get(s.keep, s) for s in self.program.sites)
        return self.program.adopt(self.draft, sites=sites, placements=self.placements)

    def _order(self) -> list[Step]:
        """Put the graph in an order in which every set is there before it is needed; return it, with the levels where sites open."""
        calls = [(self.nodes[name], call, call.factors) for name, call in self.axes.calls.items()]
        needs = {node: max(self._factors(call, f).values(), default=0) for node, call, f in calls if f is not None}
        opens, last = {}, [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        for site in self.program.sites:
            x, *rest = [a for a in self.first[site.keep].args if isinstance(a, fx.Node)]
            opens[site.tokens.level] = (last, *rest, *([x] if self._level(x, 1) < site.tokens.level else []))
        order = schedule(self.graph.nodes, needs, opens)
        for before, node in pairwise(step for step in order if isinstance(step, fx.Node)):
            before.append(node)
        return order

    def _node(self, node: fx.Node) -> None:
        if node.target is PRUNE:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            with self.graph.inserting_before(node):
                rows = self._at(x, self._level(node, 1), node)
            self._replace(node, rows)
        elif node.target is RESTORE:
            self._restore(node)
        elif node.target is aten.sym_size.int:
            self._number(node)
        else:
            self._call(node)

    def _level(self, node: fx.Node, dim: int) -> int:
        placement = self.placements.get(node.name)
        return placement.dims.get(dim, 0) if placement else 0

    def _restore(self, node: fx.Node) -> None:
        x, keep, base = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(keep, fx.Node)
        assert isinstance(base, fx.Node)
        old, new = self._level(base, 1), max(self._level(x, 1), self._level(keep, 1))
        with self.graph.inserting_before(node):
            if new > old:
                rows = self._new(node, PUT, base, self._at(x, new, node), self._index(old, new, node), self._at(keep, new, node))
            else:
                rows = self._new(node, RESTORE, self._at(x, old, node), self._at(keep, old, node), base)
        self._replace(node, rows)

    def _replace(self, node: fx.Node, rows: fx.Node) -> None:
        if "val" not in rows.meta:  # the readers' rules look at the masked shapes until the whole graph is rewritten
            rows.meta["val"], self.placements[rows.name] = node.meta["val"], self.program.placements[node.name]
            self.axes.alias(rows, node)
        node.replace_all_uses_with(rows)
        self.nodes[node.name] = rows
        self.graph.erase_node(node)

    def _open(self, site: Site, later: Sequence[Step]) -> None:
        """Write the compact node of a site before what comes next."""
        level, first = site.tokens.level, self.first[site.keep]
        x, keep, score = (*first.args, None)[:3]
        assert isinstance(x, fx.Node)
        assert isinstance(keep, fx.Node)
        with self.graph.inserting_before(next(step for step in later if isinstance(step, fx.Node))):
            keep = self._at(keep, level - 1, first)
            score = self._at(score, level - 1, first) if isinstance(score, fx.Node) else None
            riding = self._riding(level, later) if self._level(x, 1) == level else x
            x = riding or self._new(first, aten.unsqueeze.default, keep, -1)
            source = self._at(x, level - 1, first) if riding is not None else x
            policy = (None, max(site.most, MIN_COUNT)) if site.most is not None else ()
            made = self._new(first, COMPACT, source, keep, self._prefix(site, first), score, *policy)
            rows, alive, index = (self._new(first, operator.getitem, made, i) for i in range(3))
            self.index[level] = index
            self.stored[level - 1, level] = index if self.axes.samples else self._new(first, aten.select.int, index, 0, 0)
            self.sizes[level] = self._new(first, aten.sym_size.int, index, 1)
        self.placements[rows.name] = Placement({1: level})
        self.fetched |= {(x.name, level): rows, (source.name, level): rows}
        self.fetched |= {(n.name, level): alive for n in (keep, first.args[1])}
        tap = score.name if isinstance(score, fx.Node) else ""
        self.done[site.keep] = replace(site, node=made.name, keep=keep.name, score=tap, index=index.name)

    def _riding(self, level: int, later: Sequence[Step]) -> fx.Node | None:
        """The first hidden states ``[B, N, C]`` that are there already and are read on a new set."""
        waiting = [step.name for step in later if isinstance(step, fx.Node)]
        for call in (self.axes.calls[name] for name in waiting if name in self.axes.calls):
            levels = self._factors(call, call.factors) if call.factors is not None else {}
            for n, dims in zip(call.operands, call.factors.ins if call.factors is not None else (), strict=False):
                rows = n.meta["val"].dim() == 3 and n.meta["val"].is_floating_point() and self.axes.token_dims(n) == [1]
                ready = rows and n.name not in waiting and self.axes.batch_dims(n) in ([], [0])
                if ready and self._level(n, 1) == level - 1 and levels.get(str(dims[1])) == level:
                    return self.nodes[n.name]
        return None

    def _prefix(self, site: Site, node: fx.Node) -> fx.Node:
        """Bool ``[1, N]`` or ``[B, N]`` over what the site sees, true at the pinned positions: every site before stored them first."""
        if (level := site.tokens.level) > 1:
            positions = self._index(level - 2, level - 1, node)
        else:
            positions = self._new(node, aten.unsqueeze.default, self._new(node, aten.arange.default, self._full()), 0)
        return self._new(node, aten.lt.Scalar, positions, max(site.pinned, 1))

    def _full(self) -> fx.Node | int:
        """The size of the full sequence: a number where it is fixed, else read where a full-length tensor first exists."""
        if 0 not in self.sizes:
            source, dim = next((n, d) for n in self.graph.nodes for d in self._full_dims(n))
            fixed = source.meta["val"].shape[dim]
            if isinstance(fixed, int):
                return fixed
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
            full = self._full()
            assert isinstance(full, fx.Node)  # a size that is asked for is dynamic
            node.replace_all_uses_with(full)

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
        """An operand with each token dim on the set of its factor."""
        node = call.operands[index]
        assert call.factors is not None
        placement = self.placements.get(node.name)
        for dim, factor in enumerate(call.factors.ins[index]):
            if factor is not None and placement is not None and placement.dims.get(dim, levels[factor]) < levels[factor]:
                rows = self._aligned(call, node, dim, call.operands[index])
                node = self._gather(rows, placement.dims[dim], levels[factor], call.node)
        return node

    def _aligned(self, call: Described, node: fx.Node, dim: int, source: fx.Node) -> _Rows:
        """An operand as ``take`` wants it: what all samples share gets a dim of size 1 where the reader has the batch.

        Args:
            call: the reader.
            node: the operand, perhaps gathered along another dim before.
            dim: the dim of ``source`` to gather along.
            source: the operand as the reader has it.
        """
        if not self.axes.samples:
            return _Rows(node, dim, None)
        own, there = self.axes.batch_dims(source), self.axes.batch_dims(call.node)
        if len(own) == 1:
            return _Rows(node, dim, own[0])
        rank, out = source.meta["val"].dim(), call.node.meta["val"].dim()
        vector = call.node.target is aten.matmul.default and rank == 1  # which matmul would take for a matrix once it has a batch
        batch = (there or [0])[0] - (out - rank)
        broadcasts = broadcasting(call) and not vector and (batch < 0 or source.meta["val"].shape[batch] == 1)
        if own or len(there) != 1 or not broadcasts:
            raise RigidAxis(
                f"{call.node.target} reads tokens of a tensor without one batch dim, and each sample needs other rows of it",
                where=where_of(call.node), node=line(call.node), fix="give the tensor the batch dim before, or export with batch one",
            )  # fmt: skip
        lifted = max(-batch, 0)
        for _ in range(lifted if node is source else 0):
            node = self._once(("lift", node.name), call.node, aten.unsqueeze.default, node, 0)
        return _Rows(node, dim + lifted, batch + lifted)

    def _at(self, source: fx.Node, new: int, at: fx.Node) -> fx.Node:
        """A site's operand, ``[B, N]`` or ``[B, N, C]``, on a set."""
        return self._gather(_Rows(source, 1, 0 if self.axes.samples else None), self._level(source, 1), new, at)

    def _gather(self, rows: _Rows, old: int, new: int, at: fx.Node) -> fx.Node:
        """The rows of set ``new`` of a tensor that runs over set ``old``."""
        source, dim, batch = rows
        if old >= new:
            return source
        between = (level for level in range(new, old, -1) if dim == 1 and (source.name, level) in self.fetched)
        if (level := next(between, None)) is not None:  # from the newest set that has the rows
            return self._gather(_Rows(self.fetched[source.name, level], dim, batch), level, new, at)
        positions = self._positions(old, new, at)
        if batch is None:
            return self._once((source.name, dim, None, new), at, aten.index_select.default, source, dim, positions)
        return self._once((source.name, dim, batch, new), at, TAKE, source, positions, batch, dim)

    def _once(self, key: tuple[Any, ...], at: fx.Node, target: Any, *args: Any) -> fx.Node:
        if key not in self.made:
            self.made[key] = self._new(at, target, *args)
        return self.made[key]

    def _positions(self, old: int, new: int, at: fx.Node) -> fx.Node:
        """Where the rows of set ``new`` stand in set ``old``: int64 ``[K]``, or ``[B, K]`` with a batch."""
        if (old, new) not in self.stored:
            earlier, last = self._positions(old, new - 1, at), self.stored[new - 1, new]
            self.stored[old, new] = (
                self._new(at, TAKE, earlier, last, 0, 1)
                if self.axes.samples
                else self._new(at, aten.index_select.default, earlier, 0, last)
            )
        return self.stored[old, new]

    def _index(self, old: int, new: int, at: fx.Node) -> fx.Node:
        """The same as int64 ``[B, K]``."""
        if new == old + 1:
            return self.index[new]
        positions = self._positions(old, new, at)
        return positions if self.axes.samples else self._new(at, aten.unsqueeze.default, positions, 0)

    def _resize(self, node: fx.Node, argument: str) -> None:
        assert isinstance(node.target, torch._ops.OpOverload)
        given = bind(node.target, node.args, node.kwargs)
        sizes = list(given[argument])
        pruned = [d for d, written in enumerate(sizes) if written != -1 and self._level(node, d) > 0]
        inferred = node.target is aten.reshape.default and -1 not in sizes and len(pruned) == 1
        for d in pruned:
            sizes[d] = -1 if inferred else self.sizes[self._level(node, d)]
        node.args, node.kwargs = tuple({**given, argument: sizes}.values()), {}

    def _new(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        made = self.graph.call_function(target, args)
        made.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")}
        return made
