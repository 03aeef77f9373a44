"""What OpenVINO is told before it compiles a graph, and computes wrong without."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from tpcompile.backends import backend

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
