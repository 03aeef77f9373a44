"""float32 graph -> the same graph computed in float16 or bfloat16, but for what decides which tokens stay.

1. *What decides* stays float32: every float that a comparison, a sort or a cast to integers reads, and what it is computed from, back to
   the next matrix product. So scores and thresholds are compared as the reference compares them.
2. *What is counted* stays float32 too, until it meets a computed value: numbers made of masks, positions and sizes alone.
3. Everything else is computed in the low type: weights are converted, infinities stay, what is too large for float16 becomes its largest.

Inputs, outputs and taps keep their types, so that an engine is called the same way in every precision.
"""

import re
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from tpcompile.errors import UsageError
from tpcompile.onnx.lower import SIZED, where_of
from tpcompile.onnx.names import exposed

LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"}
SCORE = re.compile(r"site\d+\.score")
WIDE, LARGEST = ir.DataType.FLOAT, 65504.0
OWN = {"Resize": (1, 2)}
"""Op -> inputs that are float32 in every precision."""


def retype(model: ir.Model, precision: str) -> None:
    """Compute a graph in a low precision, in place.

    Args:
        model: float32, its weights in memory.
        precision: ``fp16`` or ``bf16``.

    Raises:
        UsageError: the graph has branches or loops.
    """
    inner = next((node for node in model.graph if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())), None)
    if inner is not None:
        raise UsageError(f"{inner.name} is a branch or a loop: it has float32 only", fix="use fp32", where=where_of(inner))
    if any(v.dtype is None for node in model.graph for v in node.outputs):
        ShapeInferencePass()(model)
    with exposed(model.graph):
        _Retype(model.graph, LOW[precision]).run()
        RemoveUnusedNodesPass()(model)


def deciding(graph: ir.Graph) -> set[ir.Value]:
    """What decides which tokens stay, back to the results of the next matrix products: case 1 of the module docstring."""
    todo = [v for node in graph if _decides(node) for v in _floats(node.inputs)]
    todo += [v for node in graph for v in node.outputs if SCORE.fullmatch(str(v.name))]
    found: set[ir.Value] = set()
    while todo:
        value = todo.pop()
        node = value.producer()
        if value not in found and node is not None and node.op_type not in PRODUCTS:
            todo += _floats(node.inputs)
        found.add(value)
    return found


def _decides(node: ir.Node) -> bool:
    """Whether a node makes something else of floats than floats, such as a comparison does; sizes say nothing of values."""
    return node.op_type not in SIZED and bool(_floats(node.inputs)) and any(v.dtype != WIDE for v in node.outputs)


def _floats(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None and value.dtype == WIDE]


class _Retype:
    """One rewrite of one graph.

    Args:
        graph: changed.
        low: the type to compute in.
    """

    def __init__(self, graph: ir.Graph, low: ir.DataType) -> None:
        self.graph, self.type = graph, low
        self.exact = deciding(graph)
        self.low: set[ir.Value] = set()
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        nodes = list(self.graph)
        chosen = {node for node in nodes if self._is_low(node)}
        for node in nodes:
            self._convert_inputs(node, node in chosen)
        for node in chosen:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == int(WIDE):
                node.attributes["to"] = ir.AttrInt64("to", int(self.type))
        for value in self.low:
            value.dtype = self.type
        for value in [v for v in self.graph.outputs if v in self.low]:
            self._restore(value)

    def _is_low(self, node: ir.Node) -> bool:
        floats = _floats(node.inputs)
        product = node.op_type in PRODUCTS
        exact = not product and not self.exact.isdisjoint(node.outputs)
        if exact or node.op_type in (*SIZED, "Constant") or not _floats(node.outputs):
            return False
        if product or any(v in self.low or v.is_graph_input() or _is_weight(v) for v in floats):
            self.low.update(_floats(node.outputs))
            return True
        return False

    def _convert_inputs(self, node: ir.Node, low: bool) -> None:
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype != WIDE or place in OWN.get(node.op_type, ()):
                continue
            if low and value not in self.low:
                node.replace_input_with(place, self._lowered(node, value))
            elif not low and value in self.low and node.op_type not in SIZED:
                node.replace_input_with(place, self._cast(node, value, WIDE))

    def _lowered(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """A wide value in the low type: a constant converted once, else a cast."""
        known = get_const_tensor(value)
        if known is None:
            return self._cast(node, value, self.type)
        if (value, self.type) not in self.casts:
            name = f"{value.name}.{self.type.name.lower()}"
            tensor = ir.tensor(converted(known.numpy(), self.type), name=name)
            made = ir.Value(name=name, type=ir.TensorType(self.type), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
            self.graph.register_initializer(made)
            self.casts[value, self.type] = made
        return self.casts[value, self.type]

    def _cast(self, node: ir.Node, value: ir.Value, to: ir.DataType) -> ir.Value:
        """A value in another type, before its first reader: readers are met in order; float16 gets no number that is too large for it."""
        if (value, to) not in self.casts:
            source = value
            if to == ir.DataType.FLOAT16 and not value.is_graph_input():
                bounds = [ir.node("Constant", [], {"value": ir.tensor(np.float32(n))}) for n in (-LARGEST, LARGEST)]
                source = self._insert(node, "Clip", [value, *(one.outputs[0] for one in bounds)], value, WIDE, bounds)
            self.casts[value, to] = self._insert(node, "Cast", [source], value, to)
        return self.casts[value, to]

    def _insert(
        self, before: ir.Node, kind: str, inputs: list[ir.Value], like: ir.Value, dtype: ir.DataType, more: Iterable[ir.Node] = ()
    ) -> ir.Value:
        made = ir.node(kind, inputs, {"to": int(dtype)} if kind == "Cast" else {})
        made.name = f"{like.name}.{kind}.{dtype.name.lower()}"
        made.outputs[0].name, made.outputs[0].shape, made.outputs[0].dtype = made.name, like.shape, dtype
        self.graph.insert_before(before, [*more, made])
        return made.outputs[0]

    def _restore(self, value: ir.Value) -> None:
        """Give an output its own type back, under its name."""
        name, place = str(value.name), list(self.graph.outputs).index(value)
        cast = ir.node("Cast", [value], {"to": int(WIDE)})
        value.name, cast.name = f"{name}.{self.type.name.lower()}", f"{name}.Cast"
        made = cast.outputs[0]
        made.name, made.shape, made.dtype = name, value.shape, WIDE
        self.graph.append(cast)
        self.graph.outputs[place] = made


def _is_weight(value: ir.Value) -> bool:
    """A constant of more than one number: it makes what it meets a computed value."""
    known = get_const_tensor(value)
    return known is not None and known.size > 1


def converted(array: np.ndarray, to: ir.DataType) -> np.ndarray:
    """Numbers in a low type; finite ones stay finite."""
    if to == ir.DataType.FLOAT16:
        return np.where(np.isinf(array), array, np.clip(array, -LARGEST, LARGEST)).astype(np.float16)
    return array.astype(ml_dtypes.bfloat16)
