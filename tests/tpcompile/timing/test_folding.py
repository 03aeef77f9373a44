"""Folding: by the graph first, by the kind else."""

from pathlib import Path

import pytest

from tpcompile.backends.base import OpTime
from tpcompile.compare.graphview import Graph, Op, Weight, read_graph
from tpcompile.timing.folding import CLASSES, classes, fold, matmul_bytes


def op(name, kind, reads, gives=None):
    return Op(kind, "", tuple(reads.split()), (gives or name,), name=name)


WEIGHT = Weight("w", "float32", (4, 8), lambda: None)
GRAPH = Graph(
    (
        op("project", "MatMul", "x w"),
        op("map", "MatMul", "project x"),
        op("soft", "Softmax", "map"),
        op("sum", "ReduceSum", "soft"),
        op("decide", "Greater", "sum", "keep"),
        op("places", "NonZero", "keep", "index"),
        op("flat", "Reshape", "index"),
        op("rows", "Gather", "project flat"),
        op("head", "MatMul", "rows w"),
    ),
    ("x",), ("head",), {"site0.keep": "keep", "site0.index": "index"}, {"w": WEIGHT},
)  # fmt: skip


def test_the_graph_tells_what_an_op_is_for():
    found = classes(GRAPH)
    assert {name: found[name] for name in ("sum", "decide")} == {"sum": "score", "decide": "score"}
    assert {name for name, kind in found.items() if kind == "compaction"} == {"places", "flat", "rows"}
    assert "project" not in found
    assert "head" not in found
    assert matmul_bytes(GRAPH) == 4 * 8 * 4


def test_times_are_folded_and_none_is_lost():
    rows = [
        OpTime("project", "MatMul", 5.0),
        OpTime("sum/Fusion/", "FusedReduce", 2.0),
        OpTime("rows", "Gather", 1.0),
        OpTime("invented", "Softmax", 3.0),
        OpTime("strange", "NeverHeardOf", 4.0),
    ]
    found = fold(rows, classes(GRAPH))
    assert found == {"matmul": 5.0, "attention": 3.0, "score": 2.0, "compaction": 1.0, "shape": 0.0, "other": 4.0}
    assert tuple(found) == CLASSES


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_real_engine_has_every_class(text_bundles: dict[str, Path], target: str) -> None:
    if target not in text_bundles:
        pytest.skip(f"{target} cannot be used here")
    graph = read_graph(text_bundles[target] / {"onnx": "model.onnx", "openvino": "openvino_model.xml"}[target])
    assert {"attention", "score", "compaction"} <= set(classes(graph).values())
    assert matmul_bytes(graph) > 3 * 4 * (4 * 32 * 32) * 0.9  # at least the projections of three layers
