"""TensorRT: what the builder is given is exact, what it refuses is told at the user's line, and no plan is read that does not fit."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tpcompile.backends import Extent, backend
from tpcompile.backends.tensorrt import api
from tpcompile.backends.tensorrt.builder import build_plan
from tpcompile.backends.tensorrt.flavours import RTX, TENSORRT, Flavour
from tpcompile.backends.tensorrt.graph import prepare, profile, read
from tpcompile.backends.tensorrt.label import Label, require, require_machine, write
from tpcompile.errors import BackendUnavailable, BuildFailed, IntegrityError, UsageError

synthetic = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))
EXTENT = Extent({"seq": (1, 24, 200)}, ("sm86", "sm89"))
LINE = 'File "vit.py", line 88, in forward\n    kept = scores.topk(k)'
NOTES = {"pkg.torch.onnx.stack_trace": LINE, "pkg.torch.onnx.name_scopes": "['', 'encoder.3', 'top']"}


@pytest.fixture(scope="module")
def rtx() -> Any:
    found = backend("tensorrt-rtx")
    if not found.probe().ok:
        pytest.skip(found.probe().reason)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic graph as tpcompile writes a site: positions from a flat mask, shapes known."""
    proto = synthetic.model()
    nodes = []
    for node in proto.graph.node:
        if node.op_type == "NonZero":
            nodes.append(helper.make_node("Reshape", [node.input[0], "flat"], [f"{node.input[0]}.flat"]))
            node.input[0] += ".flat"
        elif node.input[-1] == "one":
            node.input[-1] = "first"
        node.name = f"node_{node.output[0]}"
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.append(helper.make_tensor("flat", TensorProto.INT64, [1], [-1]))
    proto.graph.initializer.append(helper.make_tensor("first", TensorProto.INT64, [], [0]))
    path = tmp_path_factory.mktemp("source") / "model.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(proto, strict_mode=True), path)
    return path


@pytest.fixture(scope="module")
def built(rtx: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single")
    rtx.build(source, out, "fp32", extent=EXTENT)
    return out


def top_k(count: int) -> onnx.ModelProto:
    """``x [1, 5000]`` -> its ``count`` largest, with the user's line noted."""
    node = helper.make_node("TopK", ["x", "k"], ["y", "i"], name="node_topk")
    for key, value in NOTES.items():
        node.metadata_props.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5000])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, count])
    k = helper.make_tensor("k", TensorProto.INT64, [1], [count])
    return helper.make_model(helper.make_graph([node], "g", [x], [y], [k]), opset_imports=[helper.make_opsetid("", 20)])


def test_a_single_graph_is_built_with_its_taps(built: Path) -> None:
    assert sorted(path.name for path in built.iterdir()) == ["model.plan", "model.plan.json", "taps.plan", "taps.plan.json"]
    label = require(built / "model.plan", "tensorrt-rtx", "fp32")
    assert label.capabilities == EXTENT.capabilities
    assert label.size == (built / "model.plan").stat().st_size > 1000


def test_the_graph_given_to_the_builder_is_exact(rtx: Any, source: Path, tmp_path: Path) -> None:
    """NonZero as branches: every count from one to all, two sites in turn."""
    ir.save(rtx.graph(source, "fp32", EXTENT), tmp_path / "given.onnx")
    onnx.checker.check_model(tmp_path / "given.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "given.onnx", providers=["CPUExecutionProvider"])
    for length, attended in ((1, 0), (13, 0), (13, 13), (200, 200), (200, 3)):
        feeds = synthetic.sample(length, seed=length, attended=attended)
        wanted = synthetic.expected(feeds)[0]
        assert np.abs(session.run(["logits"], feeds)[0] - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize(
    ("capabilities", "precision", "message"),
    [
        (("sm90",), "fp32", "no compute capability 'sm90'"),
        (("sm86", "sm89"), "fp8", "sm86 has no fp8: it comes with sm89"),
        (("sm75",), "fp32", "sm75 has no fp32"),
        ((), "int3", "no precision 'int3'"),
    ],
)
def test_what_no_gpu_has(capabilities: tuple[str, ...], precision: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        backend("tensorrt-rtx").targets(precision, capabilities)
    assert caught.value.exit_code == 2


def test_a_capability_is_chosen_where_there_is_a_choice() -> None:
    assert backend("tensorrt-rtx").targets("fp8", ()) == ("sm89", "sm120")
    for name in ("onnx", "openvino", "tensorrt"):
        assert backend(name).targets("fp32", ()) == ()
        with pytest.raises(UsageError, match=r"capab|builds for the GPU at hand"):
            backend(name).targets("fp32", ["sm89"])


def test_a_count_above_what_topk_takes() -> None:
    with pytest.raises(BuildFailed, match="3841 largest; TensorRT takes 3840") as caught:
        prepare(ir.from_proto(top_k(3841)), RTX, "fp32", EXTENT)
    assert caught.value.exit_code == 7
    assert str(caught.value.where) == "vit.py:88 in forward:  kept = scores.topk(k)   module encoder.3"
    prepare(ir.from_proto(top_k(3840)), RTX, "fp32", EXTENT)


def test_what_the_parser_refuses_is_told_at_the_user_s_line(rtx: Any, tmp_path: Path) -> None:
    proto = top_k(5)
    proto.graph.node[0].op_type = "NoSuchOp"
    (tmp_path / "odd.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(BuildFailed, match=r"refused model\.plan at layer node_topk: NoSuchOp") as caught:
        rtx.build(tmp_path / "odd.onnx", tmp_path, "fp32", extent=EXTENT)
    assert caught.value.where is not None
    assert caught.value.where.line == 88


def test_a_log_line_of_the_builder_is_an_error(rtx: Any, tmp_path: Path) -> None:
    """Attention in float32 parses, and has no kernel: the builder says so in its log alone."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 8, 16]) for name in "qkv"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="node_attention", scale=0.25)
    graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 16])])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    with pytest.raises(BuildFailed, match=r"refused model\.plan.*Attention operation was not supported"):
        build_plan(RTX, model, tmp_path / "model.plan", "fp32", EXTENT)
    assert not list(tmp_path.iterdir())


def test_a_builder_that_dies_takes_nobody_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process really dies; its log's end is in the error."""
    (tmp_path / "dying.py").write_text(
        "import os, sys\n__version__ = '1.7.0'\nclass ILogger:\n    ERROR, WARNING = 1, 2\n"
        "def Builder(log):\n    print('out of registers', file=sys.stderr, flush=True)\n    os.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BuildFailed, match=r"died on model\.plan \(SIGABRT\)(.|\n)*out of registers") as caught:
        build_plan(Flavour("dying", "dying", ((1,), (2,))), ir.from_proto(top_k(5)), tmp_path / "model.plan", "fp32", EXTENT)
    assert caught.value.exit_code == 7


def test_ranges_of_sizes(source: Path) -> None:
    model = read(source)
    assert profile(model, {"seq": (4, 64, 128)})["input_ids"] == ((1, 4), (1, 64), (1, 128))
    with pytest.raises(UsageError, match="input_ids has the size seq, and no range"):
        profile(model, {})


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert not backend("tensorrt-rtx").probe().ok
    with pytest.raises(BackendUnavailable, match="tensorrt_rtx cannot be imported") as caught:
        backend("tensorrt-rtx").build(tmp_path / "none.onnx", tmp_path, "fp32")
    assert (caught.value.exit_code, caught.value.fix) == (3, "pip install 'tpcompile[tensorrt-rtx]'")


@pytest.mark.parametrize("version", ["10.7.0", "12.0.1"])
def test_a_version_nobody_tried(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(BackendUnavailable, match=r"this backend is for 10\.8 up to, not including, 12"):
        TENSORRT.library()


def test_something_else_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script or folder called ``tensorrt`` is no TensorRT; a script beside ``benchmarks/gpu.py`` would stand before the real one."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    assert "this backend is for 10.8" in backend("tensorrt").probe().reason
    scripts = {path.stem for path in (Path(__file__).parents[2] / "benchmarks").iterdir()}
    assert scripts.isdisjoint({TENSORRT.module, RTX.module})


def test_a_plan_that_is_not_what_its_label_says(tmp_path: Path) -> None:
    """No library and no GPU is asked before the file is what it says: exit 9; then version and GPU: exit 3."""
    plan = tmp_path / "model.plan"
    with pytest.raises(BuildFailed, match=r"there is no model\.plan"):
        require(plan, "tensorrt-rtx", "fp32")
    plan.write_bytes(b"plan" * 100)
    label = Label.of(plan, "tensorrt-rtx", "1.7.1", ("sm86", "sm89"), "fp16", captures=True)
    with pytest.raises(IntegrityError, match="no usable label"):
        require(plan, "tensorrt-rtx", "fp16")
    write(plan, label)
    assert require(plan, "tensorrt-rtx", "fp16") == label
    with pytest.raises(UsageError, match="it computes in fp16"):
        require(plan, "tensorrt-rtx", "fp32")
    with pytest.raises(IntegrityError, match="a plan of tensorrt-rtx, not of tensorrt"):
        require(plan, "tensorrt", "fp16")
    for content, message in ((b"plan" * 99, "has 396 bytes, not 400"), (b"plan" * 99 + b"PLAN", "changed after it was built")):
        plan.write_bytes(content)
        with pytest.raises(IntegrityError, match=message) as caught:
            backend("tensorrt-rtx").open(tmp_path, precision="fp16")
        assert caught.value.exit_code == 9
    require_machine(label, "1.7.1", "sm89")
    for version, gpu, message in (
        ("1.8.0", "sm89", "built by tensorrt-rtx 1.7.1; here is 1.8.0"),
        ("1.7.1", "sm90", "this GPU is sm90"),
    ):
        with pytest.raises(BackendUnavailable, match=message) as fault:
            require_machine(label, version, gpu)
        assert fault.value.exit_code == 3


@pytest.mark.parametrize(("flavour", "classes"), [(TENSORRT, {}), (RTX, api.RTX_CLASSES)])
def test_the_library_has_what_is_used_of_it(flavour: Flavour, classes: dict[str, type]) -> None:
    library = pytest.importorskip(flavour.module)
    assert [name for name in api.Library.__annotations__ if not hasattr(library, name)] == []
    for name, protocol in (*api.CLASSES.items(), *classes.items()):
        members = {member for one in protocol.__mro__ for member in vars(one).get("__annotations__", {})}
        assert [member for member in members if not hasattr(getattr(library, name), member)] == [], name
