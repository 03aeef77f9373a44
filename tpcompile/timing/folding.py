"""What an op is for: every op of a runtime's profile falls into one of six classes.

The graph decides where it tells, the op's kind else. *score*: what only a site's decision reads. *compaction*: what turns a decision into
positions, and the gathers behind it. *attention*: products of two computed values, softmax, fused attention. *matmul*: products with
weights. *shape*: sizes, casts, copies and views. *other*: norms, activations, sums, embeddings.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from tpcompile.backends.base import OpTime
from tpcompile.compare.graphview import Graph, Op

CLASSES = ("matmul", "attention", "score", "compaction", "shape", "other")

PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "Einsum"})
KINDS: Mapping[str, str] = {
    **dict.fromkeys((*PRODUCTS, "FullyConnected", "Conv", "Convolution", "FusedConv", "FusedGemm", "TransposeMatMul"), "matmul"),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "ScaledDotProductAttention", "Softmax", "SoftMax"), "attention"),
    **dict.fromkeys(
        ("NonZero", "CumSum", "TopK", "ScatterElements", "ScatterElementsUpdate", "ScatterUpdate", "Compress"), "compaction"
    ),
    **dict.fromkeys(
        ("Shape", "ShapeOf", "Reshape", "Unsqueeze", "Squeeze", "Concat", "Slice", "StridedSlice", "Expand"), "shape"
    ),
    **dict.fromkeys(("Broadcast", "Range", "Cast", "Convert", "Reorder", "Transpose", "Tile", "ConstantOfShape"), "shape"),
}
"""Kind of op, as ONNX, ONNX Runtime or OpenVINO call it -> class; any other is ``other``."""

GATHERS = frozenset({"Gather", "GatherElements", "GatherND"})
VIEWS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Cast", "Convert", "Concat", "Transpose", "Expand", "Broadcast", "Slice"})
LOGIC = frozenset({"Or", "And", "Not", "LogicalOr", "LogicalAnd", "LogicalNot", "Less", "Greater", "GreaterOrEqual", "Equal"})
COUNTING = frozenset(
    {"NonZero", "CumSum", "TopK", "ScatterElements", "ScatterElementsUpdate", "Sub", "Subtract", "ReduceSum", "ReduceMax"}
)
INDEXING = VIEWS | LOGIC | COUNTING | {"Max", "Min", "Maximum", "Minimum"}
"""What lies between a decision and the gathers that follow it."""
SITE = re.compile(r"site\d+\.(keep|score|index|into)")


def classes(graph: Graph) -> dict[str, str]:
    """Name of an op -> its class, for those that the graph tells more about than their kind."""
    sites = {key for name, key in graph.values.items() if SITE.fullmatch(name)}
    decided = {key for name, key in graph.values.items() if SITE.fullmatch(name) and not name.endswith(".score")}
    results = [graph.values.get(name, name) for name in graph.outputs]
    live = _backward(graph, results, sites)
    found = {op.name: "attention" for op in _dynamic_products(graph)}
    found |= {op.name: "score" for op in _backward(graph, sites, set()).values() if op.outputs[0] not in live}
    return found | {op.name: "compaction" for op in _compaction(graph, decided)}


def fold(times: Iterable[OpTime], known: Mapping[str, str]) -> dict[str, float]:
    """Microseconds by class.

    Args:
        times: of a profile. A fused op goes by the name of one of its parts, with the fusion's name after a slash.
        known: of the engine's graph, from :func:`classes`.
    """
    found = dict.fromkeys(CLASSES, 0.0)
    for one in times:
        found[known.get(one.name.split("/")[0], KINDS.get(one.kind, "other"))] += one.us
    return found


def matmul_bytes(graph: Graph) -> int:
    """Bytes of the weights that products read: each inference streams them once, however few its rows."""
    constant = _constants(graph)
    held = {value for op in graph.ops if op.kind in PRODUCTS for value in op.inputs if value in constant}
    origins = {source for value in held for source in _origins(graph, value)}
    sizes = {"float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "float64": 8}
    return sum(_size(graph.weights[key].shape) * sizes.get(graph.weights[key].dtype, 4) for key in origins)


def _size(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _backward(graph: Graph, start: Iterable[str], stop: set[str]) -> dict[str, Op]:
    """First output -> op, for every op that these values come from; ops behind a value in ``stop`` are not looked for."""
    producers, found = graph.producers, dict[str, Op]()
    waiting = list(start)
    first = set(waiting)
    while waiting:
        value = waiting.pop()
        op = producers.get(value)
        if op is None or op.outputs[0] in found or (value in stop and value not in first):
            continue
        found[op.outputs[0]] = op
        waiting += op.inputs
    return found


def _compaction(graph: Graph, decided: set[str]) -> list[Op]:
    """Ops that only handle positions after a decision, and the gathers they end in; ops run in order, so one pass finds them all."""
    carried, found = set(decided), []
    for op in graph.ops:
        if (
            carried.isdisjoint(op.inputs)
            or op.kind not in GATHERS | INDEXING
            or (decided & set(op.outputs) and op.kind != "NonZero")
        ):
            continue
        found.append(op)
        if op.kind in INDEXING:
            carried.update(op.outputs)
    return found


def _constants(graph: Graph) -> set[str]:
    """Weights, and what is computed from nothing else."""
    found = set(graph.weights)
    for op in graph.ops:
        if op.inputs and all(value in found or value.startswith("=") or not value for value in op.inputs):
            found.update(op.outputs)
    return found


def _dynamic_products(graph: Graph) -> list[Op]:
    constant = _constants(graph)
    return [op for op in graph.ops if op.kind in PRODUCTS and not constant.intersection(op.inputs)]


def _origins(graph: Graph, value: str) -> list[str]:
    """The weights that a constant is computed from."""
    if value in graph.weights:
        return [value]
    op = graph.producers[value]
    return [source for one in op.inputs if one in graph.producers or one in graph.weights for source in _origins(graph, one)]
