"""captured -> captured: the dense program, every keep constant true.

1. each ``prune`` gives its hidden states back;
2. its keep mask reads true everywhere, so that scores and comparisons behind it die.

For batch 1 without padding. A method that knows its dense model (``Pruned.dense``) is the better baseline: it keeps padding masks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tpcompile.ops import PRUNE
from tpcompile.passes.base import GraphPass
from tpcompile.program import Program, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepAll(GraphPass):
    """Keep every token; the module docstring lists the cases."""

    name: ClassVar[str] = "keepall"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED

    def run(self, program: Program) -> Program:
        """Return the program without its sites."""
        draft = program.draft()
        for node in list(draft.graph.nodes):
            if node.op == "call_function" and node.target is PRUNE:
                x, keep = node.args[:2]
                assert isinstance(keep, fx.Node)
                node.replace_all_uses_with(x)
                draft.graph.erase_node(node)
                with draft.graph.inserting_after(keep):
                    true = draft.graph.call_function(aten.full_like.default, (keep, True))
                keep.replace_all_uses_with(true, delete_user_cb=lambda user, true=true: user is not true)
        return program.adopt(draft)
