"""Rows written as matrices: which ops become which, what stays, and that runtimes compute the same by it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.onnx.emit import emit
from tpcompile.onnx.flat import flatten_rows

WIDTH = 8


class Block(nn.Module):
    """Two linear layers with what stands between them, as ``body`` says."""

    def __init__(self, body: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.plain = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm, self.body = nn.LayerNorm(WIDTH), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def mlp(block: Block, x: Tensor) -> Tensor:
    return x + block.down(nn.functional.gelu(block.up(block.norm(x))))


def gathered(block: Block, x: Tensor) -> Tensor:
    hidden = block.norm(block.down(block.up(x)))
    kept: Tensor = block.down(block.up(hidden.index_select(1, torch.tensor([2, 0]))))
    return kept


def heads(block: Block, x: Tensor) -> Tensor:
    q = block.down(block.up(x)).view(1, -1, 2, WIDTH // 2).transpose(1, 2)
    return block.plain(q.transpose(1, 2).reshape(1, -1, WIDTH))


def looked_at(block: Block, x: Tensor) -> Tensor:
    return (block.down(block.up(x)) * torch.ones(1, 1, WIDTH)).cumsum(1)


def without_bias(block: Block, x: Tensor) -> Tensor:
    return block.plain(x).cumsum(1)


def emitted(body: Callable[[Block, Tensor], Tensor], batch: int = 1) -> tuple[nn.Module, ir.Model]:
    model = Block(body).eval()
    x = torch.randn(batch, 5, WIDTH)
    return model, emit(capture(model, {"x": x}, {"x": {1: "seq"}} if batch == 1 else {"x": {0: "batch", 1: "seq"}})).model


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (mlp, {"Gemm": 2, "Reshape": 3, "LayerNormalization": 1, "Gelu": 1, "Add": 1}),
        (gathered, {"Gemm": 4, "Reshape": 2, "LayerNormalization": 1, "Gather": 1}),
        (heads, {"Gemm": 2, "Reshape": 3, "Add": 0, "MatMul": 1}),
        (looked_at, {"Gemm": 2, "Reshape": 3, "Mul": 1, "CumSum": 1}),
        (without_bias, {"MatMul": 1, "CumSum": 1}),
    ],
)
def test_reshapes_stand_around_linear_layers_and_not_between_them(
    body: Callable[[Block, Tensor], Tensor], expected: dict[str, int]
) -> None:
    _, model = emitted(body)
    flatten_rows(model)
    assert {kind: ops(model)[kind] for kind in expected} == expected
    assert ops(model)["Reshape"] == expected.get("Reshape", 0)


@pytest.mark.parametrize("body", [mlp, gathered, heads, looked_at, without_bias])
def test_the_runtime_computes_the_same(body: Callable[[Block, Tensor], Tensor], tmp_path: Path) -> None:
    eager, model = emitted(body)
    flatten_rows(model)
    ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for length in (1, 4, 9) if body is not gathered else (3, 9):
        x = torch.randn(1, length, WIDTH)
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], eager(x).detach().numpy(), atol=2e-6)


def test_a_part_of_a_weight_is_a_weight() -> None:
    """The exporter leaves parts of large weights as ops on the whole; runtimes compute them once."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
        g (float[1, n, 8] x) => (float[1, n, 8] y)
        <float[8] b = {0, 1, 2, 3, 4, 5, 6, 7}, int64[1] from = {8}, int64[1] to = {16}, int64[1] axis = {0}> {
            part = Slice (w, from, to, axis)
            turned = Transpose <perm = [1, 0]> (part)
            product = MatMul (x, turned)
            y = Add (product, b)
        }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((16, WIDTH), dtype=np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    flatten_rows(model)
    assert {kind: ops(model)[kind] for kind in ("Gemm", "MatMul", "Add")} == {"Gemm": 1, "MatMul": 0, "Add": 0}
    x = np.random.default_rng(1).standard_normal((1, 5, WIDTH), dtype=np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight[8:].T + np.arange(8, dtype=np.float32), atol=2e-6)


def test_heads_are_read_from_the_matrix() -> None:
    _, model = emitted(heads)
    flatten_rows(model)
    producer = next(node for node in model.graph if node.outputs[0].name == "view").inputs[0].producer()
    assert producer is not None
    assert producer.op_type == "Gemm"


def test_values_keep_their_names_and_outputs_their_shape() -> None:
    _, model = emitted(mlp)
    names = [value.name for node in model.graph for value in node.outputs if not str(value.name).startswith("val_")]
    shape = model.graph.outputs[0].shape
    flatten_rows(model)
    assert set(names) <= {value.name for node in model.graph for value in node.outputs}
    assert model.graph.outputs[0].shape == shape


def test_several_samples_stay_as_they_are() -> None:
    _, model = emitted(mlp, batch=2)
    before = ops(model)
    assert flatten_rows(model) == 0
    assert ops(model) == before
