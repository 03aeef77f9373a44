"""Low precisions and 8 bits: what decides stays float32, taps stay as they are, whatever reads them."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tpcompile.onnx.quant import activations, quantise
from tpcompile.onnx.types import retype

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((4, 4), dtype=np.float32)
W[:, 0] *= 100  # a channel of its own scale, by columns and not by rows


def model(*lines: tuple[str, list[str], list[str], dict[str, Any]], outputs: dict[str, int]) -> ir.Model:
    """Nodes over ``x [3, 4]`` and the weight ``w [4, 4]``, with shapes."""
    nodes = [helper.make_node(kind, takes, gives, name=f"node_{gives[0]}", **more) for kind, takes, gives, more in lines]
    ends = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])
    held = [numpy_helper.from_array(W, "w"), numpy_helper.from_array(np.float32(0.1), "limit")]
    graph = helper.make_graph(nodes, "g", [x], ends, held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def scored() -> ir.Model:
    """A score that is a product's own result; its tap, and that of the positions, are read by nothing else."""
    return model(
        ("MatMul", ["x", "w"], ["site0.score"], {}),
        ("Greater", ["site0.score", "limit"], ["site0.keep"], {}),
        ("NonZero", ["site0.keep"], ["site0.index"], {}),
        ("MatMul", ["x", "w"], ["y"], {}),
        outputs={"y": TensorProto.FLOAT},
    )


def run(given: ir.Model, *names: str) -> list[np.ndarray]:
    proto = ir.to_proto(given)
    have = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(list(names), {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)})
    return found


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_score_that_is_a_product_s_own_result_keeps_its_type(precision: str) -> None:
    given = scored()
    retype(given, precision)
    values = {str(v.name): v for node in given.graph for v in node.outputs}
    assert values["site0.score"].dtype == ir.DataType.FLOAT
    assert [str(v.name) for v in given.graph.outputs] == ["y"]
    assert not values["site0.score"].is_graph_output()
    low = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[precision]
    assert {node.outputs[0].dtype for node in given.graph if node.op_type == "MatMul"} == {low}
    if precision == "fp16":  # ONNX Runtime's CPU has no bfloat16
        score, keep, index = run(given, "site0.score", "site0.keep", "site0.index")
        np.testing.assert_array_equal(keep, score > np.float32(0.1))
        np.testing.assert_array_equal(index, np.stack(np.nonzero(keep)))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_product_that_decides_stays_as_it_is(precision: str) -> None:
    given, largest = scored(), {"x": 1.0}
    assert activations(given.graph) == ("x",)
    assert quantise(given, largest, precision) == 1
    kinds = {str(node.outputs[0].name): node.inputs[1] for node in given.graph if node.op_type == "MatMul"}
    assert {name for name, weight in kinds.items() if weight is not None and weight.name == "w"} == {"site0.score"}
    for found, wanted in zip(run(given, "site0.score", "site0.index"), run(scored(), "site0.score", "site0.index"), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_one_weight_read_both_ways_has_a_scale_for_either() -> None:
    def both() -> ir.Model:
        return model(
            ("MatMul", ["x", "w"], ["y"], {}),
            ("Gemm", ["x", "w"], ["z"], {"transB": 1}),
            ("MatMul", ["x", "w"], ["y2"], {}),
            outputs=dict.fromkeys(("y", "z", "y2"), TensorProto.FLOAT),
        )

    given = both()
    assert quantise(given, {"x": 1.0}, "int8") == 3
    assert (
        sum(value.dtype == ir.DataType.INT8 and len(value.shape or ()) == 2 for value in given.graph.initializers.values()) == 2
    )
    for found, wanted in zip(run(given, "y", "z", "y2"), run(both(), "y", "z", "y2"), strict=True):
        assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
