"""What each stage promises, as a table; checked on entry and after every pass. A failure is a bug of ours and says so."""

from collections.abc import Callable, Iterator

import torch
from torch import fx

from tpcompile.errors import StageError
from tpcompile.ops import COMPACT, PRUNE
from tpcompile.program import Program, Stage, where_of
from tpcompile.text import line

Check = Callable[[Program], Iterator[tuple[fx.Node | None, str]]]


def _functional(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            yield node, "an op writes in place"


def _inputs_named(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    results = program.graph.output_node().args[0]
    if not isinstance(results, (list, tuple)) or len(results) != len(program.output_names):
        yield None, "outputs and output names differ in number"


def _sites_exist(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    if not program.sites:
        yield None, "no prune site"
    for site in program.sites:
        if program.node(site.keep).meta["val"].dtype is not torch.bool:
            yield program.node(site.keep), "a keep mask is not bool"


def _marked_once(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    keeps = {site.keep for site in program.sites}
    for node in program.graph.find_nodes(op="call_function", target=PRUNE):
        if node.args[1].name not in keeps:
            yield node, "a prune node belongs to no site"


def _placed(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    for node in program.graph.find_nodes(op="call_function", target=PRUNE):
        if node.name not in program.placements or 1 not in program.placements[node.name].dims:
            yield node, "a site's result has no token set"


def _gathered(program: Program) -> Iterator[tuple[fx.Node | None, str]]:
    for node in program.graph.find_nodes(op="call_function", target=PRUNE):
        yield node, "a prune node is left"
    found = list(program.graph.find_nodes(op="call_function", target=COMPACT))
    if len(found) != len(program.sites) and not program.gathered:
        yield None, f"{len(program.sites)} sites, {len(found)} compact nodes"
    for site in program.sites:
        if not site.index:
            yield None, f"{site.name} has no index"


PROMISES: dict[Stage, tuple[Check, ...]] = {
    Stage.CAPTURED: (_functional, _inputs_named),
    Stage.MARKED: (_functional, _inputs_named, _sites_exist, _marked_once),
    Stage.PLACED: (_functional, _inputs_named, _sites_exist, _marked_once, _placed),
    Stage.COMPACT: (_functional, _inputs_named, _sites_exist, _gathered),
}


def verify(program: Program) -> None:
    """Check what the program's stage promises.

    Raises:
        StageError: a promise is broken.
    """
    for check in PROMISES[program.stage]:
        for node, what in check(program):
            raise StageError(
                f"verifier of stage {program.stage.name.lower()}: {what}",
                where=where_of(node) if node is not None else None,
                node=line(node) if node is not None else "",
                fix="this is a bug: rerun with --dump-ir DIR and report the dump",
            )
