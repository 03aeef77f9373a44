"""Attention as one op: ONNX's ``Attention`` (opset 23) in the place of matmul, scale, mask, softmax and matmul.

1. a softmax that only the product with the values reads, over logits ``q @ k.T``, scaled, with a mask added: one op ``[B, H, N, D]``;
2. one whose heads are split and joined by reshapes and transposes: the op does that itself, ``[B, N, H * D]``;
3. a reshape to the shape that is there goes.

Runtimes need not find it again, and every node costs a runtime something when a new size comes. An attention map that a score reads as
well stays written out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor, replace_all_uses_with
from onnx_ir.passes.common import RemoveUnusedNodesPass

HEADS = (0, 2, 1, 3)
"""``[B, N, H, D]`` to ``[B, H, N, D]`` and back."""


@dataclass(frozen=True)
class _Found:
    """One attention: ``softmax(q @ k.T * scale + mask) @ v``; ``k`` as it is before the transpose, ``keys`` its dims in order."""

    q: ir.Value
    k: ir.Value
    keys: tuple[int, ...]
    v: ir.Value
    scale: float
    mask: ir.Value | None
    last: ir.Node


def fuse_attention(model: ir.Model) -> int:
    """Write every attention that nothing else looks into as one op.

    Args:
        model: with the shapes of its values; changed.

    Returns:
        How many were written.
    """
    _drop_reshapes(model)
    wide: dict[tuple[ir.Value, str], ir.Value] = {}
    found = [match for node in model.graph if node.op_type == "Softmax" and (match := _match(node))]
    for match in found:
        _write(model.graph, match, wide)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        _join_heads(model.graph, node)
    RemoveUnusedNodesPass()(model)
    return len(found)


def _drop_reshapes(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        before, after = node.inputs[0], node.outputs[0]
        if before is not None and not after.is_graph_output() and _sizes(before) == _sizes(after) != ():
            replace_all_uses_with(after, before)
    RemoveUnusedNodesPass()(model)


def _match(softmax: ir.Node) -> _Found | None:
    """Case 1, read from the softmax forwards to the product with the values, and backwards to the one with the keys."""
    probs, logits = softmax.outputs[0], softmax.inputs[0]
    last = _only_reader(probs, "MatMul")
    if logits is None or softmax.attributes.get_int("axis", -1) not in (-1, 3) or last is None or last.inputs[0] is not probs:
        return None
    product, scale, mask = _logits(logits)
    if product is None or (mask is not None and not _is_mask(mask, logits)):
        return None
    (q, turned), v = product.inputs, last.inputs[1]
    transpose = turned.producer() if turned is not None else None
    if q is None or v is None or transpose is None or transpose.op_type != "Transpose":
        return None
    if not len(_sizes(q)) == len(_sizes(v)) == 4 or _sizes(v)[:2] != _sizes(q)[:2]:
        return None
    k, perm = transpose.inputs[0], tuple(transpose.attributes.get_ints("perm", (3, 2, 1, 0)))
    scaled = _made_by(q, "Mul")
    if scaled is not None and (number := _number(scaled.inputs[1])) is not None:
        scale, q = scale * number, scaled.inputs[0]
    return _Found(q, k, (*perm[:2], perm[3], perm[2]), v, scale, mask, last) if q is not None and k is not None else None


def _logits(value: ir.Value) -> tuple[ir.Node | None, float, ir.Value | None]:
    """The product behind logits, what it is scaled by, and the mask added after that; no product where they are something else."""
    mask, scale = None, 1.0
    while (node := _made_by(value, "Add", "Mul", "Div")) is not None:
        a, b = node.inputs
        assert a is not None
        assert b is not None
        number = _number(b)
        if node.op_type == "Add" and mask is None and scale == 1.0:  # a scale behind the mask would scale the mask
            value, mask = (a, b) if _leads_to_matmul(a) else (b, a)
        elif node.op_type != "Add" and number is not None:
            value, scale = a, scale * number if node.op_type == "Mul" else scale / number
        else:
            return None, scale, mask
    return _made_by(value, "MatMul"), scale, mask


def _made_by(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The op of one of these kinds that made a value which nothing else reads."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type not in kinds or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return node


def _only_reader(value: ir.Value, kind: str) -> ir.Node | None:
    readers = value.consumers()
    single = len(value.uses()) == 1 and not value.is_graph_output()
    return readers[0] if single and readers[0].op_type == kind else None


def _leads_to_matmul(value: ir.Value) -> bool:
    node = _made_by(value, "MatMul", "Mul", "Div")
    return node is not None and (node.op_type == "MatMul" or _leads_to_matmul(node.inputs[0] or value))


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    tensor = get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and math.prod(tensor.shape.numpy()) == 1 else None


def _is_mask(mask: ir.Value, logits: ir.Value) -> bool:
    """Whether a mask spreads over the logits as the op wants it: the keys all there, the queries all or one."""
    own, whole = _sizes(mask), _sizes(logits)
    return 2 <= len(own) <= 4 and own[-1] == whole[-1] and all(a in (b, 1) for a, b in zip(own[::-1], whole[::-1], strict=False))


def _sizes(value: ir.Value) -> tuple[int | str, ...]:
    """Sizes, each a number or a name; empty where they are not known."""
    sizes = [size if isinstance(size, int) else size.value for size in value.shape or ()]
    return tuple(size for size in sizes if size is not None) if None not in sizes else ()


def _write(graph: ir.Graph, found: _Found, wide: dict[tuple[ir.Value, str], ir.Value]) -> None:
    k = found.k
    if found.keys != tuple(range(4)):
        k = _insert(graph, found.last, "Transpose", [k], perm=found.keys)
        k.type, k.shape = found.k.type, ir.Shape([found.k.shape[d] for d in found.keys]) if found.k.shape is not None else None
    mask = found.mask
    if mask is not None and (len(_sizes(mask)) < 4 or _sizes(mask)[-2] != _sizes(found.q)[-2]):
        key = (mask, str(_sizes(found.q)[-2]))
        if key not in wide:
            wide[key] = _widened(graph, found.last, mask, found.q)
        mask = wide[key]
    result = _insert(
        graph, found.last, "Attention", [found.q, k, found.v, *([mask] if mask is not None else [])], scale=found.scale
    )
    _take_over(result, found.last.outputs[0])


def _widened(graph: ir.Graph, before: ir.Node, mask: ir.Value, q: ir.Value) -> ir.Value:
    """A mask ``[B, 1, N, M]`` of one ``[B, 1, 1, M]``: runtimes want every query's row to be there."""
    flat = _before_split(q)
    source, dim = (flat, 1) if flat is not None else (q, 2)
    queries = _insert(graph, before, "Shape", [source], start=dim, end=dim + 1)
    ones, one = (_insert(graph, before, "Constant", [], value=ir.tensor(np.ones(n, dtype=np.int64))) for n in (2, 1))
    sizes = _insert(graph, before, "Concat", [ones, queries, one], axis=0)
    return _insert(graph, before, "Expand", [mask, sizes])


def _join_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Case 2: all of queries, keys, values and result have their heads split by the same two ops."""
    outer = _only_reader(node.outputs[0], "Transpose")
    joined = _only_reader(outer.outputs[0], "Reshape") if outer is not None and _perm(outer) == HEADS else None
    flat = [_before_split(value) for value in node.inputs[:3]]
    if joined is None or len(_sizes(joined.outputs[0])) != 3 or None in flat:
        return
    heads = {_sizes(value)[1] for value in node.inputs[:3] if value is not None}
    if len(heads) != 1 or _sizes(joined.outputs[0])[:2] != (_sizes(node.outputs[0]) or (0, 0, 0))[0:3:2]:
        return
    count = ir.AttrInt64("", int(heads.pop()))
    options = {**node.attributes, "q_num_heads": count, "kv_num_heads": count}
    result = _insert(graph, joined, "Attention", [*flat, *node.inputs[3:]], **{name: a.value for name, a in options.items()})
    _take_over(result, joined.outputs[0])


def _before_split(value: ir.Value | None) -> ir.Value | None:
    """``[B, N, H * D]`` of a ``[B, H, N, D]`` that was split from it."""
    turned = value.producer() if value is not None else None
    source = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" and _perm(turned) == HEADS else None
    split = source.producer() if source is not None else None
    flat = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
    if source is None or flat is None or len(_sizes(flat)) != 3 or len(_sizes(source)) != 4:
        return None
    return flat if _sizes(flat)[:2] == _sizes(source)[:2] else None


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()))


def _insert(graph: ir.Graph, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
    """A new op right before another, with that one's notes."""
    made = ir.node(kind, inputs, attributes=attributes)
    made.metadata_props.update(before.metadata_props)
    graph.insert_before(before, made)
    return made.outputs[0]


def _take_over(new: ir.Value, old: ir.Value) -> None:
    """Let a value stand for another, under its name."""
    name, new.shape, new.type = old.name, old.shape, old.type
    old.name, new.name = f"{name}.unfused", name
    replace_all_uses_with(old, new, replace_graph_outputs=True)
