"""captured -> captured: a dense model becomes a masked one, by a threshold on the attention that each token receives.

No training, and no names of a model's parts: what a block is follows from the graph.

1. an attention is a softmax over keys that are the queries' own tokens, and the product that reads it; a map of queries on another
   sequence (cross-attention) is none;
2. the score of a token is what it receives: the sum over living queries of the map's mean over heads. Its mean over the tokens of an input
   is 1, so one threshold serves every length;
3. ``keep = alive & (score >= threshold)``, and of the first ``prefix`` tokens falls only what is padding; before the first site all live
   but padding, by the input of case 7 that masks the first attention and is no part of what it mixes;
4. the site is the next *cut*: hidden states ``[B, N, C]`` through which alone the stream reaches all that follows, and that several ops
   read: where the feed-forward's residual begins. Where none stands between two attentions there is no site, and the report says so;
5. behind it, logits of dropped keys are -inf;
6. at the last cut that is made by the same op as the sites (the end of the last block) dropped rows come back as they were (``restore``),
   so that heads may read or pool any token; or, for a decoder, the living rows alone go on, with an output ``memory_mask`` beside them.
   Hidden states that are outputs on the way there (``hidden_states.1``) have what fell before them as it was;
7. inputs ``[B, N]`` that hold 0 and 1 in the example, and 1 at position 0, are taken to do so always: the engine checks it.

The result is a masked program like any other: ``place`` proves its sites.
"""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.errors import MarkError, UsageError
from tpcompile.ops import MEMORY, PRUNE, RESTORE
from tpcompile.passes.axesmap import AxesMap, Described, Key
from tpcompile.passes.base import GraphPass, ancestors
from tpcompile.passes.candidates import bit_inputs
from tpcompile.passes.insert import Writer
from tpcompile.program import Program, Stage, where_of

aten = torch.ops.aten
MASK = "memory_mask"
"""Output of a program that ends with a memory: bool ``[B, K]``, the rows that live."""


@dataclass(frozen=True)
class Impose(GraphPass):
    """Drop tokens that receive little attention; the module docstring lists the cases.

    ``threshold``: of the mean attention received; ``prefix``: leading tokens that fall as padding only; ``blocks``: numbers of the
    attentions that decide, joined by ``+``, all of them where empty; ``memory``: end with the living rows and their mask.
    """

    name: ClassVar[str] = "impose"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED
    masked: ClassVar[bool] = True
    threshold: float = 0.5
    prefix: int = 1
    blocks: str = ""
    memory: bool = False

    def run(self, program: Program) -> Program:
        """Return the masked program.

        Raises:
            MarkError: the program has no self-attention, or none with a cut behind it.
            UsageError: ``blocks`` names an attention that it does not have.
        """
        draft = program.draft()
        axes = AxesMap(draft.graph)
        found = list(attentions(axes))
        if not found:
            raise MarkError(
                "no softmax of the model runs over keys that are the queries' own tokens",
                fix="write the sites yourself with ops.prune(x, keep), or give a model with plain self-attention",
            )
        chosen = {int(number) for number in self.blocks.split("+")} if self.blocks else set(range(len(found)))
        if wrong := chosen - set(range(len(found))):
            raise UsageError(f"blocks names no attention: {sorted(wrong)}", fix=f"the model has {len(found)}, counted from 0")
        cuts = _cuts(draft.graph, axes, found)
        sites = {
            i: one for i, group in enumerate(cuts) if i in chosen and (one := next(filter(_splits, group), None)) is not None
        }
        if not sites:
            raise MarkError(
                f"behind none of the {len(found)} attentions of the model everything goes through hidden states [B, N, C]",
                where=where_of(found[0].map), fix="write the sites yourself with ops.prune(x, keep)",
            )  # fmt: skip
        last = [node for group in cuts for node in group if node.target is sites[max(sites)].target][-1]
        bits = bit_inputs(program)
        imposed = _Imposed(self, _padding(draft.graph, bits, axes, found[0]))
        between = _between(draft.graph, axes, [*sites.values()], last)
        for number, attention in enumerate(found):
            imposed.attention(attention)
            if number in sites:
                imposed.site(attention, sites[number])
        imposed.outputs(draft.graph.output_node(), between)
        names = program.output_names
        if self.memory:
            imposed.remember(last)
            names = (*names, MASK)
        else:
            imposed.restore(last)
        missed = [where_of(one.map) for i, one in enumerate(found) if i in chosen and i not in sites]
        report = [f"no site behind the attention at {where}: not everything goes through hidden states" for where in missed]
        return program.adopt(draft, refresh=self.memory, report=(*program.report, *report), bits=bits, output_names=names)


@dataclass(frozen=True, slots=True)
class Attention:
    """A self-attention.

    Attributes:
        map: the softmax, over its last dim.
        queries: its dim over queries.
        value: the values that it mixes.
    """

    map: fx.Node
    queries: int
    value: fx.Node

    def keys(self, axes: AxesMap) -> Key:
        """What its last dim runs over."""
        return axes.axis(self.map, self.map.meta["val"].dim() - 1)


def attentions(axes: AxesMap) -> Iterator[Attention]:
    """The self-attentions of a graph, in program order."""
    for call in axes.calls.values():
        last = call.node.meta["val"].dim() - 1 if isinstance(call.node.meta.get("val"), torch.Tensor) else -1
        if call.factors is None or last < 2 or call.factors.outs[0][last] is None:
            continue
        if call.factors.folds.get(str(call.factors.outs[0][last])) != NEG_INF:
            continue
        keys = axes.axis(call.node, last)
        rows = [d for d in range(last) if axes.axis(call.node, d) == keys]
        value = _mixed(axes, call.node, keys)
        if rows and value is not None:
            yield Attention(call.node, rows[-1], value)


def _mixed(axes: AxesMap, node: fx.Node, keys: Key) -> fx.Node | None:
    """The other operand of the product that folds a map's keys away."""
    for user in node.users:
        call = axes.calls.get(user.name)
        if call is None or call.factors is None:
            continue
        folds = [f for f in call.factors.folds if any(axes.axis(node, d) == keys for d in _dims(call, node, f))]
        if call.factors.product and len(call.operands) == 2 and folds:
            return call.operands[1] if call.operands[0] is node else call.operands[0]
        if call.rule is not None and any(axes.axis(user, d) == keys for d in range(user.meta["val"].dim())):
            return _mixed(axes, user, keys)
    return None


def _dims(call: Described, node: fx.Node, factor: str) -> Iterator[int]:
    return (d for i, n in enumerate(call.operands) if n is node for d in call.of(i, factor))


def _padding(graph: fx.Graph, bits: Collection[str], axes: AxesMap, first: Attention) -> fx.Node | None:
    """The input that tells tokens from padding; None where there is none, or where it reaches the values too."""
    masks, mixed = ancestors(first.map), ancestors(first.value)
    inputs = (node for node in graph.find_nodes(op="placeholder") if node.name in bits and node in masks and node not in mixed)
    return next((node for node in inputs if axes.axis(node, 1) == first.keys(axes)), None)


def _cuts(graph: fx.Graph, axes: AxesMap, found: Sequence[Attention]) -> list[list[fx.Node]]:
    """Behind each attention, before the next, the hidden states of its tokens through which alone the stream goes on."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    stream = _stream(found[0].value)
    end = order[graph.output_node()]
    last = {node: max((order[n] for n in node.users if n.op != "output"), default=end if node.users else -1) for node in stream}
    bounds = [order[one.map] for one in found]
    cuts: list[list[fx.Node]] = [[] for _ in found]
    alive = set[fx.Node]()
    for node in graph.nodes:
        alive = {one for one in alive if last[one] > order[node]}
        if node not in stream or last[node] < 0:
            continue
        alive.add(node)
        block = sum(bound < order[node] for bound in bounds) - 1
        if len(alive) == 1 and block >= 0 and _hidden(node) and axes.axis(node, 1) == found[block].keys(axes):
            cuts[block].append(node)
    return cuts


def _between(graph: fx.Graph, axes: AxesMap, sites: Sequence[fx.Node], last: fx.Node) -> dict[int, tuple[fx.Node, int]]:
    """Hidden states that are outputs and stand before the last cut: number of the output -> the node, and how many sites it is behind."""
    order, tokens, width = {node: i for i, node in enumerate(graph.nodes)}, axes.axis(last, 1), last.meta["val"].shape[2]
    results: Any = graph.output_node().args[0]
    early = {i: n for i, n in enumerate(results) if isinstance(n, fx.Node) and order[n] < order[last] and _hidden(n)}
    found = {i: n for i, n in early.items() if axes.axis(n, 1) == tokens and n.meta["val"].shape[2] == width}
    return {i: (node, sum(order[site] < order[node] for site in sites)) for i, node in found.items()}


def _splits(node: fx.Node) -> bool:
    """Whether several ops read it."""
    return sum(map(_is_tensor, node.users)) > 1


def _stream(value: fx.Node) -> set[fx.Node]:
    """The hidden states that lead to a value, and all that follows from them."""
    found, stack, seen = set[fx.Node](), [value], {value}
    while stack:
        node = stack.pop()
        found |= {node} if _hidden(node) else set()
        stack += (fresh := [n for n in node.all_input_nodes if n not in seen])
        seen.update(fresh)
    stack = list(found)
    while stack:
        stack += (fresh := [user for user in stack.pop().users if user not in found and _is_tensor(user)])
        found.update(fresh)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return node.op == "call_function" and not isinstance(node.meta.get("val"), (int, torch.SymInt))


def _hidden(node: fx.Node) -> bool:
    """Whether it is a float ``[B, N, C]``."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point() and value.shape[2] != 1


def _pruned(cut: fx.Node) -> fx.Node:
    """A cut, behind its site where it has one."""
    return next((user for user in cut.users if user.target is PRUNE), cut)


class _Imposed:
    """One rewrite of one graph.

    Args:
        options: of the pass.
        padding: the input ``[B, N]`` that is 0 at padding.
    """

    def __init__(self, options: Impose, padding: fx.Node | None) -> None:
        self.options, self.padding = options, padding
        self.alive: fx.Node | None = None
        self.bases: list[tuple[fx.Node, fx.Node]] = []

    def attention(self, one: Attention) -> None:
        """Hide dropped keys."""
        if self.alive is None:
            return
        write = Writer(one.map.graph, one.map.prev, one.map)
        logits: Any = one.map.args[0]
        living = write(aten.unsqueeze.default, self.alive, 1)
        for _ in range(one.map.meta["val"].dim() - 3):
            living = write(aten.unsqueeze.default, living, 1)
        one.map.replace_input_with(logits, write(aten.where.ScalarOther, living, logits, NEG_INF))

    def site(self, one: Attention, cut: fx.Node) -> None:
        """Decide by an attention, and mark the site at a cut."""
        write, readers = Writer(cut.graph, cut, one.map), [user for user in cut.users if _is_tensor(user) or user.op == "output"]
        living = self.alive
        if living is None and self.padding is not None:
            living = write(aten.ne.Scalar, self.padding, 0)
        score = self._received(write, one, living)
        keep = write(aten.ge.Scalar, score, self.options.threshold)
        first = write(aten.lt.Scalar, write(aten.arange.default, write.size(cut, 1)), self.options.prefix)
        keep = write(aten.logical_or.default, keep, first)
        if living is not None:
            keep = write(aten.logical_and.default, keep, living)
        prune = write(PRUNE, cut, keep, score)
        for reader in readers:
            reader.replace_input_with(cut, prune)
        self.alive = keep
        self.bases.append((keep, cut))

    def outputs(self, output: fx.Node, between: Mapping[int, tuple[fx.Node, int]]) -> None:
        """Bring back in hidden states that are outputs what the sites before them drop; see ``_between``."""
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]  # a tuple of nodes
        for number, (node, passed) in between.items():
            results[number] = self._restored(Writer(node.graph, node, node), node, passed)
        output.args = (tuple(results),)

    def restore(self, cut: fx.Node) -> None:
        """Bring dropped rows back where the stream leaves the last block."""
        here = _pruned(cut)
        readers = list(here.users)
        rows = self._restored(Writer(cut.graph, here, cut), here, len(self.bases))
        for reader in readers:
            reader.replace_input_with(here, rows)

    def remember(self, cut: fx.Node) -> None:
        """Go on with the living rows alone where the stream leaves the last block, and give their mask out."""
        here = _pruned(cut)
        write, readers = Writer(cut.graph, here, cut), list(here.users)
        pair = write(MEMORY, here, self.alive)
        rows, mask = write(operator.getitem, pair, 0), write(operator.getitem, pair, 1)
        for reader in readers:
            reader.replace_input_with(here, rows)
        output = cut.graph.output_node()
        output.args = ((*output.args[0], mask),)  # type: ignore[misc]  # a tuple of nodes

    def _restored(self, write: Writer, rows: fx.Node, passed: int) -> fx.Node:
        """Rows with what the first so many sites drop, as it was there."""
        for keep, base in reversed(self.bases[:passed]):
            rows = write(RESTORE, rows, keep, base)
        return rows

    def _received(self, write: Writer, one: Attention, living: fx.Node | None) -> fx.Node:
        """What each token receives, ``[B, N]``: of every living query the mean over heads, summed."""
        weights, rank = one.map, one.map.meta["val"].dim()
        heads = [d for d in range(0 if rank == 3 else 1, rank - 1) if d != one.queries]
        if living is not None:
            rows = write(aten.unsqueeze.default, living, -1)
            for _ in range(rank - 3):
                rows = write(aten.unsqueeze.default, rows, 1)
            weights = write(aten.where.ScalarOther, rows, weights, 0.0)
        score = write(aten.sum.dim_IntList, weights, [*heads, one.queries])
        score = write(aten.unsqueeze.default, score, 0) if rank == 3 else score
        count = 1
        for d in heads:
            count *= one.map.meta["val"].shape[d]
        return write(aten.div.Tensor, score, count)
