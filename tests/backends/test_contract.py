"""One contract for all backends. A backend that cannot be used here is skipped with its own probe's reason."""

import hashlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from tpcompile.backends import Backend, Session, backend, backends, register
from tpcompile.errors import BackendUnavailable, BuildFailed, UsageError

synthetic = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))

NAMES = ("onnx", "openvino")
LENGTHS = (1, 2, 13, 200, 3, 1)


def usable(name: str) -> Backend:
    found = backend(name).probe()
    if not found.ok:
        pytest.skip(found.reason)
    return backend(name)


@pytest.fixture(scope="module", params=NAMES)
def runtime(request: pytest.FixtureRequest) -> Backend:
    return usable(request.param)


@pytest.fixture(scope="module")
def built(runtime: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(runtime.name)
    out = root / "out, as (people) name it"
    out.mkdir()
    runtime.build(synthetic.save(root / "source"), out, "fp32")
    return out


@pytest.fixture(scope="module")
def session(runtime: Backend, built: Path) -> Iterator[Session]:
    with runtime.open(built) as opened:
        yield opened


@pytest.fixture(scope="module")
def tapped(runtime: Backend, built: Path) -> Iterator[Session]:
    with runtime.open(built, taps=synthetic.TAPS) as opened:
        yield opened


def close(actual: np.ndarray, wanted: np.ndarray) -> bool:
    return actual.shape == wanted.shape and float(np.abs(actual - wanted).max()) <= 1e-5 * max(1.0, float(np.abs(wanted).max()))


def test_a_stage_has_files_and_a_session_of_its_own(runtime: Backend, tmp_path: Path) -> None:
    """Two stages lie side by side; the second copy of what they share replaces nothing."""
    source = synthetic.save(tmp_path / "source")
    (tmp_path / "out").mkdir()
    for number in range(2):
        runtime.build(source, tmp_path / "out", "fp32", stage=number)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name.split(".")[0] for name in files if name.startswith("stage")} == {"stage0", "stage1"}
    with runtime.open(tmp_path / "out", stage=0) as first, runtime.open(tmp_path / "out", stage=1) as second:
        feeds = {"input_ids": np.array([[3, 5, 9]]), "attention_mask": np.array([[1, 1, 1]])}
        np.testing.assert_array_equal(first.run(feeds)["logits"], second.run(feeds)["logits"])


def test_probe_says_version_and_devices(runtime: Backend) -> None:
    found = runtime.probe()
    assert found.ok
    assert found.version
    assert found.devices
    assert (found.reason, found.fix) == ("", "")


def test_dynamic_lengths(session: Session) -> None:
    for seed, length in enumerate(LENGTHS):
        feeds = synthetic.sample(length, seed)
        outputs = session.run(feeds)
        assert list(outputs) == ["logits"]
        assert close(outputs["logits"], synthetic.expected(feeds)[0])


def test_all_tokens_pruned_but_one(session: Session, tapped: Session) -> None:
    for length in (1, 40):
        feeds = synthetic.sample(length, attended=0)
        assert close(session.run(feeds)["logits"], synthetic.expected(feeds)[0])
        values = tapped.run(feeds)
        assert values["site0.keep"].sum() == 1
        assert [values[f"site{i}.index"].tolist() for i in range(2)] == [[[0]], [[0]]]


def test_taps_have_the_types_the_engine_reads(tapped: Session) -> None:
    feeds = synthetic.sample(30)
    values = tapped.run(feeds)
    logits, kept = synthetic.expected(feeds)
    assert values.keys() == {"logits", *synthetic.TAPS}
    assert close(values["logits"], logits)
    for what, dtype in (("keep", np.bool_), ("index", np.int64), ("score", np.float32)):
        assert values[f"site0.{what}"].dtype == dtype
    first = values["site0.index"][0]
    assert first.tolist() == kept[0].tolist() == np.flatnonzero(values["site0.keep"][0]).tolist()
    assert first[values["site1.index"][0]].tolist() == kept[1].tolist()
    assert values["site0.score"].shape == (1, 30)


def test_a_subset_of_taps(runtime: Backend, built: Path) -> None:
    with runtime.open(built, taps=["site1.index"]) as opened:
        assert opened.run(synthetic.sample(9)).keys() == {"logits", "site1.index"}


def test_inner_values_can_be_watched(runtime: Backend, built: Path) -> None:
    feeds = synthetic.sample(9)
    with runtime.open(built, taps=["x1", "site0.keep", "column1"]) as opened, runtime.open(built) as plain:
        values = opened.run(feeds)
        assert set(values) == {"logits", "x1", "site0.keep", "column1"}
        assert values["x1"].shape[1] == values["site0.keep"].sum() == values["column1"].shape[1]
        np.testing.assert_allclose(values["logits"], plain.run(feeds)["logits"], rtol=0, atol=1e-6)


def test_an_unknown_tap(runtime: Backend, built: Path) -> None:
    with pytest.raises(UsageError, match=r"has no value site9\.keep"):
        runtime.open(built, taps=["site0.keep", "site9.keep"])


def test_outputs_belong_to_the_caller(session: Session) -> None:
    feeds = synthetic.sample(5)
    first = session.run(feeds)["logits"]
    before = first.copy()
    session.run(synthetic.sample(5, seed=3))
    assert np.array_equal(first, before)
    assert first.flags.owndata or first.base is not None
    first[:] = 0


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(runtime: Backend, built: Path, threads: int) -> None:
    feeds = synthetic.sample(17)
    with runtime.open(built, threads=threads) as opened:
        assert close(opened.run(feeds)["logits"], synthetic.expected(feeds)[0])


def test_threads_reach_the_runtime(built: Path, runtime: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime.name == "onnx":
        import onnxruntime

        seen: list[int] = []
        real = onnxruntime.InferenceSession
        monkeypatch.setattr(
            onnxruntime,
            "InferenceSession",
            lambda model, options, providers, disabled_optimizers: (
                seen.extend((options.intra_op_num_threads, options.inter_op_num_threads))
                or real(model, options, providers=providers)
            ),
        )
        runtime.open(built, threads=2).close()
        assert seen == [2, 1]
    else:
        import openvino

        seen_config: dict[str, object] = {}
        real_compile = openvino.Core.compile_model

        def record(self: openvino.Core, model: object, device: str, config: dict[str, object]) -> object:
            seen_config.update(config)
            return real_compile(self, model, device, config)

        monkeypatch.setattr(openvino.Core, "compile_model", record)
        runtime.open(built, threads=2).close()
        assert seen_config == {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": 2,
        }


def test_close(runtime: Backend, built: Path) -> None:
    opened = runtime.open(built)
    opened.close()
    opened.close()
    with pytest.raises(UsageError, match="the session is closed"):
        opened.run(synthetic.sample(3))


def test_external_data(runtime: Backend, tmp_path: Path) -> None:
    source = synthetic.save(tmp_path / "source", external=True)
    assert (tmp_path / "source" / "model.onnx.data").stat().st_size > 1000
    out = tmp_path / "out"
    out.mkdir()
    runtime.build(source, out, "fp32")
    feeds = synthetic.sample(11)
    with runtime.open(out, taps=["site0.index"]) as opened:
        values = opened.run(feeds)
    assert close(values["logits"], synthetic.expected(feeds)[0])
    assert values["site0.index"][0].tolist() == synthetic.expected(feeds)[1][0].tolist()


def test_external_data_outside_the_folder(runtime: Backend, tmp_path: Path) -> None:
    source = synthetic.save(tmp_path / "source", external=True)
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    source.write_bytes(proto.SerializeToString())
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    (tmp_path / "out").mkdir()
    with pytest.raises((BuildFailed, UsageError), match="outside"):
        runtime.build(source, tmp_path / "out", "fp32")


def test_two_builds_give_the_same_bytes(runtime: Backend, built: Path, tmp_path: Path) -> None:
    runtime.build(synthetic.save(tmp_path / "elsewhere"), tmp_path, "fp32")
    names = sorted(path.name for path in built.iterdir())
    digests = [[hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names] for folder in (built, tmp_path)]
    assert digests[0] == digests[1]


def test_what_is_not_onnx(runtime: Backend, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model at all")
    with pytest.raises(BuildFailed, match=r"refused broken\.onnx"):
        runtime.build(broken, tmp_path, "fp32")


def test_an_op_the_runtime_does_not_know(runtime: Backend, tmp_path: Path) -> None:
    proto = synthetic.model()
    proto.graph.node[0].op_type = "NoSuchOp"
    (tmp_path / "odd.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildFailed, match="NoSuchOp"):
        runtime.build(tmp_path / "odd.onnx", tmp_path / "out", "fp32")


def test_files_that_were_never_built(runtime: Backend, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="refused"):
        runtime.open(tmp_path)


def test_an_unknown_precision(runtime: Backend, built: Path, tmp_path: Path) -> None:
    for call in (lambda: runtime.build(tmp_path / "none.onnx", tmp_path, "int3"), lambda: runtime.open(built, precision="int3")):
        with pytest.raises(UsageError, match="no precision 'int3'"):
            call()


def test_unavailable(runtime: Backend, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "onnxruntime" if runtime.name == "onnx" else "openvino"
    monkeypatch.setitem(sys.modules, module, None)
    assert not runtime.probe().ok
    with pytest.raises(BackendUnavailable, match=f"{module} cannot be") as caught:
        runtime.open(built)
    assert "pip install" in caught.value.fix


def test_registry() -> None:
    assert tuple(backends())[:2] == NAMES
    with pytest.raises(UsageError, match="unknown target 'onyx'") as caught:
        backend("onyx")
    assert "onnx, openvino" in caught.value.fix
    register(backend("onnx"))
    with pytest.raises(UsageError, match="two backends are called 'onnx'"):
        register(SimpleNamespace(name="onnx"))  # type: ignore[arg-type]
