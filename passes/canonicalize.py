"""captured -> captured: fewer ops, each with a rule.

1. ``clone``, ``detach``, ``alias``, slices of everything and metadata assertions vanish (the graph is functional);
2. every reshape-like op is ``reshape`` with fixed sizes and at most one ``-1``: one constant node in an engine;
3. a mean is a sum over a count: the count keeps the masked program's value when tokens go;
4. ops without a rule are written in ops that have one (``passes/rules/forms.py``): splits, assignments under a mask, variances,
   einsum; attention too, but only in a program that masks: a dense one keeps what runtimes fuse;
5. a prefix joined in front of rows that were computed without it becomes a selection by position (``passes/prefix.py``);
6. 0-1 arithmetic becomes logic, and a softmax with a policy a masked one (``passes/policy.py``);
7. equal expressions are computed once;
8. a model that gathers by itself needs no proof: of these only 1, 2 and 7 are done to it, and its ops stay what engines know.
"""

import operator
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tpcompile.errors import NotDeterministic
from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.base import GraphPass, share, unite
from tpcompile.passes.masks import Masks
from tpcompile.passes.policy import logic
from tpcompile.passes.prefix import joined
from tpcompile.passes.rules import bind
from tpcompile.passes.rules.attention import attention
from tpcompile.passes.rules.forms import FORMS, Form, Writer
from tpcompile.program import Program, Stage, where_of
from tpcompile.text import line

aten = torch.ops.aten
_SAME = (aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default)
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_async.msg)
SPREAD = 80
"""exp(-80) is a normal float32: a softmax with a policy that is written as a masked one loses nothing up to there."""
ATTENTION = aten.scaled_dot_product_attention.default
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """Bring the captured graph to the op set that has rules; the module docstring lists the cases."""

    name: ClassVar[str] = "canonicalize"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED
    attention: str = "plain"

    def run(self, program: Program) -> Program:
        """Return the simplified program."""
        if program.gathered:
            return _simple(program)
        plain = self.attention == "plain"
        draft = program.draft()
        draft.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        forms = FORMS | ({ATTENTION: attention} if plain else {})
        for node in list(draft.graph.nodes):
            _random(node)
            if node.target in _CHECKS:
                draft.graph.erase_node(node)
            elif node.target in forms:
                _rewrite(node, forms[node.target])
        constants = program.constants().keys()
        draft = program.adopt(draft).draft()  # what was written has its shapes now
        for node in list(draft.graph.nodes):
            if node.target in _SAME or _whole(node):
                node.replace_all_uses_with(node.args[0])
            elif node.target in _RESHAPES:
                _reshape(node)
            elif node.target is aten.cat.default and plain:
                _join(node, constants)
        if not plain:
            return share(program.adopt(draft))
        written = list(logic(draft.graph, Masks(AxesMap(draft.graph), program.constants())))
        places = dict.fromkeys(where_of(node) for node in written)
        assumed = [f"{p.short} ({p.module}): living logits lie less than {SPREAD} below those a policy hides" for p in places]
        return share(program.adopt(draft, assumptions=(*program.assumptions, *assumed)))


def _simple(program: Program) -> Program:
    """Case 8. No node is new, so none needs its shape computed again: with sizes that follow the data that takes long."""
    draft = program.draft()
    for node in list(draft.graph.nodes):
        _random(node)
        if node.target in _CHECKS:
            draft.graph.erase_node(node)
        elif node.target in _SAME or _whole(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target in _RESHAPES:
            _reshape(node)
    gone = unite(draft.graph)
    return program.adopt(draft, refresh=False, sites=program.renamed(gone))


def _rewrite(node: fx.Node, form: Form) -> None:
    """Put a form in the place of a call, or leave the call where it has none."""
    with node.graph.inserting_before(node):
        w = Writer(node)
        made = form(w)
        made = w.cast(made, w.out.dtype) if isinstance(made, fx.Node) else made
    if isinstance(made, fx.Node):
        node.replace_all_uses_with(made)
    elif made is not None:
        for user in [n for n in node.users if n.target is operator.getitem]:
            user.replace_all_uses_with(made[user.args[1]])
            node.graph.erase_node(user)


def _join(node: fx.Node, constants: Collection[str]) -> None:
    """Put a selection by position in the place of a join, where it is one."""
    with node.graph.inserting_before(node):
        made = joined(node, constants)
    if made is not None:
        node.replace_all_uses_with(made)


def _random(node: fx.Node) -> None:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return
    given = {a.name: a.default_value for a in node.target._schema.arguments} | bind(node.target, node.args, node.kwargs)
    if given.get("dropout_p") != 0.0:  # attention is tagged for its dropout, which eval mode sets to 0
        raise NotDeterministic(
            f"{node.target} draws random numbers: masked and gathered runs would differ", where=where_of(node), node=line(node),
            fix="call model.eval(), or replace sampling by its deterministic form",
        )  # fmt: skip


def _whole(node: fx.Node) -> bool:
    """Whether a node is ``x[:]``."""
    if node.target is not aten.slice.Tensor:
        return False
    given = bind(aten.slice.Tensor, node.args, node.kwargs)
    end = given.get("end")
    return not given.get("start") and (end is None or end == sys.maxsize) and given.get("step", 1) == 1


def _reshape(node: fx.Node) -> None:
    sizes = list(node.meta["val"].shape)
    dynamic = [d for d, s in enumerate(sizes) if not isinstance(s, int)]
    if len(dynamic) <= 1:
        given: list[Any] = [-1 if d in dynamic else s for d, s in enumerate(sizes)]
    else:
        written = node.args[1]
        assert isinstance(written, (list, tuple))
        given = [s if isinstance(s, int) else w for s, w in zip(sizes, written, strict=True)]
    node.target = aten.reshape.default
    node.args, node.kwargs = (node.args[0], given), {}
