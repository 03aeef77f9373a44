"""What OpenVINO is told before it compiles a graph, and computes wrong without."""

import math
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from tpcompile.backends import backend
from tpcompile.backends.settle import settle

synthetic = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))

node = onnx.helper.make_node
FORMS = {
    "1 / x": [node("Div", ["one", "x"], ["q"])],
    "c / x": [node("Div", ["c", "x"], ["q"])],
    "c * (1 / x)": [node("Reciprocal", ["x"], ["r"]), node("Mul", ["c", "r"], ["q"])],
    "x ** -1 * c * c": [node("Pow", ["x", "minus"], ["r"]), node("Mul", ["r", "c"], ["p"]), node("Mul", ["p", "c"], ["q"])],
}
WANTED = {"1 / x": 1.0, "c / x": 3.0, "c * (1 / x)": 3.0, "x ** -1 * c * c": 9.0}


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_is_divided_by_a_sum_in_front_of_a_count(form: str, tmp_path: Path) -> None:
    """The plugin computes ``x / c`` there: the largest ``v * q`` that are above 0.4, and one at least, are other numbers then."""
    found = backend("openvino").probe()
    if not found.ok:
        pytest.skip(found.reason)
    nodes = [
        node("ReduceSum", ["v", "axis"], ["sum"], keepdims=1),
        node("Add", ["sum", "one"], ["x"]),
        *FORMS[form],
        node("Mul", ["v", "q"], ["scaled"]),
        node("Greater", ["scaled", "threshold"], ["above"]),
        node("Cast", ["above"], ["bits"], to=onnx.TensorProto.INT64),
        node("ReduceSum", ["bits"], ["count"], keepdims=0),
        node("Max", ["count", "least"], ["most"]),
        node("Reshape", ["most", "axis"], ["k"]),
        node("TopK", ["scaled", "k"], ["y", "index"], axis=1),
    ]
    constants = {"one": np.float32(1), "c": np.float32(3), "minus": np.float32(-1), "threshold": np.float32(0.4)}
    model = synthetic.few(
        tmp_path / "few.onnx",
        {"v": (onnx.TensorProto.FLOAT, [1, "n"])},
        nodes,
        axis=np.array([1]),
        least=np.int64(1),
        **constants,
    )
    backend("openvino").build(model, tmp_path, "fp32")
    with backend("openvino").open(tmp_path) as session:
        for row in ([1.0, 2, 9], [4.0, 5, 6, 7, 0.5]):
            v = np.array([row], np.float32)
            scaled = np.sort(v * np.float32(WANTED[form] / (v.sum() + 1)))[:, ::-1]
            np.testing.assert_allclose(session.run({"v": v})["y"], scaled[:, : max(1, (scaled > 0.4).sum())], rtol=1e-6)


ERF = np.vectorize(math.erf)
GELUS = {
    "erf": (node("Gelu", ["p"], ["a"]), lambda x: x / 2 * (1 + ERF(x / np.sqrt(2)))),
    "tanh": (
        node("Gelu", ["p"], ["a"], approximate="tanh"),
        lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
}


def built(nodes: list[onnx.NodeProto], folder: Path, precision: str, **weights: np.ndarray) -> list[str]:
    """Build a model of ``x [1, n, 8]``, and list the kinds of its ops."""
    found = backend("openvino").probe()
    if not found.ok:
        pytest.skip(found.reason)
    model = synthetic.few(folder / "few.onnx", {"x": (onnx.TensorProto.FLOAT, [1, "n", 8])}, nodes, **weights)
    backend("openvino").build(model, folder, precision)
    return [layer.get("type", "") for layer in ET.parse(folder / "openvino_model.xml").iter("layer")]


def run(folder: Path, x: np.ndarray) -> np.ndarray:
    with backend("openvino").open(folder) as session:
        found: np.ndarray = session.run({"x": x})["y"]
    return found


@pytest.mark.parametrize("kind", GELUS)
def test_gelu_is_not_joined_to_a_product_in_float32(kind: str, tmp_path: Path) -> None:
    activation, reference = GELUS[kind]
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("w", "v")} | {"b": np.ones(8, np.float32)}
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Add", ["m", "b"], ["p"]),
        activation,
        node("MatMul", ["a", "v"], ["y"]),
    ]
    assert "Gelu" not in built(nodes, tmp_path, "fp32", **weights)
    for n in (1, 3, 40):
        x = rng.standard_normal((1, n, 8)).astype(np.float32)
        expected = reference(x.astype(np.float64) @ weights["w"] + 1) @ weights["v"]
        np.testing.assert_allclose(run(tmp_path, x), expected, atol=1e-5)


def test_a_scale_of_logits_goes_into_the_weights_of_the_queries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("q", "k")}
    nodes = [
        node("MatMul", ["x", "q"], ["queries"]),
        node("Reshape", ["queries", "heads"], ["split"]),
        node("Transpose", ["split"], ["turned"], perm=[0, 2, 1, 3]),
        node("MatMul", ["x", "k"], ["keys"]),
        node("Reshape", ["keys", "heads"], ["others"]),
        node("Transpose", ["others"], ["columns"], perm=[0, 2, 3, 1]),
        node("MatMul", ["turned", "columns"], ["logits"]),
        node("Mul", ["logits", "scale"], ["scaled"]),
        node("Softmax", ["scaled"], ["y"]),
    ]
    constants = {"heads": np.array([0, -1, 2, 4]), "scale": np.float32(0.3), **weights}
    assert "Multiply" not in built(nodes, tmp_path, "fp32", **constants)
    x = rng.standard_normal((1, 5, 8)).astype(np.float32)
    q, k = ((x.astype(np.float64) @ weights[name]).reshape(5, 2, 4).swapaxes(0, 1) for name in ("q", "k"))
    powers = np.exp(0.3 * q @ k.swapaxes(1, 2))
    np.testing.assert_allclose(run(tmp_path, x)[0], powers / powers.sum(-1, keepdims=True), atol=1e-5)


def test_a_product_that_something_else_reads_keeps_its_scale_outside(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    nodes = [
        node("MatMul", ["x", "w"], ["p"]),
        node("Mul", ["p", "scale"], ["s"]),
        node("Concat", ["p", "s"], ["y"], axis=-1),
    ]
    assert "Multiply" in built(nodes, tmp_path, "fp32", w=w, scale=np.float32(0.3))
    x = np.ones((1, 3, 8), np.float32)
    np.testing.assert_allclose(run(tmp_path, x), np.concatenate([x @ w, 0.3 * (x @ w)], axis=-1), atol=1e-5)


def test_in_bfloat16_products_take_their_activations_along(tmp_path: Path) -> None:
    """There the kernel is the same either way, and a pass over the rows less."""
    openvino = pytest.importorskip("openvino")
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Gelu", ["p"], ["y"])]
    inputs = {"x": (onnx.TensorProto.FLOAT, [1, "n", 8])}
    model = synthetic.few(tmp_path / "few.onnx", inputs, nodes, w=np.ones((8, 8), np.float32))
    for computed, stays in (("bf16", True), ("f32", False)):
        graph = openvino.convert_model(model)
        settle(graph, computed)
        assert ("Gelu" in {one.get_type_name() for one in graph.get_ops()}) is stays
