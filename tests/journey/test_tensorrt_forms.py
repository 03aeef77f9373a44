"""A tiny BERT under LTP as TensorRT plans: every form, every precision, what an export refuses. No plan runs here: what is given does."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from tpcompile import api
from tpcompile import build as building
from tpcompile.backends import Extent, backend
from tpcompile.backends.tensorrt.builder import build_plan
from tpcompile.backends.tensorrt.flavours import RTX
from tpcompile.bundle import read
from tpcompile.cli import main
from tpcompile.data.samples import Sample
from tpcompile.engine import check
from tpcompile.errors import InputError, UsageError
from tpcompile.plan import LADDER, Plan, Wish, behind_sites, settle
from tpcompile.proof.parity import TOLERANCE
from tpcompile.rows import Rows
from tpcompile.subject import subject_of
from tpcompile.tune import Trial

ROOT = Path(__file__).resolve().parents[2]
GPUS = ("sm86", "sm89", "sm120")
THRESHOLDS = [0.0, 0.04, 0.06]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    if not backend("tensorrt-rtx").probe().ok:
        pytest.skip(backend("tensorrt-rtx").probe().reason)
    spec = importlib.util.spec_from_file_location("tensorrt_tables", ROOT / "benchmarks/plans.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled(bert_folder: Path) -> building.Compiled:
    return building.compile_subject(subject_of(bert_folder, None, None, "ltp", {"thresholds": THRESHOLDS}))


@pytest.fixture(scope="module")
def rows() -> list[Sample]:
    draws = [np.random.default_rng(n).integers(5, 200, (1, n)) for n in (5, 23, 40)]
    return [Sample("", {"input_ids": ids, "attention_mask": np.ones_like(ids)}) for ids in draws]


def graphs(
    script: ModuleType, compiled: Any, rows: list[Sample], form: str, precision: str, folder: Path
) -> tuple[Any, list[ir.Model]]:
    """The files of a form, and what the builder is given of them, under the same names in ``given``."""
    for name in ("written", "given"):
        (folder / name).mkdir()
    one = script.written(compiled, rows, form, folder / "written")
    return one, script.given(one, rows, precision, folder / "given")


@pytest.mark.parametrize("form", ["static", "staged", "single"])
def test_every_form_is_exact_and_builds(form: str, script: ModuleType, compiled: Any, rows: list[Sample], tmp_path: Path) -> None:
    one, models = graphs(script, compiled, rows, form, "fp32", tmp_path)
    assert script.off_by(compiled, rows, one, tmp_path / "given") <= TOLERANCE
    for number, model in enumerate(models):
        built = build_plan(RTX, model, tmp_path / f"{number}.plan", "fp32", Extent(one.sizes, GPUS))
        assert built.megabytes > 0
    label = json.loads((tmp_path / "0.plan.json").read_text(encoding="utf-8"))
    assert label["captures"] is (form != "single"), "branches are no CUDA graph"
    assert len(models) == (3 if form == "staged" else 1)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_every_precision_builds_and_decides_in_float32(
    precision: str, script: ModuleType, compiled: Any, rows: list[Sample], tmp_path: Path
) -> None:
    one, (model,) = graphs(script, compiled, rows, "static", precision, tmp_path)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    assert {values[f"site{i}.score"].dtype for i in range(2)} == {ir.DataType.FLOAT}
    kinds = {v.dtype for node in model.graph if node.op_type == "MatMul" for v in node.inputs if v is not None}
    low = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}.get(precision, ir.DataType.FLOAT)
    assert low in kinds
    pairs = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert bool(pairs) is (precision in ("int8", "fp8"))
    if precision == "fp16":
        assert TOLERANCE < script.off_by(compiled, rows, one, tmp_path / "given") < 5e-3
    if precision == "int8":
        assert plain(tmp_path / "given", rows[1]) == pytest.approx(plain(tmp_path / "written", rows[1]), abs=0.1)
    gpus = GPUS if precision != "fp8" else GPUS[1:]
    build_plan(RTX, model, tmp_path / "model.plan", precision, Extent(one.sizes, gpus))


def plain(folder: Path, row: Sample) -> np.ndarray:
    """The first output of a graph as it is written: ONNX Runtime's own fusions do not know all 8-bit types."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, dict(row.inputs))[0]
    return found


def test_the_page_shows_what_was_built(script: ModuleType) -> None:
    rows = json.loads(script.FOUND.read_text(encoding="utf-8"))["rows"]
    assert script.PAGE.read_text(encoding="utf-8").split(script.MARK)[1].strip() == script.table(rows)
    assert {row["error_lines"] for row in rows} == {0}
    assert max(row["off_by"] for row in rows if row["precision"] == "fp32") <= TOLERANCE
    assert {script.key(row) for row in rows} <= set(script.cells())


@pytest.fixture(scope="module")
def bundle(script: ModuleType, bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    api.export(
        bert_folder, out=out, target="tensorrt-rtx", method="ltp", parameters={"thresholds": THRESHOLDS}, precision="fp16",
        dims={"seq": (2, 16, 48)}, capabilities=("sm86", "sm89"),
    )  # fmt: skip
    return out


def test_a_bundle_says_what_it_is_for_and_that_it_never_ran(bundle: Path) -> None:
    manifest = read(bundle).manifest
    assert (manifest.lowering, manifest.form, manifest.buckets) == ("bucketed", "staged", (4, 8, 12, 16))
    assert (manifest.capabilities, manifest.verified_on, manifest.dims) == (("sm86", "sm89"), (), {"seq": (2, 48)})
    assert {"stage0.plan", "stage2.plan", "stage2.plan.json", "reference/model.onnx"} <= manifest.files.keys()
    read(bundle).verify()
    ids = np.ones((1, 49), dtype=np.int64)
    with pytest.raises(InputError, match="seq = 49; the engine takes 48 at most"):
        check({"input_ids": ids, "attention_mask": ids}, manifest)
    assert "never run" in call("inspect", str(bundle)).stdout


def test_a_plan_is_not_run_where_nothing_can_run_it(bundle: Path) -> None:
    done = call("validate", str(bundle))
    if "CUDA" in str(backend("tensorrt-rtx").probe().note):
        pytest.skip("there is a GPU")
    assert done.exit_code == 3
    assert "engines run on an NVIDIA GPU" in done.output


def test_a_changed_plan_is_never_read(bundle: Path) -> None:
    plan = bundle / "stage1.plan"
    before = plan.read_bytes()
    try:
        plan.write_bytes(before[:-1] + b"?")
        done = call("validate", str(bundle))
        assert (done.exit_code, "stage1.plan was changed after export" in done.output) == (9, True)
    finally:
        plan.write_bytes(before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--capability sm90", "no compute capability 'sm90'"),
        ("--dtype fp8 --capability sm86", "sm86 has no fp8: it comes with sm89"),
        ("--dim seq=9", "'seq=9' is not of the form name=min:opt:max"),
        ("--dim seq=9:4:5", "seq = 9:4:5 does not rise"),
    ],
)
def test_what_an_export_refuses(line: str, message: str, bert_folder: Path, tmp_path: Path) -> None:
    asked = ["-m", str(bert_folder), "--method", "ltp", "--param", f"thresholds={THRESHOLDS}", "-o", str(tmp_path / "out")]
    done = call("export", "tensorrt-rtx", *asked, *line.split())
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"seq": (2, 8, 9999)}, "the model takes 2 to"),
        ({"width": (2, 8, 16)}, "no dynamic size 'width'"),
        ({"seq": (2, 3, 4)}, "the range asked for is 2 to 4"),
    ],
)
def test_a_range_that_excludes_an_input(
    dims: dict[str, tuple[int, int, int]], message: str, compiled: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        building.fill(tmp_path, compiled, "tensorrt-rtx", wish=Wish(dims=dims, profiled=True))
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, bert_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    done = call("export", "tensorrt-rtx", "-m", str(bert_folder), "-o", str(tmp_path / "out"))
    assert (done.exit_code, "pip install 'tpcompile[tensorrt-rtx]'" in done.output) == (3, True)


def test_counts_of_real_data_are_the_usual_ones(compiled: Any, rows: list[Sample]) -> None:
    inputs = [row.inputs for row in rows]
    plan = settle(Wish(calibrate=inputs, profiled=True), "tensorrt-rtx", compiled.compact, lambda: ("some", rows))
    assert plan.usual == tuple(sorted(plan.usual, reverse=True))
    assert len(plan.usual) == 2
    sizes = behind_sites((2, 40), plan, 2)
    assert sizes["t1"][0] == 2
    assert sizes["t1"][1] == Rows(LADDER).rung(plan.usual[0])
    assert sizes["t1"][2] == 40
    with pytest.raises(UsageError, match="lowering auto calibrates nothing"):
        Wish(calibrate=inputs)


def test_candidates_are_built_for_what_was_asked(
    compiled: Any, rows: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tuned has the sizes, GPUs and ranges of activations of what is exported."""
    seen: list[Any] = []

    def engine(*given: Any) -> tuple[tuple[()], tuple[()]]:
        seen.append(given[5:])
        return (), ()

    def timed(plans: list[Plan], build: Any, folder: Path, feeds: Any) -> list[Trial]:
        for plan in plans:
            build(plan, folder)
        return [Trial(plan, 1.0, 1.0, 0.0) for plan in plans]

    monkeypatch.setattr(building, "_engine", engine)
    monkeypatch.setattr(building, "tune", timed)
    extent = Extent({"seq": (2, 16, 40)}, ("sm86",))
    asked = Wish(tune=True)
    building._plan(tmp_path / "out", compiled, "tensorrt-rtx", "int8", str, asked, lambda: ("some", rows), extent, ())
    assert len(seen) >= 4
    assert [(one, len(feeds)) for one, feeds in seen] == [(extent, len(rows))] * len(seen)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))
