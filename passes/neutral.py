"""What changes nothing is not computed: a sum with 0, a product with 1, an ``and`` with True, a mask that hides nothing."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import fx

from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.facts import Facts
from tpcompile.passes.values import Value
from tpcompile.program import Program


def plain(program: Program, true: Collection[str] = ()) -> Program:
    """A compact program in which whoever read an op with such an operand reads the other one.

    Args:
        program: compact.
        true: nodes that hold True everywhere, whatever the inputs.
    """
    draft = program.draft()
    axes = AxesMap(draft.graph)
    facts = Facts(draft.graph, axes, {}, program.constants(), true=true)
    gone: dict[str, str] = {}
    for call in [axes.calls[node.name] for node in draft.graph.nodes if node.name in axes.calls]:
        left = _left(call, facts)
        if left is not None:
            call.node.replace_all_uses_with(left)
            gone[call.node.name] = left.name
    if not gone:
        return program
    sites = tuple(
        replace(site, **{kind: _last(name, gone) for kind, name in site.taps.items()})  # type: ignore[arg-type]  # all are text
        for site in program.sites
    )
    return program.adopt(draft, sites=sites)


def _last(name: str, gone: Mapping[str, str]) -> str:
    """What is read in the place of a node that is gone."""
    while name in gone:
        name = gone[name]
    return name


def _left(call: Described, facts: Facts) -> fx.Node | None:
    """The operand that an op gives as it is; None where it makes something of it."""
    neutral = call.rule.neutral if call.rule is not None else ()
    out = call.node.meta["val"]
    if len(call.operands) != len(neutral) or call.node.kwargs or not (out.dtype is torch.bool or out.dtype.is_floating_point):
        return None  # 1 & 3 is 1, and a factor of its own may stand before an operand of a sum
    for one, other, number in zip(call.operands, call.operands[::-1], neutral, strict=True):
        holds = number is not None and facts[one].rest == Value.of(number)
        if holds and other.meta["val"].dtype is out.dtype and other.meta["val"].shape == out.shape:
            return other
    return None
