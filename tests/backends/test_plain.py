"""The files load unchanged in the plain runtimes, and each backend's own promises beyond the contract."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from tpcompile.backends import backend
from tpcompile.errors import BackendUnavailable, InputError, UsageError

synthetic = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))


def build(tmp_path: Path, target: str, precision: str = "fp32") -> Path:
    found = backend(target).probe()
    if not found.ok:
        pytest.skip(found.reason)
    out = tmp_path / target
    out.mkdir()
    backend(target).build(synthetic.save(tmp_path / "source"), out, precision)
    return out


def test_plain_onnxruntime(tmp_path: Path) -> None:
    out = build(tmp_path, "onnx")
    import onnxruntime

    plain = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = synthetic.sample(21)
    assert [output.name for output in plain.get_outputs()] == ["logits"]
    np.testing.assert_allclose(plain.run(None, feeds)[0], synthetic.expected(feeds)[0], atol=1e-5)


def test_plain_openvino(tmp_path: Path) -> None:
    out = build(tmp_path, "openvino")
    import openvino

    compiled = openvino.Core().compile_model(out / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    feeds = synthetic.sample(21)
    assert {port.get_any_name() for port in compiled.inputs} == feeds.keys()
    assert [port.get_names() for port in compiled.outputs] == [{"logits"}]
    np.testing.assert_allclose(compiled(feeds)["logits"], synthetic.expected(feeds)[0], atol=1e-5)


def test_openvino_drops_a_dead_tap_and_we_do_not(tmp_path: Path) -> None:
    out = build(tmp_path, "openvino")
    import openvino

    plain = openvino.Core().read_model(out / "openvino_model.xml")
    names = {name for node in plain.get_ops() for port in node.outputs() for name in port.get_names()}
    assert "site0.keep" in names
    assert "site0.index" not in names
    with backend("openvino").open(out, taps=["site0.index"]) as opened:
        assert opened.run(synthetic.sample(6))["site0.index"].size


def test_openvino_weights_are_stored_once(tmp_path: Path) -> None:
    assert sorted(path.name for path in build(tmp_path, "openvino").iterdir()) == [
        "openvino_model.bin",
        "openvino_model.xml",
        "openvino_taps.xml",
    ]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 5e-3)])
def test_openvino_precisions(tmp_path: Path, precision: str, tolerance: float) -> None:
    full = build(tmp_path, "openvino")
    out = tmp_path / precision
    out.mkdir()
    try:
        backend("openvino").build(tmp_path / "source" / "model.onnx", out, precision)
    except BackendUnavailable as error:
        pytest.skip(error.message)
    sizes = [(folder / "openvino_model.bin").stat().st_size for folder in (full, out)]
    assert sizes[1] < sizes[0] if precision == "fp16" else sizes[1] == sizes[0]
    feeds = synthetic.sample(1)
    with backend("openvino").open(out, precision=precision) as opened:
        np.testing.assert_allclose(opened.run(feeds)["logits"], synthetic.expected(feeds)[0], atol=tolerance)


def test_onnx_refuses_reduced_precision(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target onnx has no precision 'bf16'"):
        backend("onnx").open(tmp_path, precision="bf16")


def test_an_input_beyond_a_table_of_the_model_is_an_input_error(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Gather", ["table", "ids"], ["y"])]
    synthetic.few(tmp_path / "model.onnx", {"ids": (onnx.TensorProto.INT64, ["n"])}, nodes, table=np.zeros((4, 2), np.float32))
    with backend("onnx").open(tmp_path) as session:
        assert session.run({"ids": np.array([3])})["y"].shape == (1, 2)
        with pytest.raises(InputError, match=r"cannot compute this input: .*idx=4") as caught:
            session.run({"ids": np.array([4])})
    assert "--dim NAME=MIN:OPT:MAX" in caught.value.fix


def test_what_the_runtime_cannot_do_is_not_laid_to_the_input(tmp_path: Path) -> None:
    """A wrong Reshape of ours, or memory that runs out, is no advice about ``--dim``."""
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    nodes = [onnx.helper.make_node("Reshape", ["x", "sizes"], ["y"])]
    synthetic.few(tmp_path / "model.onnx", {"x": (onnx.TensorProto.FLOAT, ["n"])}, nodes, sizes=np.array([-1, 3]))
    with backend("onnx").open(tmp_path) as session:
        assert session.run({"x": np.zeros(6, np.float32)})["y"].shape == (2, 3)
        with pytest.raises(Fail, match="Reshape"):
            session.run({"x": np.zeros(4, np.float32)})


def test_runtimes_are_not_imported_before_they_are_used() -> None:
    code = "import sys, tpcompile.backends; sys.exit(bool({'onnx', 'onnxruntime', 'openvino', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_openvino_sends_no_usage_reports() -> None:
    code = (
        "import sys; from tpcompile.backends import backend; backend('openvino').probe();"
        "import openvino.tools.ovc as ovc; sys.exit('openvino_telemetry' in type(ovc.telemetry).__module__)"
    )
    if not backend("openvino").probe().ok:
        pytest.skip("openvino cannot be used")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
