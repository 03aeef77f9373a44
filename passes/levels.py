"""The token set of every token dim of a marked program: the bookkeeping of ``place`` (forward) and ``sink`` (backward).

Forward, a factor runs over the newest set among its operands, and a site's result over the set born there. Backward, a result that only
newer sets read is computed on the newer set at once: its own op is free along that dim, so nothing new has to be proved.
"""

import operator
from collections.abc import Mapping

import torch
from torch import fx

from tpcompile.axes import Placement
from tpcompile.errors import AxisError, TokenMismatch, UnknownOp
from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.axesmap import AxesMap, Described, broadcasting
from tpcompile.program import Program, Site, where_of
from tpcompile.text import line


class Levels:
    """The token set of every token dim: forward, then raised to what the readers need.

    Args:
        program: a marked program.
        axes: its token dims.
        sunk: raise across sites: what leads to no later decision may move behind it. Else a result made before a site stays full.
        square: raise nothing that would make an op of one set run over two.
    """

    def __init__(self, program: Program, axes: AxesMap, sunk: bool = False, square: bool = False) -> None:
        self.axes, self.sunk, self.square = axes, sunk, square
        self.of: dict[tuple[str, int], int] = {}
        self.born = {site.keep: site.tokens.level for site in program.sites}
        self.ready = _undecided(program) if sunk else _behind(program, self.born)
        for node in program.graph.nodes:
            self._forward(node)
        for node in reversed(program.graph.nodes):
            self._raise(node)

    def get(self, node: fx.Node, dim: int) -> int:
        """The level of a token dim; 0 for other dims."""
        return self.of.get((node.name, dim), 0)

    def highest(self, node: fx.Node) -> int:
        """The newest set among a node's dims."""
        return max((self.get(node, d) for d in self.axes.token_dims(node)), default=0)

    def placement(self, node: fx.Node) -> Placement:
        """The node's token dims with their sets."""
        return Placement({d: self.get(node, d) for d in self.axes.token_dims(node)})

    def factor(self, call: Described, factor: str) -> int:
        """The set a factor runs over: the newest of its operands' and its result's."""
        assert call.factors is not None
        found = [self.get(n, d) for i, n in enumerate(call.operands) for d in call.of(i, factor)]
        found += [self.get(call.node, d) for d, f in enumerate(call.factors.outs[0]) if f == factor]
        return max(found, default=0)

    def nested(self, call: Described, rows: str, keys: str) -> bool:
        """Whether every token stored along one factor of a call is stored along another."""
        return self.factor(call, rows) >= self.factor(call, keys)

    def _forward(self, node: fx.Node) -> None:
        call = self.axes.calls.get(node.name)
        if call is None:
            if node.target is operator.getitem:
                self._item(node)
            return
        if node.target is PRUNE:
            self._write(node, {1: self._site_level(call)})
            return
        if node.target is RESTORE:
            self._write(node, {1: self.get(call.operands[2], 1)})
            return
        if call.factors is None:
            self._unknown(call)
            return
        outs = call.factors.outs[0]
        self._write(node, {d: self.factor(call, f) for d in self.axes.token_dims(node) if (f := outs[d]) is not None})

    def _item(self, node: fx.Node) -> None:
        """One output of an op that has several."""
        source, output = node.args
        call = self.axes.calls.get(source.name) if isinstance(source, fx.Node) else None
        if call is not None and call.factors is not None:
            outs = call.factors.outs[int(str(output))]
            self._write(node, {d: self.factor(call, f) for d in self.axes.token_dims(node) if (f := outs[d]) is not None})

    def _write(self, node: fx.Node, dims: Mapping[int, int]) -> None:
        self.of.update({(node.name, d): level for d, level in dims.items()})

    def _site_level(self, call: Described) -> int:
        x, keep = call.operands[:2]
        level = self.born[keep.name]
        if self.get(x, 1) > level or self.get(keep, 1) > level - 1:
            raise refusal(
                TokenMismatch, call.node,
                f"tokens t{self.get(x, 1)} are pruned by a mask over t{self.get(keep, 1)}: sites must form one chain",
                "derive each keep mask from the tokens that are alive at the site",
            )  # fmt: skip
        return level

    def _unknown(self, call: Described) -> None:
        for operand in call.operands:
            if self.highest(operand) > 0:
                raise refusal(
                    UnknownOp, call.node, f"no axis rule for {call.node.target}, and its input runs over pruned tokens",
                    "add a rule with its sample (docs/add-an-op.md), or move the op before the first site",
                )  # fmt: skip

    def _raise(self, node: fx.Node) -> None:
        call = self.axes.calls.get(node.name)
        if call is None or call.factors is None or node.target in (PRUNE, RESTORE):
            return
        if self.axes.samples and not self._by_sample(call):
            return
        blocked = {*call.factors.rigid, *call.factors.folds, *call.factors.reads}
        before, alone = self.placement(node).dims, len(self._sets(call)) < 2
        for dim in self.axes.token_dims(node):
            factor = call.factors.outs[0][dim]
            needs = [self._need(user, node, dim) for user in node.users]
            if factor is not None and factor not in blocked and needs:
                self.of[node.name, dim] = max(self.get(node, dim), min(*needs, self.ready[node.name]))
        if self.square and alone and len(self._sets(call)) > 1:
            self._write(node, before)

    def _sets(self, call: Described) -> set[int]:
        """The sets that an op runs over."""
        assert call.factors is not None
        rows = [(call.node, call.factors.outs[0]), *zip(call.operands, call.factors.ins, strict=True)]
        factors = {factors[d] for node, factors in rows for d in self.axes.token_dims(node)}
        return {self.factor(call, factor) for factor in factors if factor is not None}

    def _by_sample(self, call: Described) -> bool:
        """Whether the operands can be gathered where a call stands: what all samples share only where it can get the batch."""
        shared = [n for n in call.operands if self.axes.token_dims(n) and not self.axes.batch_dims(n)]
        return bool(self.axes.batch_dims(call.node)) and (not shared or broadcasting(call))

    def _need(self, user: fx.Node, node: fx.Node, dim: int) -> int:
        """The set a reader takes a token dim on."""
        call = self.axes.calls.get(user.name)
        if call is None or call.factors is None or user.target is RESTORE:
            return self.get(node, dim)
        if user.target is PRUNE:
            return self.born[call.operands[1].name] - (0 if self.sunk and node is call.operands[0] else 1)
        needs = [
            self.factor(call, f) for i, n in enumerate(call.operands) if n is node and (f := call.factors.ins[i][dim]) is not None
        ]
        held = {call.factors.ins[i][dim] for i, n in enumerate(call.operands) if n is node}
        return min(needs) if needs and not held & call.factors.rigid else self.get(node, dim)


def _behind(program: Program, born: Mapping[str, int]) -> dict[str, int]:
    """Per node, the newest set that exists where it stands."""
    found, newest = dict[str, int](), 0
    for node in program.graph.nodes:
        newest = max(newest, born[node.args[1].name]) if node.target is PRUNE else newest
        found[node.name] = newest
    return found


def _undecided(program: Program) -> dict[str, int]:
    """Per node, the newest set to whose decision, and to no earlier one, it does not lead."""
    found = dict.fromkeys((node.name for node in program.graph.nodes), len(program.sites))
    for site in reversed(program.sites):
        for node in leading_to(program, site):
            found[node.name] = site.tokens.level - 1
    return found


def leading_to(program: Program, site: Site) -> set[fx.Node]:
    """Every node that a site's decision or reported score needs, itself among them."""
    stack = [program.node(name) for name in (site.keep, site.score) if name]
    found = set(stack)
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                stack.append(operand)
    return found


def refusal(kind: type[AxisError], node: fx.Node, message: str, fix: str) -> AxisError:
    """An error of some kind at a node's place."""
    return kind(message, where=where_of(node), node=line(node), fix=fix)


def native(program: Program, axes: AxesMap) -> dict[str, Placement]:
    """Which dims of a model that gathers by itself run over the tokens behind which site."""
    sites = [program.node(site.node) for site in program.sites]
    first = sites[0].args[1]
    assert isinstance(first, fx.Node)
    born = {axes.axis(node, 1): level for level, node in enumerate([first, *sites])}
    found: dict[str, Placement] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        rank = value.dim() if isinstance(value, torch.Tensor) else 0
        dims = {d: born[axis] for d in range(rank) if (axis := axes.axis(node, d)) in born}
        found |= {node.name: Placement(dims)} if dims else {}
    return found
