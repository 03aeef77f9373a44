"""A graph cut at its sites: what crosses, what is computed where, and that the stages together are the graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from expecttest import assert_expected_inline

from tpcompile.backends import backend
from tpcompile.chain import ChainSession
from tpcompile.errors import StageError
from tpcompile.manifest import Manifest, ModelInfo, TensorInfo
from tpcompile.onnx.emit import OnnxModel
from tpcompile.onnx.stages import SHARED, Chain, cut
from tpcompile.spec import TensorSpec

LENGTH, WIDTH = 6, 32
W = np.random.default_rng(0).integers(-3, 4, (WIDTH, WIDTH)).astype(np.float32)
TWO_SITES = """g (float[1,6,32] x, bool[1,6] first) => (float[1,1,32] y, float[1,6,32] z) {
    early = MatMul(x, w)
    skip = Neg(x)
    size = Shape <start = 1, end = 2> (x)
    index0 = tpcompile.Store <rows = [0]> (first, pinned)
    rows0 = tpcompile.Take <batch = 0, dim = 1> (early, index0)
    alive0 = tpcompile.Take <batch = 0, dim = 1> (first, index0)
    unread = tpcompile.Take <batch = 0, dim = 1> (x, index0)
    wide0 = Unsqueeze(alive0, last)
    zero = Sub(rows0, rows0)
    part = Where(wide0, rows0, zero)
    middle = MatMul(part, w)
    sum0 = ReduceSum <keepdims = 0> (middle, last)
    second = Greater(sum0, bound)
    index1 = tpcompile.Store <rows = [0, 3]> (second, alive0)
    rows1 = tpcompile.Take <batch = 0, dim = 1> (middle, index1)
    place1 = Gather <axis = 0> (index1, none)
    place0 = Gather <axis = 0> (index0, none)
    both = Gather <axis = 0> (place0, place1)
    old = Gather <axis = 1> (x, both)
    mixed = Add(rows1, old)
    y = ReduceSum <keepdims = 1> (mixed, one)
    length = Cast <to = 1> (size)
    share = Div(skip, length)
    z = Sub(share, y)
}"""
WEIGHTS: dict[str, Any] = {
    "w": W, "pinned": np.arange(LENGTH)[None] < 1, "bound": np.float32(0),
    "last": np.array([-1]), "one": np.array([1]), "none": np.array(0),
}  # fmt: skip
KINDS = {
    "alive": ("bool", [1, None]), "wide": ("bool", [1, None, 1]), "second": ("bool", [1, None]), "index": ("int64", [1, "u7"]),
    "place": ("int64", [None]), "both": ("int64", [None]), "size": ("int64", [1]), "sum": ("float32", [1, None]),
    "length": ("float32", [1]), "number": ("float32", [1, None]), "total": ("float32", [1, 1]), "y": ("float32", [1, 1, WIDTH]),
    "": ("float32", [1, None, WIDTH]),
}  # fmt: skip
"""First letters of a value's name -> its type, as an exporter knows it."""


def graph(text: str, taps: tuple[str, ...] = ()) -> OnnxModel:
    """A graph with host ops and typed values."""
    signature, body = text.split(" {\n", 1)
    read = {name: np.asarray(value) for name, value in WEIGHTS.items() if f"{name})" in body or f"{name}," in body}
    numbers = {name: ", ".join(map(str, (v * 1 if v.dtype == bool else v).ravel())) for name, v in read.items()}
    shapes = {name: f"[{','.join(map(str, v.shape))}]" if v.ndim else "" for name, v in read.items()}
    held = [f"{v.dtype.name.replace('float32', 'float')}{shapes[n]} {n} = {{{numbers[n]}}}" for n, v in read.items()]
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20, "tpcompile": 1]>\n{signature} <{", ".join(held)}> {{\n{body}'
    )
    for value in (v for node in model.graph for v in node.outputs):
        kind, shape = next(found for letters, found in KINDS.items() if str(value.name).startswith(letters))
        value.dtype, value.shape = ir.DataType.from_numpy(np.dtype(kind)), ir.Shape(shape)
    ports = [*model.graph.inputs, *model.graph.outputs]
    specs = [TensorSpec(str(v.name), "bool" if v.name == "first" else "float32", ()) for v in ports]
    return OnnxModel(model, tuple(specs[:2]), tuple(specs[2:]), taps)


def session(chain: Chain, model: OnnxModel, folder: Path) -> ChainSession:
    """The chain, built and opened."""
    folder.mkdir()
    (folder / "source").mkdir()
    for number, path in enumerate(chain.save(folder / "source")):
        backend("onnx").build(path, folder, "fp32", stage=number)
    manifest = Manifest(
        target="onnx", role="pruned", model=ModelInfo(id="m", family="f", architecture="a", sha256="0" * 64), stages=chain.stages,
        inputs=tuple(map(TensorInfo.of, model.inputs)), outputs=tuple(map(TensorInfo.of, chain.outputs)),
    )  # fmt: skip
    return ChainSession(manifest, [backend("onnx").open(folder, stage=i, threads=1) for i in range(len(chain.models))])


def story(chain: Chain) -> str:
    """What happens, a line a gather, a node or a crossing value."""
    lines, engines = [], iter(chain.models)
    for number, stage in enumerate(chain.stages):
        lines += [f"{step.gives} = {step.op} {step.reads} {step.numbers}".replace("'", "") for step in stage.steps]
        if stage.outputs:
            nodes = [f"{node.op_type}:{node.outputs[0].name}" for node in next(engines).model.graph]
            lines.append(f"stage {number} reads {', '.join(t.name for t in stage.inputs)}")
            lines += [f"  {' '.join(nodes)}", f"  gives {', '.join(t.name for t in stage.outputs)}"]
    return "\n".join(lines) + "\n"


def test_what_is_computed_where() -> None:
    """``skip``, ``size`` and what follows wait for the last stage, since ``x`` travels there; ``unread`` is not gathered at all."""
    assert_expected_inline(
        story(cut(graph(TWO_SITES))),
        """\
stage 0 reads x
  Identity:pinned.given MatMul:early
  gives pinned.given, early
index0 = store (first, pinned.given) (0,)
rows0 = take (early, index0) (0, 1)
alive0 = take (first, index0) (0, 1)
place0 = row (index0,) (0, 0)
stage 1 reads alive0, rows0
  Unsqueeze:wide0 Sub:zero Where:part MatMul:middle ReduceSum:sum0 Greater:second
  gives middle, second
index1 = store (second, alive0) (0, 3)
rows1 = take (middle, index1) (0, 1)
place1 = row (index1,) (0, 0)
both = gather (place0, place1) (0,)
old = gather (x, both) (1,)
stage 2 reads x, rows1, old
  Neg:skip Shape:size Add:mixed ReduceSum:y Cast:length Div:share Sub:z
  gives y, z
""",
    )


def test_the_stages_together_are_the_graph(tmp_path: Path) -> None:
    model = graph(TWO_SITES, taps=("index1", "second"))
    x = np.random.default_rng(1).standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
    first = np.array([[False, True, True, False, True, True]])
    with session(cut(model), model, tmp_path / "out") as chain:
        got = chain.tapped(("index1", "second")).run({"x": x, "first": first})
    alive = np.array([0, 1, 2, 4, 5])
    middle = np.where(first[0, alive][:, None], (x @ W)[0, alive], 0) @ W
    second = middle.sum(-1) > 0
    needed = np.flatnonzero(second | first[0, alive])
    assert got["second"][0].tolist() == second.tolist()
    assert got["index1"][0, : len(needed)].tolist() == needed.tolist()
    stored = got["index1"][0]
    want = (middle[stored] + x[0, alive[stored]]).sum(0)
    np.testing.assert_allclose(got["y"][0, 0], want, atol=1e-4)
    np.testing.assert_allclose(got["z"], -x / LENGTH - want, atol=1e-4)


def test_a_weight_that_two_stages_read_is_stored_once(tmp_path: Path) -> None:
    chain = cut(graph(TWO_SITES))
    paths = chain.save(tmp_path)
    assert [path.name for path in paths] == ["stage0.onnx", "stage1.onnx", "stage2.onnx"]
    assert [path.stat().st_size < 4000 for path in paths] == [True] * 3
    assert (tmp_path / SHARED).stat().st_size == W.nbytes
    read = [ir.load(path).graph.initializers.get("w") for path in paths]
    for one in read[:2]:
        assert one is not None
        assert one.const_value is not None
        np.testing.assert_array_equal(one.const_value.numpy(), W)
    assert read[2] is None


def test_what_stands_behind_the_last_stage_needs_no_engine() -> None:
    chain = cut(graph("""g (float[1,6,32] x, bool[1,6] first) => (float[1,k,32] rows) {
    other = Neg(x)
    index0 = tpcompile.Store <rows = [4]> (first, first)
    rows = tpcompile.Take <batch = 0, dim = 1> (other, index0)
}"""))  # fmt: skip
    assert story(chain) == (
        "stage 0 reads x\n  Neg:other\n  gives other\nindex0 = store (first, first) (4,)\nrows = take (other, index0) (0, 1)\n"
    )


def test_rows_that_a_later_stage_computes_are_gathered_behind_it() -> None:
    """The host's own gather is never left to a stage: it waits for the next cut."""
    chain = cut(graph("""g (float[1,6,32] x, bool[1,6] first) => (float[1,k,32] rows) {
    index0 = tpcompile.Store <rows = [0]> (first, first)
    alive0 = tpcompile.Take <batch = 0, dim = 1> (first, index0)
    number = Cast <to = 1> (alive0)
    total = ReduceSum <keepdims = 1> (number, one)
    all = Mul(x, total)
    rows = tpcompile.Take <batch = 0, dim = 1> (all, index0)
}"""))  # fmt: skip
    assert [[step.gives for step in stage.steps] for stage in chain.stages] == [["index0", "alive0"], ["rows"]]


def test_a_value_of_unknown_type_is_refused() -> None:
    model = graph(TWO_SITES)
    next(node for node in model.model.graph if node.op_type == "MatMul").outputs[0].type = None
    with pytest.raises(StageError) as caught:
        cut(model)
    assert str(caught.value) == (
        "early crosses a cut, and its type is not known\n  fix     export with form single, and report this model"
    )
