"""captured -> marked: find the sites.

1. each distinct keep mask of a ``tpcompile::prune`` node is one site; nodes that share a mask share the site;
2. ``restore`` gets rows and a base of one shape and dtype;
3. hidden states must be ``[B, N, C]`` and the mask bool ``[B, N]``; B is 1, or any number where the batch is ragged;
4. a program without a site is refused: it is dense;
5. each ``tpcompile::gathered`` node is a site of a model that gathers by itself; its keep mask is read from the index where it has none.
   A program holds sites of one kind.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from tpcompile.axes import TokenSet
from tpcompile.errors import MarkError
from tpcompile.ops import GATHERED, PRUNE, RESTORE
from tpcompile.passes.base import GraphPass
from tpcompile.passes.rules import bind
from tpcompile.program import Program, Site, Stage, where_of
from tpcompile.text import line

aten = torch.ops.aten


@dataclass(frozen=True)
class Mark(GraphPass):
    """Name the sites in program order; the module docstring lists the cases."""

    name: ClassVar[str] = "mark"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.MARKED
    batch: str = "one"

    def run(self, program: Program) -> Program:
        """Return the program with its sites."""
        if program.gathered:
            return _native(program, self.batch)
        sites: dict[str, Site] = {}
        for node in program.graph.find_nodes(op="call_function", target=RESTORE):
            _check_restore(node, *(a.meta["val"] for a in node.args))
        report = []
        for node in program.graph.nodes:
            if node.op == "call_function" and node.target is PRUNE:
                x, keep = node.args[:2]
                score = node.args[2] if len(node.args) > 2 else None
                _check(node, x, keep, self.batch)
                if keep.name in sites:
                    report.append(f"shared: {node.name} at {where_of(node)} prunes by the mask of {sites[keep.name].name}")
                    continue
                level = len(sites) + 1
                size = x.meta["val"].shape[1]
                tokens = TokenSet(level, None, where_of(node))
                sites[keep.name] = Site(
                    f"site{level - 1}", node.name, keep.name, score.name if isinstance(score, fx.Node) else "", tokens
                )
                report.append(f"accepted: site{level - 1} at {where_of(node)}: {size} tokens, keep {keep.name}")
        if not sites:
            tried = "".join(f"\n    {text}" for text in program.report)
            raise MarkError(
                f"no mask of the model drops tokens; what was tried:{tried}"
                if tried
                else "the model has no prune site: no tpcompile.ops.prune ran while it was traced, and no mask over tokens was found",
                fix="give the method a threshold above 0, wrap the model with tpcompile.models.prune(model, method=...), "
                "or call ops.prune(x, keep)",
            )
        return replace(program, sites=tuple(sites.values()), report=(*program.report, *report))


def _native(program: Program, batch: str) -> Program:
    """Case 5: the sites of a model that gathers by itself."""
    draft, sites, report = program.draft(), [], []
    known = {node.name for node in draft.graph.nodes}
    masked = next(iter(draft.graph.find_nodes(op="call_function", target=PRUNE)), None)
    if masked is not None:
        raise MarkError(
            "the model gathers by itself at one site, and masks at another", where=where_of(masked), node=line(masked),
            fix="write both sites in masked form (ops.prune), or both gathered (ops.gathered)",
        )  # fmt: skip
    for level, node in enumerate(draft.graph.find_nodes(op="call_function", target=GATHERED), 1):
        given = bind(GATHERED, node.args, node.kwargs)
        _check_gathered(node, given, batch)
        keep = given.get("keep") or _named(draft.graph, node, given["x"], given["index"])
        taps = {"keep": keep, **{kind: given[kind] for kind in ("score", "index", "into") if given.get(kind) is not None}}
        names = {kind: tap.name for kind, tap in taps.items()}
        sites.append(Site(f"site{level - 1}", node.name, **({"score": ""} | names), tokens=TokenSet(level, None, where_of(node))))
        report.append(f"accepted: site{level - 1} at {where_of(node)}: the model gathers by itself")
    made = any(site.keep not in known for site in sites)
    return program.adopt(draft, refresh=made, sites=tuple(sites), report=(*program.report, *report))


def _named(graph: fx.Graph, site: fx.Node, x: fx.Node, index: fx.Node) -> fx.Node:
    """Bool ``[B, N]``: the positions that an index ``[B, K]`` names."""
    tokens = x.meta["val"].shape[1]
    with graph.inserting_before(site):
        count = tokens if isinstance(tokens, int) else graph.call_function(aten.sym_size.int, (x, 1))
        places = graph.call_function(aten.unsqueeze.default, (graph.call_function(aten.arange.default, (count,)), 1))
        equal = graph.call_function(aten.eq.Tensor, (places, graph.call_function(aten.unsqueeze.default, (index, 1))))
        keep = graph.call_function(aten.any.dim, (equal, 2))
    for made in (places, equal, keep):
        made.meta = {k: v for k, v in site.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return keep


def _check_gathered(node: fx.Node, given: dict[str, Any], batch: str) -> None:
    rows, x, index = (given[name].meta["val"] for name in ("rows", "x", "index"))
    masks = [given[name].meta["val"].shape for name in ("keep", "score", "into") if given.get(name) is not None]
    fits = rows.dim() == x.dim() == 3 and index.shape == rows.shape[:2] and all(mask == x.shape[:2] for mask in masks)
    if not fits or index.dtype is not torch.int64:
        shown = ", ".join(f"{name} {list(given[name].meta['val'].shape)}" for name in given if isinstance(given[name], fx.Node))
        raise MarkError(
            f"gathered takes rows [B, K, C], x [B, N, C], an int64 index [B, K], and keep, score and into [B, N]; it got {shown}",
            where=where_of(node), node=line(node), fix="give each the shape of its rows",
        )  # fmt: skip
    message, fix = _policy(rows.shape[0] == 1, index.shape[0] == 1, batch)
    if message:
        raise MarkError(message, where=where_of(node), node=line(node), fix=fix)


def _check(node: fx.Node, x: Any, keep: Any, batch: str) -> None:
    hidden, mask = x.meta["val"], keep.meta["val"]
    if hidden.dim() != 3 or mask.dim() != 2 or mask.dtype is not torch.bool:
        dtype = str(mask.dtype).removeprefix("torch.")
        raise MarkError(
            f"prune takes hidden states [B, N, C] and a bool mask [B, N]; it got rank {hidden.dim()} and {dtype} rank {mask.dim()}",
            where=where_of(node), node=line(node), fix="reshape the hidden states to [B, N, C] and pass the keep mask as bool [B, N]",
        )  # fmt: skip
    message, fix = _policy(hidden.shape[0] == 1, mask.shape[0] == 1, batch)
    if message:
        raise MarkError(message, where=where_of(node), node=line(node), fix=fix)


def _check_restore(node: fx.Node, x: Any, keep: Any, base: Any) -> None:
    same = x.dim() == 3 and x.shape == base.shape and x.dtype == base.dtype
    if not same or keep.shape != x.shape[:2] or keep.dtype is not torch.bool:
        shown = ", ".join(f"{str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for v in (x, keep, base))
        raise MarkError(
            f"restore takes x [B, N, C], keep bool [B, N] and base like x; it got {shown}",
            where=where_of(node), node=line(node), fix="expand and cast the base to the hidden states' shape and dtype",
        )  # fmt: skip


def _policy(one: bool, one_mask: bool, batch: str) -> tuple[str, str]:
    """What is wrong with a batch under a policy, and the way out; empty when nothing is."""
    if one != one_mask:
        return "one keep mask prunes a whole batch", "expand the mask to [B, N]: each sample has its own"
    if batch == "one" and not one:
        return (
            "a batch is pruned, each sample to a count of its own, and the batch policy is one",
            'export with batch="ragged" (--batch ragged), or with example inputs of batch 1',
        )
    if batch == "ragged" and one:
        return (
            "the batch policy is ragged, and the model was captured with a batch of 1",
            'make the batch dynamic: dynamic={"input_ids": {0: "batch", ...}} with example inputs of batch 2 or more',
        )
    return "", ""
