"""Writes sites into a masked program that has none: ``prune`` before the readers of a state, ``restore`` where dropped rows come back.

Neither changes a number: ``prune`` is the identity, and ``restore`` is the ``where``, the product or the fill that it takes the place of.
"""

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from tpcompile.axes import NEG_INF
from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.base import ancestors
from tpcompile.passes.candidates import Candidate, activations, token_dim
from tpcompile.passes.masks import BITS, Masks, Numbers
from tpcompile.program import Program

aten = torch.ops.aten


def insert(program: Program, mask: Candidate, state: str, alive: float) -> Program | None:
    """The program with ``prune(state, keep)`` before whatever reads the state and does not lead to the mask; None where nothing does."""
    draft = program.draft()
    nodes = {node.name: node for node in draft.graph.nodes}
    x, source = nodes[state], nodes[mask.name]
    leads = ancestors(source)
    readers = [u for u in x.users if u not in leads and u is not source and u.op != "output" and not _only_base(u, x)]
    if not readers:
        return None
    new = Writer(draft.graph, source, source)
    keep = _keep(new, source, mask.numbers, alive)
    new.last = max(x, keep, key=list(draft.graph.nodes).index)
    prune = new(PRUNE, x, keep)
    for reader in readers:
        if reader.target is RESTORE:
            reader.args = (prune, *reader.args[1:])  # its base is what stood before the site
        else:
            reader.replace_input_with(x, prune)
    _move_behind(draft.graph, prune, set(readers))
    return program.adopt(draft, refresh=False)


def _only_base(reader: fx.Node, x: fx.Node) -> bool:
    """Whether a restore reads it as its base alone."""
    return reader.target is RESTORE and reader.args[0] is not x


def restored(program: Program) -> Program:
    """The program with ``restore`` where an output's dropped rows hold an older state or a number; the same one where none does.

    From each output backwards through ops that work row by row: ``where(mask, new, old)``, ``x * mask`` and ``x.masked_fill(mask, number)``
    are what ``restore`` does. The older state is followed further, the newer one lives on pruned rows.
    """
    draft, axes = program.draft(), AxesMap(program.graph)
    masks, active = Masks(axes, program.constants(), program.bits), activations(program, axes)
    nodes = {node.name: node for node in draft.graph.nodes}
    order = {node.name: i for i, node in enumerate(program.graph.nodes)}
    results: Any = program.graph.output_node().args[0]
    stack, seen = [n for n in results if isinstance(n, fx.Node) and _rows(n)], set[fx.Node]()
    made = False
    while stack:
        node = stack.pop()
        call = axes.calls.get(node.name)
        if node in seen or call is None:
            continue
        seen.add(node)
        chosen = _chosen(node, masks, active, order)
        if chosen is None:
            stack.extend(_row_by_row(call))
            continue
        mask, alive, new, old = chosen
        write = Writer(draft.graph, nodes[mask.name], nodes[node.name])
        keep = _keep(write, nodes[mask.name], masks(mask), alive)
        write.last = max(keep, nodes[node.name], key=list(draft.graph.nodes).index)
        base = nodes[old.name] if isinstance(old, fx.Node) else write.filled(nodes[new.name], old)
        restore = write(RESTORE, nodes[new.name], keep, base)
        for reader in [user for user in nodes[node.name].users if user is not restore]:
            reader.replace_input_with(nodes[node.name], restore)
        nodes[node.name] = restore
        stack.extend([old] if isinstance(old, fx.Node) else [])
        made = True
    return program.adopt(draft, refresh=False) if made else program


def _rows(node: Any) -> bool:
    """Whether it is a float ``[B, N, C]``."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point()


def _row_by_row(call: Described) -> list[fx.Node]:
    """The operands whose rows become the rows of the result."""
    assert call is not None
    if call.factors is None or not _rows(call.node):
        return []
    factor, bound = call.factors.outs[0][1], {*call.factors.rigid, *call.factors.folds, *call.factors.reads}
    if factor is None or factor in bound:
        return []
    return [n for i, n in enumerate(call.operands) if _rows(n) and call.factors.ins[i][1] == factor]


def _chosen(
    node: fx.Node, masks: Masks, active: set[str], order: dict[str, int]
) -> tuple[fx.Node, float, fx.Node, fx.Node | float] | None:
    """The mask of a selection between rows, what it holds where the new rows count, the new rows, and the old ones or a number."""
    match node.target, node.args:
        case aten.where.self, (fx.Node() as mask, fx.Node() as yes, fx.Node() as no) if _alike(node, yes, no):
            newer = order[yes.name] > order[no.name]
            found: Any = (mask, float(newer), *((yes, no) if newer else (no, yes)))
        case aten.mul.Tensor, (fx.Node() as x, fx.Node() as mask) if masks(mask) == BITS:
            found = (mask, 1.0, x, 0.0)
        case aten.mul.Tensor, (fx.Node() as mask, fx.Node() as x) if masks(mask) == BITS:
            found = (mask, 1.0, x, 0.0)
        case aten.masked_fill.Scalar, (fx.Node() as x, fx.Node() as mask, int() | float() as number) if number != NEG_INF:
            found = (mask, 0.0, x, float(number))
        case _:
            return None
    mask, _, new, _ = found
    shape = mask.meta["val"].shape
    over = mask.name in active and len(shape) == 3 and token_dim(mask) == 1 and shape[0] == node.meta["val"].shape[0]
    return found if over and _alike(node, new) else None


def _alike(node: fx.Node, *others: fx.Node) -> bool:
    value = node.meta["val"]
    return all(_rows(n) and n.meta["val"].shape == value.shape and n.meta["val"].dtype is value.dtype for n in others)


class Writer:
    """Writes nodes one behind the other, with their metadata, at a user's line.

    Args:
        graph: to write into.
        last: the node that the first one stands behind.
        like: whose line and module the nodes get.
    """

    def __init__(self, graph: fx.Graph, last: fx.Node, like: fx.Node) -> None:
        self.graph, self.last, self.like = graph, last, like

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call behind the last one."""
        with self.graph.inserting_after(self.last):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in self.like.meta.items() if k in ("stack_trace", "nn_module_stack")}
        values = fx.map_arg(args, lambda n: n.meta["val"])
        mode = detect_fake_mode(values) or detect_fake_mode([self.like.meta["val"]])
        assert mode is not None
        with mode:
            made.meta["val"] = target(*values, **kwargs)
        self.last = made
        return made

    def filled(self, like: fx.Node, number: float) -> fx.Node:
        """A tensor of one number, of the shape that ``like`` has in masked form."""
        sizes = [self.size(like, d) for d in range(like.meta["val"].dim())]
        return self(aten.full.default, sizes, number, dtype=like.meta["val"].dtype)

    def size(self, x: fx.Node, dim: int) -> Any:
        """A size: an int, or a node where it is not fixed."""
        found = x.meta["val"].shape[dim]
        return found if isinstance(found, int) else self(aten.sym_size.int, x, dim)


def _keep(new: Writer, mask: fx.Node, numbers: Numbers, alive: float) -> fx.Node:
    """Bool ``[B, N]``, true where a token lives: where the mask is on the side of ``alive``."""
    dim = token_dim(mask)
    ones = [d for d in range(1, mask.meta["val"].dim()) if d != dim]
    flat = new(aten.squeeze.dims, mask, ones) if ones else mask
    if flat.meta["val"].dtype is torch.bool:
        return flat if alive else new(aten.logical_not.default, flat)
    if numbers == BITS:
        return new(aten.ne.Scalar if alive else aten.eq.Scalar, flat, 0)
    nearest = min(numbers - {alive}, key=lambda number: abs(number - alive))
    between = (alive + max(nearest, alive - 2.0)) / 2 if nearest < alive else (alive + min(nearest, alive + 2.0)) / 2
    return new(aten.gt.Scalar if alive > nearest else aten.lt.Scalar, flat, between)


def _move_behind(graph: fx.Graph, prune: fx.Node, late: set[fx.Node]) -> None:
    """Put the readers of a site, and what depends on them, behind it, in their order."""
    anchor = prune
    for node in list(graph.nodes):
        if node is prune:
            return
        if node in late or any(operand in late for operand in node.all_input_nodes):
            late.add(node)
            anchor.append(node)
            anchor = node
