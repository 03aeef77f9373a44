"""float32 graph -> the same graph with 8-bit matrix products: a pair QuantizeLinear, DequantizeLinear before either operand.

Weights are rounded channel by channel (8-bit integers) or as a whole (8-bit floats), activations as a whole, by the largest magnitude that
data showed. Products of two activations, and products that decide which tokens stay, stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tpcompile.onnx.names import exposed
from tpcompile.onnx.types import deciding

WEIGHTED = {"MatMul": -1, "Gemm": -1, "Conv": 0}
"""Op -> the dim of its weight's output channels."""


@dataclass(frozen=True)
class Grid:
    """An 8-bit type: its largest number, and whether weights have a scale for each channel."""

    dtype: ir.DataType
    largest: float
    by_channel: bool


GRIDS = {"int8": Grid(ir.DataType.INT8, 127.0, True), "fp8": Grid(ir.DataType.FLOAT8E4M3FN, 448.0, False)}


def products(graph: ir.Graph) -> list[ir.Node]:
    """The products that can be computed in 8 bits."""
    decides = deciding(graph)
    nodes = [node for node in graph if node.op_type in WEIGHTED and _weight(node) is not None]
    return [node for node in nodes if node.outputs[0] not in decides]


def activations(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the values whose largest magnitude ``quantise`` asks for."""
    return tuple(dict.fromkeys(str(node.inputs[0].name) for node in products(graph) if node.inputs[0] is not None))


def quantise(model: ir.Model, largest: Mapping[str, float], precision: str) -> int:
    """Write the pairs, in place.

    Args:
        model: float32, its weights in memory.
        largest: of each value of ``activations``, its largest magnitude.
        precision: ``int8`` or ``fp8``.

    Returns:
        How many products are computed in 8 bits.
    """
    grid, done = GRIDS[precision], products(model.graph)
    pairs: dict[ir.Value, ir.Value] = {}
    weights: dict[tuple[ir.Value, int], list[ir.Value]] = {}
    for node in done:
        x = node.inputs[0]
        assert x is not None
        if x not in pairs:
            pairs[x] = _activation(model.graph, node, x, max(largest[str(x.name)], 1e-6) / grid.largest, grid)
        node.replace_input_with(0, pairs[x])
        node.replace_input_with(1, _rounded(model.graph, node, grid, weights))
    with exposed(model.graph):
        RemoveUnusedNodesPass()(model)
    return len(done)


def _weight(node: ir.Node) -> np.ndarray | None:
    """The constant weight of a product, of two dims or more; None where it has none."""
    value = node.inputs[1]
    known = get_const_tensor(value) if value is not None else None
    return known.numpy() if known is not None and len(known.shape) > 1 else None


def _activation(graph: ir.Graph, before: ir.Node, x: ir.Value, scale: float, grid: Grid) -> ir.Value:
    step, zero = _held(graph, f"{x.name}.scale", np.float32(scale)), _zero(graph, f"{x.name}.zero", grid, ())
    rounded = ir.node("QuantizeLinear", [x, step, zero])
    back = ir.node("DequantizeLinear", [rounded.outputs[0], step, zero])
    for node, dtype in ((rounded, grid.dtype), (back, ir.DataType.FLOAT)):
        node.name = node.outputs[0].name = f"{x.name}.{node.op_type}"
        node.outputs[0].dtype, node.outputs[0].shape = dtype, x.shape
        node.metadata_props.update(before.metadata_props)
    graph.insert_before(before, [rounded, back])
    return back.outputs[0]


def _rounded(graph: ir.Graph, node: ir.Node, grid: Grid, known: dict[tuple[ir.Value, int], list[ir.Value]]) -> ir.Value:
    """The weight in 8 bits, read through a DequantizeLinear; ``known``: numbers, scale and zero by weight and axis, added to."""
    value, weight = node.inputs[1], _weight(node)
    assert value is not None
    assert weight is not None
    axis = WEIGHTED[node.op_type] % weight.ndim
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        axis = 0
    if (value, axis) not in known:
        known[value, axis] = _numbers(graph, f"{value.name}.{grid.dtype.name.lower()}.{axis}", weight, grid, axis)
    back = ir.node("DequantizeLinear", known[value, axis], {"axis": axis} if grid.by_channel else {})
    back.name = back.outputs[0].name = f"{node.name}.{value.name}.DequantizeLinear"
    back.outputs[0].dtype, back.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(weight.shape)
    graph.insert_before(node, back)
    return back.outputs[0]


def _numbers(graph: ir.Graph, name: str, weight: np.ndarray, grid: Grid, axis: int) -> list[ir.Value]:
    """A weight's numbers in 8 bits, their scale and zero."""
    others = tuple(d for d in range(weight.ndim) if d != axis) if grid.by_channel else None
    scale = (np.maximum(np.abs(weight).max(axis=others), 1e-12) / grid.largest).astype(np.float32)
    steps = weight / (scale.reshape([-1 if d == axis else 1 for d in range(weight.ndim)]) if grid.by_channel else scale)
    numbers = np.rint(steps).astype(np.int8) if grid.dtype == ir.DataType.INT8 else steps.astype(ml_dtypes.float8_e4m3fn)
    return [_held(graph, name, numbers), _held(graph, f"{name}.scale", scale), _zero(graph, f"{name}.zero", grid, scale.shape)]


def _zero(graph: ir.Graph, name: str, grid: Grid, shape: tuple[int, ...]) -> ir.Value:
    return _held(graph, name, np.zeros(shape, grid.dtype.numpy()))


def _held(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    """An initializer."""
    tensor = ir.tensor(np.asarray(array), name=name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.initializers[name] = made
    return made
