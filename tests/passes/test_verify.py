"""Every promise of a stage, with a graph that breaks it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import StageError
from tpcompile.passes import DEFAULT, Canonicalize, Mark, Pipeline, Place, verify
from tpcompile.program import Program, Stage

aten = torch.ops.aten


class Pool(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep) * keep.unsqueeze(-1)).sum(1)


def staged(toy: Callable[..., Program], stage: Stage) -> Program:
    """The toy at a stage."""
    steps = {
        Stage.CAPTURED: Pipeline((Canonicalize(),)),
        Stage.MARKED: Pipeline((Canonicalize(), Mark())),
        Stage.PLACED: Pipeline((Canonicalize(), Mark(), Place())),
        Stage.COMPACT: DEFAULT,
    }
    return steps[stage](toy(Pool()))


def in_place(program: Program) -> Program:
    program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[0].target = aten.mul_.Tensor
    return program


def as_float(program: Program) -> Program:
    (node,) = program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    return replace(program, sites=tuple(replace(site, keep=node.name) for site in program.sites))


def another_prune(program: Program) -> Program:
    draft = program.draft()
    (node,) = draft.graph.find_nodes(op="call_function", target=ops.PRUNE)
    with draft.graph.inserting_before(node):
        other = draft.graph.call_function(aten.bitwise_not.default, (node.args[1],))
        node.args = (draft.graph.call_function(ops.PRUNE, (node.args[0], other)), node.args[1])
    return program.adopt(draft)


def no_index(program: Program) -> Program:
    return replace(program, sites=tuple(replace(site, index="") for site in program.sites))


BROKEN: dict[str, tuple[Stage, Callable[[Program], Program], str]] = {
    "captured: functional": (Stage.CAPTURED, in_place, "verifier of stage captured: an op writes in place"),
    "captured: outputs named": (
        Stage.CAPTURED,
        lambda p: replace(p, output_names=()),
        "verifier of stage captured: outputs and output names differ in number",
    ),
    "marked: sites": (Stage.MARKED, lambda p: replace(p, sites=()), "verifier of stage marked: no prune site"),
    "marked: bool": (Stage.MARKED, as_float, "verifier of stage marked: a keep mask is not bool"),
    "marked: every prune": (Stage.MARKED, another_prune, "verifier of stage marked: a prune node belongs to no site"),
    "marked: known nodes": (
        Stage.MARKED,
        lambda p: replace(p, sites=tuple(replace(s, keep="gone") for s in p.sites)),
        "no node 'gone' in the graph",
    ),
    "placed: sets": (
        Stage.PLACED,
        lambda p: replace(p, placements={}),
        "verifier of stage placed: a site's result has no token set",
    ),
    "compact: no prune": (
        Stage.PLACED,
        lambda p: replace(p, stage=Stage.COMPACT),
        "verifier of stage compact: a prune node is left",
    ),
    "compact: one node per site": (
        Stage.COMPACT,
        lambda p: replace(p, sites=(*p.sites, *p.sites)),
        "verifier of stage compact: 2 sites, 1 compact nodes",
    ),
    "compact: index": (Stage.COMPACT, no_index, "verifier of stage compact: site0 has no index"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_seen(toy: Callable[..., Program], name: str) -> None:
    stage, breaks, message = BROKEN[name]
    program = staged(toy, stage)
    verify(program)
    with pytest.raises(StageError) as caught:
        verify(breaks(program))
    assert caught.value.message == message
    assert caught.value.fix == "this is a bug: rerun with --dump-ir DIR and report the dump"


def test_the_guilty_node_is_printed(toy: Callable[..., Program]) -> None:
    with pytest.raises(StageError) as caught:
        verify(in_place(staged(toy, Stage.CAPTURED)))
    assert " = aten.mul_.Tensor(%prune, %unsqueeze)" in caught.value.node
