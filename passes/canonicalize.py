"""captured -> captured: fewer ops, each with a rule.

1. ``clone``, ``detach``, ``alias``, slices of everything and metadata assertions vanish (the graph is functional);
2. every reshape-like op is ``reshape`` with fixed sizes and at most one ``-1``: one constant node in an engine;
3. a mean is a sum over a count: the count keeps the masked program's value when tokens go;
4. ops without a rule are written in ops that have one (``passes/rules/forms.py``): splits, assignments under a mask, variances,
   einsum; attention too, but only in a program that prunes: a dense one keeps what runtimes fuse;
5. equal expressions are computed once.
"""

import operator
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tpcompile.errors import NotDeterministic
from tpcompile.passes.base import GraphPass, share
from tpcompile.passes.rules import bind
from tpcompile.passes.rules.attention import attention
from tpcompile.passes.rules.forms import FORMS, Form, Writer
from tpcompile.program import Program, Stage, where_of
from tpcompile.text import line

aten = torch.ops.aten
_SAME = (aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default)
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_async.msg)
_MEANS = (aten.mean.dim, aten.mean.default)
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
        draft = program.draft()
        draft.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        forms = FORMS | ({ATTENTION: attention} if self.attention == "plain" else {})
        for node in list(draft.graph.nodes):
            _random(node)
            if node.target in _CHECKS:
                draft.graph.erase_node(node)
            elif node.target in forms:
                _rewrite(node, forms[node.target])
        draft = program.adopt(draft).draft()  # what was written has its shapes now
        for node in list(draft.graph.nodes):
            if node.target in _SAME or _whole(node):
                node.replace_all_uses_with(node.args[0])
            elif node.target in _RESHAPES:
                _reshape(node)
            elif node.target in _MEANS:
                _mean(draft.graph, node)
        return share(program.adopt(draft))


def _rewrite(node: fx.Node, form: Form) -> None:
    """Put a form in the place of a call, or leave the call where it has none."""
    with node.graph.inserting_before(node):
        made = form(Writer(node))
    if isinstance(made, fx.Node):
        node.replace_all_uses_with(made)
    elif made is not None:
        for user in [n for n in node.users if n.target is operator.getitem]:
            user.replace_all_uses_with(made[user.args[1]])
            node.graph.erase_node(user)


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


def _mean(graph: fx.Graph, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = source.meta["val"].dim()
    listed = node.args[1] if node.target is aten.mean.dim and len(node.args) > 1 and node.args[1] else list(range(rank))
    assert isinstance(listed, (list, tuple))
    dims = [int(str(d)) % rank for d in listed]
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    with graph.inserting_before(node):
        total = _like(node, graph.call_function(aten.sum.dim_IntList, (source, dims, keepdim), {"dtype": node.meta["val"].dtype}))
        count: Any = 1
        for d in dims:
            size = source.meta["val"].shape[d]
            if not isinstance(size, int):
                size = _like(node, graph.call_function(aten.sym_size.int, (source, d)))
            count = size if count == 1 else _product(graph, node, count, size)
        quotient = _like(node, graph.call_function(aten.div.Tensor, (total, count)))
    node.replace_all_uses_with(quotient)


def _product(graph: fx.Graph, node: fx.Node, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return _like(node, graph.call_function(operator.mul, (a, b)))


def _like(node: fx.Node, new: fx.Node) -> fx.Node:
    """Give a new node the user line and module of the one it replaces."""
    new.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return new
