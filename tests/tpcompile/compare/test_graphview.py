"""Graphs as diff and bisect see them: what is read of ONNX and OpenVINO files, and what is refused."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tpcompile.backends import backend
from tpcompile.compare.graphview import is_anonymous, literal, read_graph
from tpcompile.errors import ModelError, UsageError

synthetic = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "backends" / "synthetic.py")))


def save(path: Path, nodes: list[onnx.NodeProto], *weights: onnx.TensorProto) -> Path:
    """A file with x float32 [1, n, 2] -> y."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n", 2]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], list(weights))
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
    return path


def tensor(name: str, *values: float) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.float32), name)


@pytest.mark.parametrize("name", ["val_12", "Constant_3", "", "17", "onnx::MatMul_90", "scalar_tensor_default_1", "60:2"])
def test_names_that_were_counted_out(name: str) -> None:
    assert is_anonymous(name)


@pytest.mark.parametrize("name", ["linear_7", "site0.keep", "val_loss", "logits", "blocks.0.weight"])
def test_names_of_the_programs_own(name: str) -> None:
    assert not is_anonymous(name)


def test_a_small_constant_is_shown_exactly() -> None:
    assert literal(np.array([[1, 0], [2, 3]])) == "=[[1, 0], [2, 3]]"
    assert literal(np.float32(0.1)) == "=0.100000001"
    assert literal(np.array([True])) == "=[True]"


def test_an_onnx_file(tmp_path: Path) -> None:
    note = {"pkg.torch.onnx.name_scopes": "['', 'captured', 'captured.blocks.0', 'mul']"}
    note["pkg.torch.onnx.stack_trace"] = 'File "/home/me/vit.py", line 12, in forward\n    return x * self.w'
    mul = helper.make_node("Mul", ["x", "captured.blocks.0.w"], ["mul"])
    for key, value in note.items():
        mul.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    nodes = [
        mul,
        helper.make_node("Constant", [], ["val_0"], value=tensor("", 2.0)),
        helper.make_node("Softmax", ["mul"], ["val_1"], axis=-1),
        helper.make_node("Add", ["val_1", "val_0"], ["y"]),
    ]
    found = read_graph(save(tmp_path / "model.onnx", nodes, tensor("captured.blocks.0.w", 3.0, 4.0)))
    assert [(op.kind, op.detail, op.inputs) for op in found.ops] == [
        ("Mul", "", ("x", "captured.blocks.0.w")), ("Softmax", "axis=-1", ("mul",)), ("Add", "", ("val_1", "=[2]")),
    ]  # fmt: skip
    assert (found.ops[0].where.module, found.ops[0].where.short) == ("blocks.0", "vit.py:12")
    assert found.values == {"mul": "mul", "y": "y"}
    assert found.interface == {"input x": "float32[1, n, 2]", "output y": "float32[1, n, 2]"}
    (weight,) = found.weights.values()
    assert (weight.name, weight.dtype, weight.shape, weight.read().tolist()) == ("blocks.0.w", "float32", (2,), [3.0, 4.0])


def test_a_weight_without_a_name_is_called_after_its_reader(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((3, 4), dtype=np.float32), "val_7")
    nodes = [helper.make_node("MatMul", ["x", "val_7"], ["hidden"]), helper.make_node("Relu", ["hidden"], ["y"])]
    (found,) = read_graph(save(tmp_path / "model.onnx", nodes, weight)).weights.values()
    assert found.name == "an unnamed MatMul[1]"


def test_openvino_files_say_the_same(tmp_path: Path) -> None:
    runtime = backend("openvino")
    if not runtime.probe().ok:
        pytest.skip(runtime.probe().reason)
    runtime.build(synthetic.save(tmp_path / "source"), tmp_path, "fp32")
    found = read_graph(tmp_path / "openvino_taps.xml")
    assert found.inputs == ("input_ids", "attention_mask")
    assert set(found.outputs) == {"logits", *synthetic.TAPS}
    assert {"column0", "x1", "m1", "logits"} <= found.values.keys()
    weight = next(w for w in found.weights.values() if w.name.startswith("x1 MatMul"))
    original = {w.name: numpy_helper.to_array(w) for w in synthetic.model().graph.initializer}["weight"]
    assert any(np.array_equal(weight.read(), one) for one in (original, original.T))
    assert read_graph(tmp_path / "openvino_model.xml").outputs == ("logits",)


def read_all(path: Path) -> list[object]:
    """A graph's weights, read."""
    return [weight.read() for weight in read_graph(path).weights.values()]


def refused(path: Path, text: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_all(path)
    assert text in caught.value.message
    assert caught.value.fix


def test_a_malformed_onnx_file(tmp_path: Path) -> None:
    whole = synthetic.model().SerializeToString()
    for name, content in {"text": b"no model at all", "cut": whole[: len(whole) // 2]}.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
        refused(tmp_path / f"{name}.onnx", "cannot be read as a graph")


def test_a_weight_whose_bytes_are_missing(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((3, 4), dtype=np.float32), "w")
    weight.raw_data = weight.raw_data[:20]
    refused(save(tmp_path / "model.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], weight), "w cannot be read")


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "link"])
def test_data_outside_the_folder_is_not_opened(place: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 48)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    weight.external_data.append(onnx.StringStringEntryProto(key="location", value=place))
    refused(save(folder / "model.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], weight), "w lies outside")


XML = '<net><layers><layer id="0" name="c" type="Const"><data element_type="f32" shape="9" offset="{}" size="36"/>{}</layer></layers></net>'
PORT = '<output><port id="0"><dim>9</dim></port></output>'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<net", "cannot be read as a graph"),
        ('<!DOCTYPE n [<!ENTITY a "b">]><net/>', "declares XML entities"),
        (XML.format(8, PORT), "c reaches beyond openvino_model.bin"),
        (XML.format(-4, PORT), "c reaches beyond openvino_model.bin"),
        (XML.format(0, PORT).replace("9", "8"), "36 bytes are no float32 of [8]"),
        (XML.format("x", PORT), "cannot be read as a graph"),
        (XML.format(0, PORT).replace("<data", "<date"), "c has no data"),
        (XML.format(0, PORT).replace("Const", "Result"), "cannot be read as a graph"),
    ],
)
def test_a_malformed_openvino_file(content: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "openvino_model.bin").write_bytes(b"\0" * 40)
    (tmp_path / "openvino_model.xml").write_text(content, encoding="utf-8")
    refused(tmp_path / "openvino_model.xml", text)


def test_no_graph(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path / "weights.bin"):
        with pytest.raises(UsageError):
            read_graph(path)
