"""Program -> ONNX: what is in the graph, and what runtimes make of it."""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
import torch
from onnxscript import rewriter
from torch import Tensor, nn
from torch.onnx._internal.fx.passes import type_promotion

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.onnx.emit import OnnxModel, emit, hastened, save
from tpcompile.passes import DEFAULT, Canonicalize, Mark, Pipeline, Place
from tpcompile.program import Program
from tpcompile.spec import TensorSpec

WIDTH, HEADS = 8, 2


class Block(nn.Module):
    """LTP's form: attention under a key mask, dead rows zeroed, a site by received attention, a feed-forward."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, HEADS, WIDTH // HEADS).transpose(1, 2) for part in self.qkv)
        logits = q @ k.transpose(-1, -2) / 2.0 + torch.where(alive, 0.0, -1e4)[:, None, None, :]
        p = logits.softmax(-1) * alive[:, None, :, None]
        x = self.norm(x + self.out((p @ v).transpose(1, 2).reshape(b, n, WIDTH)))
        score = p.sum((1, 2))
        alive = alive & (score >= self.threshold)
        x = ops.prune(x, alive, score)
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x)))), alive


class Model(nn.Module):
    def __init__(self, *thresholds: float) -> None:
        super().__init__()
        self.table = nn.Embedding(30, WIDTH)
        self.blocks = nn.ModuleList(Block(t) for t in thresholds)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x, alive = self.table(input_ids), attention_mask.to(torch.bool)
        for block in self.blocks:
            x, alive = block(x, alive)
        weight = alive.unsqueeze(-1).to(x.dtype)
        return {"pooled": (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9), "first": torch.tanh(x[:, 0])}


def sample(length: int, attended: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = (torch.arange(length) < (length if attended is None else attended)).to(torch.int64)
    return {"input_ids": torch.randint(0, 30, (1, length), generator=generator), "attention_mask": mask.unsqueeze(0)}


def build(*thresholds: float) -> tuple[Model, Program]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Model(*thresholds).eval()
        for block in model.blocks:
            nn.init.normal_(block.qkv[0].weight, std=1.0)
            nn.init.normal_(block.qkv[1].weight, std=1.0)
    inputs = sample(6)
    return model, capture(model, inputs, {name: {1: "seq"} for name in inputs}, {"seq": (2, 64)})


@pytest.fixture(scope="module")
def built() -> tuple[Model, Program, OnnxModel, OnnxModel]:
    """A model of two sites: itself, its gathered program, that as ONNX, and its masked form as ONNX."""
    model, captured = build(0.8, 0.9)
    compact = DEFAULT(captured)
    masked = Pipeline((Canonicalize(), Mark(), Place()))(captured)
    return model, compact, emit(compact), emit(masked)


def proto(model: OnnxModel, tmp_path: Path, taps: tuple[str, ...] = ()) -> onnx.ModelProto:
    """The saved file, its taps as further outputs."""
    model.save(tmp_path / "model.onnx")
    loaded = onnx.load(tmp_path / "model.onnx")
    loaded.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in taps)
    return loaded


Run = Callable[[dict[str, Tensor]], dict[str, np.ndarray]]


def session(model: OnnxModel, tmp_path: Path, taps: tuple[str, ...] = ()) -> Run:
    opened = onnxruntime.InferenceSession(proto(model, tmp_path, taps).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in opened.get_outputs()]
    return lambda feeds: dict(zip(names, opened.run(None, {k: v.numpy() for k, v in feeds.items()}), strict=True))


def reference(model: OnnxModel, tmp_path: Path) -> Run:
    evaluator = onnx.reference.ReferenceEvaluator(proto(model, tmp_path))
    names = [output.name for output in model.outputs]
    return lambda feeds: dict(zip(names, evaluator.run(None, {k: v.numpy() for k, v in feeds.items()}), strict=True))


def close(got: dict[str, np.ndarray], want: dict[str, Tensor]) -> bool:
    """The law: within 1e-5 of the largest masked value."""
    return all(np.abs(got[name] - v.numpy()).max() <= 1e-5 * max(1.0, v.abs().max().item()) for name, v in want.items())


CASES = [(2, None), (3, None), (9, None), (20, 13), (40, 40), (5, 1), (7, 0)]


@pytest.mark.parametrize("form", [2, 3], ids=["compact", "masked"])
def test_runs_in_onnxruntime(built: tuple[Any, ...], tmp_path: Path, form: int) -> None:
    run = session(built[form], tmp_path)
    with torch.no_grad():
        assert all(close(run(sample(*case)), built[0](**sample(*case))) for case in CASES)


@pytest.mark.parametrize("form", [2, 3], ids=["compact", "masked"])
def test_runs_in_the_reference_evaluator(built: tuple[Any, ...], tmp_path: Path, form: int) -> None:
    run = reference(built[form], tmp_path)
    with torch.no_grad():
        assert all(close(run(sample(*case)), built[0](**sample(*case))) for case in CASES)


def test_passes_the_full_check(built: tuple[Any, ...], tmp_path: Path) -> None:
    for model in built[2:]:
        onnx.checker.check_model(proto(model, tmp_path), full_check=True)


def test_taps_are_what_the_sites_decided(built: tuple[Any, ...], tmp_path: Path) -> None:
    _, program, compact, masked = built
    names = tuple(f"site{i}.{kind}" for i in range(2) for kind in ("keep", "score", "index"))
    assert compact.taps == names
    assert masked.taps == (*(name for name in names if "index" not in name), "bound0")  # the one softmax behind a site
    gathered, full = session(compact, tmp_path, compact.taps), session(masked, tmp_path, masked.taps)
    for case in CASES:
        got, want, trace = gathered(sample(*case)), full(sample(*case)), program.trace(**sample(*case))
        stored = np.arange(case[0])
        for i in range(2):
            keep = got[f"site{i}.keep"]
            assert keep.dtype == np.bool_
            assert got[f"site{i}.score"].shape == keep.shape
            assert np.array_equal(stored[keep[0]], np.flatnonzero(want[f"site{i}.keep"][0]))
            index = trace.index[i]
            assert index is not None
            count = got[f"site{i}.index"].shape[1]
            assert np.array_equal(got[f"site{i}.index"], index.numpy()[:, :count])  # eager may store one filler behind
            stored = stored[got[f"site{i}.index"][0]]


def test_a_single_token_is_stored_when_all_are_dropped(tmp_path: Path) -> None:
    model, captured = build(1e6, 1e6)
    compact = emit(DEFAULT(captured))
    run = session(compact, tmp_path, compact.taps)
    for length in (2, 9):
        got = run(sample(length))
        assert got["site0.index"].tolist() == got["site1.index"].tolist() == [[0]]
        assert not got["site0.keep"].any()
        with torch.no_grad():
            assert close(got, model(**sample(length)))


def test_the_graph_is_small(built: tuple[Any, ...]) -> None:
    counts = Counter(node.op_type for node in built[2].model.graph)
    assert counts["NonZero"] == 2
    assert (counts["LayerNormalization"], counts["Gelu"], counts["Softmax"]) == (4, 2, 2)
    assert not counts.keys() & {"If", "Loop", "Scan", "Identity", "ScatterElements", "ScatterND", "Expand"}
    assert [f.name for f in built[2].model.functions.values()] == []


def test_shapes_are_constants(built: tuple[Any, ...]) -> None:
    graph = built[2].model.graph
    for node in graph:
        if node.op_type == "Reshape":
            shape = node.inputs[1]
            assert shape.is_initializer() or shape.producer().op_type == "Constant", node.name
    assert "Concat" not in Counter(node.op_type for node in graph)
    assert Counter(node.op_type for node in graph)["Shape"] <= 1  # the prefix that is always stored


def test_the_interface_is_named(built: tuple[Any, ...]) -> None:
    _, _, compact, masked = built
    inputs = (TensorSpec("input_ids", "int64", (1, "seq")), TensorSpec("attention_mask", "int64", (1, "seq")))
    for model in (compact, masked):
        assert model.inputs == inputs
        assert [tuple(v.shape) for v in model.model.graph.inputs] == [(1, "seq")] * 2
        assert model.outputs == (TensorSpec("pooled", "float32", (1, WIDTH)), TensorSpec("first", "float32", (1, WIDTH)))
        assert model.model.opset_imports[""] == 23


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        emit(DEFAULT(build(0.8)[1])).save(tmp_path / name)
    written = (tmp_path / "a.onnx").read_bytes()
    assert written == (tmp_path / "b.onnx").read_bytes()
    assert Path(__file__).name.encode() in written  # the user's line, but nothing of the machine it lies on
    assert str(Path(__file__).parents[3]).encode() not in written


class Mixed(nn.Module):
    """Numbers of several types meet: integers with floats, truth values with integers."""

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        alive = ids > 2
        return {"mean": (x * ids + 1).sum(1) / alive.sum(1), "share": (ids + alive).sqrt() * 2, "whole": ids.sum() / 3}


def test_what_torch_is_kept_from_computing_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"x": torch.rand(1, 6), "ids": torch.arange(6).reshape(1, 6)}
    program = Canonicalize()(capture(Mixed().eval(), given, {name: {1: "n"} for name in given}, {"n": (2, 64)}))
    quick = ir.to_proto(emit(program).model).SerializeToString(deterministic=True)
    monkeypatch.setattr("tpcompile.onnx.emit.hastened", contextlib.nullcontext)
    assert quick == ir.to_proto(emit(program).model).SerializeToString(deterministic=True)


SLICED = """<ir_version: 10, opset_import: ["" : 20]> halves (float[2, 8] x) => (float[2, 4] y)
<int64[1] start = {0}, int64[1] middle = {4}, int64[1] stop = {8}, int64[1] axis = {1}> {
    last = Slice (x, middle, stop, axis)
    first = Slice (x, start, middle, axis)
    y = Add (first, last)
}"""


def test_rules_that_look_for_two_nodes_find_them() -> None:
    with hastened():
        found = rewriter.rewrite(ir.from_onnx_text(SLICED))
    assert [node.op_type for node in found.graph] == ["Split", "Add"]
    assert str(found) == str(rewriter.rewrite(ir.from_onnx_text(SLICED)))


def test_exports_that_overlap_leave_torch_as_it_was() -> None:
    own = type_promotion._TypePromotionInterpreter
    first, second = hastened(), hastened()
    for step in (first.__enter__, second.__enter__):
        step()
    assert type_promotion._TypePromotionInterpreter is not own
    for one in (first, second):
        one.__exit__(None, None, None)
    assert type_promotion._TypePromotionInterpreter is own


def test_heavy_weights_lie_beside_the_file(built: tuple[Any, ...], tmp_path: Path) -> None:
    save(built[2].model, tmp_path / "model.onnx", limit=100)
    assert (tmp_path / "model.onnx.data").stat().st_size > 1000
    opened = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in opened.get_outputs()] == ["pooled", "first"]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.table(input_ids).sum(1) + attention_mask.sum(1)}


def test_an_output_may_be_named_like_an_op() -> None:
    inputs = sample(6)
    model = emit(capture(Named().eval(), inputs, {name: {1: "seq"} for name in inputs}))
    assert [output.name for output in model.outputs] == ["embedding"]


class Sizes(nn.Module):
    """Numbers that follow from the length: half rounded up, what is left to a multiple of four, a share."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        counts = (-(-n // 2), -n % 4, (n - 9) // 4, n // 3)
        return torch.stack([x.new_zeros(()) + count for count in counts])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_sizes_are_divided_as_python_does(runtime: str, tmp_path: Path) -> None:
    """torch.onnx's own floor division rounds towards zero."""
    model = Sizes().eval()
    emit(capture(model, {"x": torch.zeros(1, 7, 2)}, {"x": {1: "n"}}, {"n": (2, 64)})).save(tmp_path / "model.onnx")
    if runtime == "onnxruntime":
        opened = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        run: Callable[[np.ndarray], np.ndarray] = lambda x: opened.run(None, {"x": x})[0]  # noqa: E731
    else:
        compiled = openvino.compile_model(tmp_path / "model.onnx", "CPU")
        run = lambda x: compiled({"x": x})[0]  # noqa: E731
    for length in (2, 3, 8, 9, 10, 13):
        assert run(np.zeros((1, length, 2), np.float32)).tolist() == model(torch.zeros(1, length, 2)).tolist()
