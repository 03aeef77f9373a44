"""What is profiled is the engine that is timed."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tpcompile.backends.onnxruntime import OnnxRuntime


def test_onnx_runtime_profiles_the_graph_that_it_times(tmp_path: Path) -> None:
    """A sum and a norm: one kernel by its own rules, two in our sessions (decision 0016)."""
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"], name="add"),
        helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["z"], name="norm"),
    ]
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n", 8]) for name in "xyz")
    weights = [onnx.numpy_helper.from_array(np.ones(8, dtype=np.float32), name) for name in ("scale", "bias")]
    graph = helper.make_graph(nodes, "g", [x, y], [z], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")
    session = OnnxRuntime().profile(tmp_path)
    rows = np.arange(24, dtype=np.float32).reshape(1, 3, 8)
    for _ in range(2):
        session.run({"x": rows, "y": rows})
    assert [(op.name, op.kind) for op in session.ops(after=1)] == [("add", "Add"), ("norm", "LayerNormalization")]
