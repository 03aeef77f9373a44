"""Engines on the synthetic graph: outputs, kept sets in original positions, and every refusal."""

import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import tpcompile
from tpcompile import ops
from tpcompile.backends import backend
from tpcompile.bundle import read, seal, stage
from tpcompile.engine import Engine, load, open_reference
from tpcompile.errors import InputError, IntegrityError, StageError, UsageError
from tpcompile.kept import compose
from tpcompile.manifest import Manifest, ModelInfo, SiteInfo, TensorInfo
from tpcompile.spec import TensorSpec

synthetic = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "backends" / "synthetic.py")))
IDS = np.array([[3, 1, 4, 1, 5]])
ONES = np.ones_like(IDS)


def masked() -> onnx.ModelProto:
    """The synthetic graph in masked form: every site sees all N rows, the mean counts the kept ones."""
    gathered = synthetic.model()
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["x0"], axis=0),
        node("Cast", ["attention_mask"], ["m0"], to=TensorProto.BOOL),
    ]
    for i in range(2):
        nodes += [
            node("MatMul", [f"x{i}", f"probe{i}"], [f"column{i}"]),
            node("Squeeze", [f"column{i}", "two"], [f"site{i}.score"]),
            node("Greater", [f"site{i}.score", "threshold"], [f"passes{i}"]),
            node("And", [f"passes{i}", f"m{i}"], [f"inner{i}"]),
            node("ScatterElements", [f"inner{i}", "origin", "true"], [f"site{i}.keep"], axis=1),
            node("MatMul", [f"x{i}", "weight"], [f"x{i + 1}"]),
            node("Identity", [f"site{i}.keep"], [f"m{i + 1}"]),
        ]
    nodes += [
        node("Cast", ["m2"], ["alive"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["alive", "two"], ["weights"]),
        node("Mul", ["x2", "weights"], ["hidden"]),
        node("ReduceSum", ["hidden", "ones"], ["total"], keepdims=0),
        node("ReduceSum", ["alive", "ones"], ["count"], keepdims=1),
        node("Div", ["total", "count"], ["logits"]),
    ]
    weights = [one for one in gathered.graph.initializer if one.name not in {"one", "zeros"}]
    graph = helper.make_graph(nodes, "masked", gathered.graph.input, gathered.graph.output, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def manifest(target: str, role: str = "pruned") -> Manifest:
    inputs = [TensorSpec(name, "int64", (1, "seq")) for name in ("input_ids", "attention_mask")]
    return Manifest(
        target=target,
        role=role,
        model=ModelInfo(id="synthetic", family="none", architecture="none", sha256="0" * 64),
        sites=tuple(SiteInfo(name=f"site{i}") for i in range(2)) if role == "pruned" else (),
        dims={"seq": (1, 64)},
        inputs=tuple(TensorInfo.of(spec) for spec in inputs),
        outputs=(TensorInfo.of(TensorSpec("logits", "float32", (1, synthetic.WIDTH))),),
        ranges={"input_ids": (0, synthetic.VOCABULARY - 1), "attention_mask": (0, 1)},
        attended=("attention_mask",),
    )


def export(out: Path, target: str) -> Path:
    with stage(out) as folder:
        scratch = out.parent / f"{out.name}-source"
        backend(target).build(synthetic.save(scratch), folder, "fp32")
        (folder / "dense").mkdir()
        backend(target).build(scratch / "model.onnx", folder / "dense", "fp32")
        (folder / "reference").mkdir()
        onnx.save(masked(), folder / "reference" / "model.onnx")
        seal(folder / "dense", manifest(target, "dense"))
        seal(folder, manifest(target))
    return out


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = backend(request.param).probe()
    if not found.ok:
        pytest.skip(found.reason)
    return export(tmp_path_factory.mktemp(request.param) / "out", request.param)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle, threads=1)


def test_a_call(engine: Engine) -> None:
    feeds = synthetic.sample(12)
    outputs = engine(**feeds)
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], synthetic.expected(feeds)[0], atol=1e-5)
    assert [str(spec) for spec in engine.inputs] == ["input_ids: int64[1, seq]", "attention_mask: int64[1, seq]"]
    assert engine.threads == 1


@pytest.mark.parametrize(("length", "attended"), [(1, 1), (2, 2), (40, 40), (64, 20), (33, 0)])
def test_engine_and_reference_agree(bundle: Path, engine: Engine, length: int, attended: int) -> None:
    feeds = synthetic.sample(length, seed=length, attended=attended)
    if attended == 0:
        feeds["attention_mask"][0, [0, -1]] = 1
    with open_reference(read(bundle), threads=1) as reference:
        wanted, (truth,) = reference.kept_each(**feeds)
    outputs, kept = engine.kept(**feeds)
    np.testing.assert_allclose(outputs["logits"], wanted["logits"], atol=1e-5)
    np.testing.assert_array_equal(engine(**feeds)["logits"], outputs["logits"])
    positions = synthetic.expected(feeds)[1]
    assert kept.counts == truth.counts == kept.stored == tuple(map(len, positions))
    assert truth.stored == (length, length)
    for i in range(2):
        assert np.flatnonzero(kept.masks[i]).tolist() == np.flatnonzero(truth.masks[i]).tolist() == positions[i].tolist()
        np.testing.assert_allclose(kept.scores[i], truth.scores[i], atol=1e-5)
    assert np.isnan(kept.scores[1]).sum() == length - kept.counts[0]


def test_dense_is_a_bundle_of_its_own(bundle: Path) -> None:
    dense = read(bundle).dense
    assert dense is not None
    feeds = synthetic.sample(7)
    with load(bundle / "dense") as opened:
        outputs, kept = opened.kept(**feeds)
        np.testing.assert_allclose(outputs["logits"], opened(**feeds)["logits"])
    assert (kept.masks, kept.counts, kept.stored) == ((), (), ())
    with pytest.raises(IntegrityError, match="holds no reference"):
        open_reference(dense)


def test_array_likes_are_taken(engine: Engine) -> None:
    plain = engine(input_ids=IDS.tolist(), attention_mask=ONES[:, ::-1])
    np.testing.assert_array_equal(plain["logits"], engine(input_ids=IDS, attention_mask=ONES)["logits"])


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"attention_mask": None}, "missing input: attention_mask", "exactly: input_ids, attention_mask"),
        ({"token_type_ids": ONES}, "unknown input: token_type_ids", "exactly: input_ids, attention_mask"),
        ({"input_ids": IDS.astype(np.int32)}, "input_ids is int32, not int64", ".astype(numpy.int64)"),
        ({"input_ids": IDS.astype(np.float64)}, "input_ids is float64, not int64", ".astype(numpy.int64)"),
        ({"input_ids": "text"}, "input_ids is <U4, not int64", ".astype(numpy.int64)"),
        ({"input_ids": IDS[0]}, "input_ids has shape [5], not input_ids: int64[1, seq]", "inspect"),
        ({"input_ids": np.repeat(IDS, 2, 0)}, "input_ids has shape [2, 5], not input_ids: int64[1, seq]", "inspect"),
        ({"input_ids": IDS[:, :0], "attention_mask": ONES[:, :0]}, "seq = 0; the engine takes 1 or more", "empty text"),
        ({"input_ids": np.zeros((1, 65), np.int64)}, "input_ids has seq = 65; the engine takes 64 at most", "truncate to 64"),
        ({"attention_mask": ONES[:, :4]}, "attention_mask has seq = 4, another input 5", "same length"),
        ({"input_ids": IDS + 49}, "input_ids holds values from 50 to 54; the engine takes 0 to 49", "tokenizer files"),
        ({"input_ids": IDS - 2}, "input_ids holds values from -1 to 3", "tokenizer files"),
        ({"attention_mask": ONES[:, ::-1] * (IDS != 3)}, "attention_mask hides the first token of a sample", "pad on the right"),
    ],
)
def test_inputs_that_do_not_fit(engine: Engine, changes: dict[str, object], message: str, fix: str) -> None:
    feeds = {"input_ids": IDS, "attention_mask": ONES} | changes
    for call in (engine, engine.kept):
        with pytest.raises(InputError) as caught:
            call(**{name: value for name, value in feeds.items() if value is not None})
        assert message in caught.value.message
        assert fix in caught.value.fix
        assert caught.value.exit_code == 2


def test_ragged_lists(engine: Engine) -> None:
    with pytest.raises(InputError, match="input_ids is not an array"):
        engine(input_ids=[[1, 2], [3]], attention_mask=ONES)


def test_close(bundle: Path) -> None:
    with load(bundle) as engine:
        engine(input_ids=IDS, attention_mask=ONES)
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine(input_ids=IDS, attention_mask=ONES)


def test_load_checks_before_a_runtime_sees_the_file(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    target = read(copy).manifest.target
    name = "model.onnx" if target == "onnx" else "openvino_model.bin"
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    monkeypatch.setattr(type(backend(target)), "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(IntegrityError, match=f"{name} was changed"):
        load(copy)


def test_a_changed_reference(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "reference" / "model.onnx").open("ab") as file:
        file.write(b"!")
    load(copy).close()
    with pytest.raises(IntegrityError, match=r"reference/model\.onnx has"):
        open_reference(read(copy))


def test_load_usage(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle at"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="threads is -1"):
        load(bundle, threads=-1)


# compose, as a pure function


def row(*values: object, dtype: type = np.int64) -> np.ndarray:
    return np.array([values], dtype=dtype)


def test_compose_chains_positions_and_ignores_rows_stored_though_dropped() -> None:
    taps = {
        "site0.keep": row(0, 1, 0, 1, 0, 1, dtype=np.bool_),  # token 0 is pinned: dropped, yet stored
        "site0.index": row(0, 1, 3, 5),
        "site0.score": row(0, 1, 2, 3, 4, 5, dtype=np.float32),
        "site1.keep": row(0, 0, 1, 0, dtype=np.bool_),
        "site1.index": row(0, 2),
        "site1.score": row(9, 8, 7, 6, dtype=np.float32),
    }
    kept = compose(taps, 2, 6)
    assert [np.flatnonzero(mask).tolist() for mask in kept.masks] == [[1, 3, 5], [3]]
    assert kept.counts == (3, 1)
    assert kept.stored == (4, 2)
    assert kept.scores[0].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(kept.scores[1], np.array([np.nan, 8, np.nan, 7, np.nan, 6], np.float32))


def test_compose_of_the_masked_form_says_the_same() -> None:
    taps = {
        "site0.keep": row(0, 1, 0, 1, 0, 1, dtype=np.bool_),
        "site1.keep": row(0, 0, 0, 1, 0, 0, dtype=np.bool_),
        "site1.score": row(9, 8, 5, 7, 5, 6, dtype=np.float32),
    }
    kept = compose(taps, 2, 6)
    assert [np.flatnonzero(mask).tolist() for mask in kept.masks] == [[1, 3, 5], [3]]
    assert kept.stored == (6, 6)
    assert np.isnan(kept.scores[0]).all()
    np.testing.assert_array_equal(kept.scores[1], np.array([np.nan, 8, np.nan, 7, np.nan, 6], np.float32))


def test_compose_of_nothing_kept() -> None:
    taps = {"site0.keep": row(0, 0, dtype=np.bool_), "site0.index": np.zeros((1, 0), np.int64)}
    assert compose(taps, 1, 2).counts == (0,)
    assert compose(taps, 1, 2).stored == (0,)
    assert compose({}, 0, 5).masks == ()


def test_compose_refuses_sizes_that_do_not_chain() -> None:
    with pytest.raises(StageError, match="site0 sees 2 rows, but 3 are stored"):
        compose({"site0.keep": row(1, 0, dtype=np.bool_)}, 1, 3)


class Spread(torch.nn.Module):
    """Logits as wide as its weights, under a mask of -1e4."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(8, 8) for _ in range(3))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = x[..., 0] > -0.5
        x = ops.prune(x, keep)
        logits = self.query(x) @ self.key(x).transpose(1, 2) + (1 - keep.float())[:, None] * -1e4
        x = x + logits.softmax(-1) @ self.value(x) * keep[..., None]
        return (x * keep[..., None]).sum(1) / keep.float().sum(1, keepdim=True).clamp(min=1)


def test_logits_beyond_a_finite_mask_fail_with_layer_and_spread(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))}
    for std, verdict in ((0.3, "PASSED"), (60.0, "FAILED")):
        out = tmp_path / f"{std:g}"
        bundle = tpcompile.export(Spread(std).eval(), inputs, out, dynamic={"x": {1: "n"}})
        assert [bound.limit for bound in bundle.manifest.bounds] == [9896.0]
        parity = tpcompile.validate(out)
        assert parity.verdict == verdict
    assert parity.exit_code == 5
    assert re.fullmatch(
        r"the model \(test_engine\.py:\d+\): living logits spread by \d+, the mask hides keys up to 9896; dropped tokens still count in "
        r"the masked model: mask with -inf, or with a lower number",
        parity.reason,
    )
