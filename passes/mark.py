"""captured -> marked: find the sites.

1. each distinct keep mask of a ``tpcompile::prune`` node is one site; nodes that share a mask share the site;
2. ``restore`` gets rows and a base of one shape and dtype;
3. hidden states must be ``[B, N, C]`` and the mask bool ``[B, N]``; B is 1, or any number where the batch is ragged;
4. a program without a site is refused: it is dense.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from tpcompile.axes import TokenSet
from tpcompile.errors import MarkError
from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.base import GraphPass
from tpcompile.program import Program, Site, Stage, where_of
from tpcompile.text import line


@dataclass(frozen=True)
class Mark(GraphPass):
    """Name the sites in program order; the module docstring lists the cases."""

    name: ClassVar[str] = "mark"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.MARKED
    batch: str = "one"

    def run(self, program: Program) -> Program:
        """Return the program with its sites."""
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
