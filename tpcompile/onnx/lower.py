"""ONNX for runtimes that know fewer ops: attention written out, sizes that follow from data as branches, and a look at what TopK takes.

Each is a rewrite from ONNX to ONNX, exact, and checked in ONNX Runtime (``docs/decisions/0019-what-tensorrt-is-given.md``).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor, replace_all_uses_with

from tpcompile.errors import BuildFailed, UsageError, Where
from tpcompile.frames import innermost
from tpcompile.onnx.names import SCOPES, TRACE

MOST_TOPK = 3840
"""The largest count TensorRT's TopK takes."""
SIZED = {"Shape", "Size"}
"""Ops whose result says nothing of values."""


class Writer:
    """Puts nodes before one node of a graph, with its notes, and knows the types of what they give.

    Args:
        at: the node that stands behind whatever is written.
    """

    def __init__(self, at: ir.Node) -> None:
        assert isinstance(at.graph, ir.Graph)
        self.at, self.graph, self.count = at, at.graph, 0

    def __call__(self, kind: str, inputs: list[ir.Value | None], dtype: ir.DataType | None, **attributes: Any) -> ir.Value:
        """One op; its result has this dtype."""
        made = ir.node(kind, inputs, attributes=attributes)
        made.metadata_props.update(self.at.metadata_props)
        made.name = f"{self.at.name}.{kind}.{self.count}"
        value, self.count = made.outputs[0], self.count + 1
        value.name = made.name
        if dtype is not None:
            value.dtype = dtype
        self.graph.insert_before(self.at, made)
        return value

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant."""
        tensor = ir.tensor(np.asarray(value, dtype=dtype)) if not isinstance(value, ir.TensorProtocol) else value
        return self("Constant", [], tensor.dtype, value=tensor)

    def replace(self, new: ir.Value) -> None:
        """Let a value stand for the node's first result, under its name; the node goes."""
        old = self.at.outputs[0]
        new.shape, new.type, name = old.shape, old.type, old.name
        old.name, new.name = f"{name}.before", name
        replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(self.at, safe=True)


def where_of(node: ir.Node) -> Where | None:
    """The user's line that the exporter noted at a node."""
    frame = innermost(node.metadata_props.get(TRACE, ""))
    return Where(frame.file, frame.line, frame.source, module_of(node), frame.function) if frame is not None else None


def module_of(node: ir.Node) -> str:
    """The module that the exporter noted at a node; empty where it noted none."""
    scopes = node.metadata_props.get(SCOPES, "")
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""


def write_out_attention(model: ir.Model) -> int:
    """``Attention`` as matmul, mask, softmax, matmul.

    Returns:
        How many were written.
    """
    found = [node for node in model.graph if node.op_type == "Attention" and not node.domain]
    for node in found:
        _attend(node)
    return len(found)


def _attend(node: ir.Node) -> None:
    write = Writer(node)
    q, k, v = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    assert q is not None
    assert k is not None
    width = q.shape[-1] if q.shape is not None else None
    assert isinstance(width, int), f"{node.name}: heads of unknown size"
    kind = q.dtype
    heads = node.attributes.get_int("q_num_heads", 0)
    _refuse_more_than_a_mask(node, heads)

    def split(x: ir.Value | None) -> ir.Value:
        parted = write("Reshape", [x, write.constant([0, 0, heads, -1])], kind)
        return write("Transpose", [parted], kind, perm=[0, 2, 1, 3])

    if heads:
        q, k, v = split(q), split(k), split(v)
    scale = node.attributes.get_float("scale", 0.0) or (width // (heads or 1)) ** -0.5
    turned = write("Transpose", [k], kind, perm=[0, 1, 3, 2])
    assert kind is not None
    number = write.constant(ir.tensor(np.asarray(scale, dtype=kind.numpy())))
    logits = write("MatMul", [write("Mul", [q, number], kind), turned], kind)
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        hidden = write.constant(ir.tensor(np.asarray(-np.inf, dtype=kind.numpy())))
        logits = write("Where", [mask, logits, hidden], kind)
    elif mask is not None:
        logits = write("Add", [logits, mask], kind)
    result = write("MatMul", [write("Softmax", [logits], kind, axis=-1), v], kind)
    if heads:
        joined = write("Transpose", [result], kind, perm=[0, 2, 1, 3])
        result = write("Reshape", [joined, write.constant([0, 0, -1])], kind)
    write.replace(result)


def _refuse_more_than_a_mask(node: ir.Node, heads: int) -> None:
    odd = [
        name
        for name in ("is_causal", "softcap", "qk_matmul_output_mode")
        if name in node.attributes and node.attributes[name].value
    ]
    if odd or len(node.inputs) > 4 or node.attributes.get_int("kv_num_heads", heads) != heads:
        raise BuildFailed(
            f"{node.name} is Attention with more than a mask: {', '.join(odd) or 'past keys or shared heads'}",
            fix="write it with matmul and softmax", where=where_of(node),
        )  # fmt: skip


def write_out_nonzero(model: ir.Model, most: int) -> int:
    """``NonZero`` of a mask ``[n]`` by branches: the count in binary, and for each of its bits a run of positions, taken or empty.

    A branch that gives rows or none is what a runtime without NonZero can have of a size that follows from data. Inside the
    branches every shape is constant; each costs the runtime a look at the data.

    Args:
        model: changed.
        most: the largest ``n``.

    Returns:
        How many were written.
    """
    found = [node for node in model.graph if node.op_type == "NonZero" and not node.domain]
    for node in found:
        mask = node.inputs[0]
        if mask is None or mask.shape is None or len(mask.shape) != 1:
            raise BuildFailed(
                f"{node.name} is NonZero of more than one dim", where=where_of(node),
                fix="use batch one, form staged or lowering static",
            )  # fmt: skip
        _branch(node, mask, most)
    return len(found)


def _branch(node: ir.Node, mask: ir.Value, most: int) -> None:
    """The stored positions stand first in a permutation of constant size; runs of 2^b are taken from it from the front."""
    write, whole, logical = Writer(node), ir.DataType.INT64, ir.DataType.BOOL
    zero, one, last = write.constant([0]), write.constant([1]), write.constant(0)
    bits = write("Cast", [mask], whole, to=int(whole))
    places = write("Range", [last, write("Squeeze", [write("Shape", [mask], whole)], whole), write.constant(1)], whole)
    room = write.constant(np.zeros(most))
    padded = write("ScatterElements", [room, places, bits], whole, axis=0)
    slots = write("Sub", [write("CumSum", [padded, last], whole), one], whole)
    iota = write.constant(np.arange(most))
    behind = write.constant(np.arange(most) + most)
    slot = write("Where", [write("Cast", [padded], logical, to=int(logical)), slots, behind], whole)
    order = write("ScatterElements", [write.constant(np.zeros(2 * most)), slot, iota], whole, axis=0)
    left = write("ReduceSum", [padded, zero], whole, keepdims=1)
    offset, runs = zero, []
    for bit in reversed(range(most.bit_length())):
        size = write.constant([2**bit])
        taken = write("GreaterOrEqual", [left, size], logical)
        run = write("Gather", [order, write("Add", [offset, write.constant(np.arange(2**bit))], whole)], whole, axis=0)
        runs.append(_taken_or_none(write, write("Squeeze", [taken, zero], logical), run))
        step = write("Mul", [write("Cast", [taken], whole, to=int(whole)), size], whole)
        left, offset = write("Sub", [left, step], whole), write("Add", [offset, step], whole)
    write.replace(write("Unsqueeze", [write("Concat", list(runs), whole, axis=0), zero], whole))


def _taken_or_none(write: Writer, condition: ir.Value, run: ir.Value) -> ir.Value:
    """``run`` where the condition holds, else none of it."""

    def graph(kind: str, more: list[int]) -> ir.Graph:
        bounds = [ir.node("Constant", [], attributes={"value": ir.tensor([n], dtype=ir.DataType.INT64)}) for n in more]
        node = ir.node(kind, [run, *(one.outputs[0] for one in bounds)])
        nodes = [*bounds, node]
        for number, one in enumerate(nodes):
            one.outputs[0].name = one.name = f"{run.name}.{kind}.{number}"
        node.outputs[0].dtype = ir.DataType.INT64
        return ir.Graph([], [node.outputs[0]], nodes=nodes, name=f"{run.name}.{kind}")

    return write("If", [condition], ir.DataType.INT64, then_branch=graph("Identity", []), else_branch=graph("Slice", [0, 0]))


def check_counts(model: ir.Model) -> None:
    """Refuse a TopK whose count TensorRT cannot take, at the user's line.

    Raises:
        BuildFailed: a count above 3840, or one that follows from data.
    """
    for node in [node for node in model.graph if node.op_type == "TopK" and node.inputs[1] is not None]:
        count = node.inputs[1]
        assert count is not None
        known = get_const_tensor(count)
        if known is not None and int(known.numpy().reshape(-1)[0]) > MOST_TOPK:
            raise BuildFailed(
                f"{node.name} takes the {int(known.numpy().reshape(-1)[0])} largest; TensorRT takes {MOST_TOPK} at most",
                fix="use form staged with lowering dynamic or bucketed: no TopK is in it", where=where_of(node),
            )  # fmt: skip
        if known is None and _follows_from_data(count):
            raise BuildFailed(
                f"{node.name} takes a count that follows from data; TensorRT has none", where=where_of(node),
                fix="use form staged, or lowering static; form single needs lowering dynamic and batch one",
            )  # fmt: skip


def _follows_from_data(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return value.is_graph_input()
    return node.op_type not in SIZED and any(_follows_from_data(one) for one in node.inputs if one is not None)


def largest(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """The most tokens a site can see.

    Args:
        model: with taps.
        sizes: dim name -> its largest size.

    Raises:
        UsageError: a dim whose size nobody gave.
    """
    keeps = [v for n in model.graph for v in n.outputs if str(v.name).startswith("site0.keep") and v.shape is not None]
    found = [size if isinstance(size, int) else sizes.get(str(size.value)) for v in keeps for size in list(v.shape or ())[1:2]]
    if not found or found[0] is None:
        raise UsageError("the number of tokens has no upper bound", fix="give it: --dim seq=2:64:512")
    return found[0]
