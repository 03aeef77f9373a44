"""The speed benchmark but for its times: cells are data, runs go on where they stopped, and the page says what the documents say."""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from tpcompile.errors import EnvironmentFault

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed"


@pytest.fixture(scope="module")
def speed() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which import each other by their bare names."""
    folders = [str(ROOT / "benchmarks" / "speed"), str(ROOT / "benchmarks")]
    sys.path[:0] = folders
    try:
        import cells
        import figures
        import measure
        import page
        import plot
        import prepare

        main: ModuleType = __import__("runpy").run_path(folders[0] + "/__main__.py", run_name="speed")
        named = {"cells": cells, "figures": figures, "measure": measure, "page": page, "plot": plot, "prepare": prepare}
        yield SimpleNamespace(**named, main=SimpleNamespace(**main))
    finally:
        for folder in folders:
            sys.path.remove(folder)


def test_a_row_that_ends_says_why(speed: SimpleNamespace, tmp_path: Path) -> None:
    """Before the stream it is left out; in the midst of it the run ends, with an exit code and the row's last words."""
    row = speed.measure.Row("pruned", "pruned", {"kind": "bundle", "threads": 1, "feeds": str(tmp_path / "none.npz")})
    assert "none.npz" in speed.measure.Child(row).open()
    child = speed.measure.Child(row)
    try:
        child.process.wait()
        with pytest.raises(EnvironmentFault, match=r"pruned ended in a process of its own: .*none\.npz") as caught:
            child.ask(0)
        assert caught.value.exit_code == 3
    finally:
        child.close()


def test_cells_are_told_apart_by_name(speed: SimpleNamespace) -> None:
    every, usual = speed.cells.matrix(), speed.cells.default()
    assert len({cell.name for cell in every}) == len(every)
    assert set(usual) <= set(every)
    for many in ([cell for cell in usual if cell.threads == 2], [cell for cell in usual if cell.batch == 8]):
        assert {cell.workload for cell in many} == {"minilm-100", "bert-128", "deit-s", "deit-b"}
        assert {cell.engine for cell in many} == set(speed.cells.ENGINES)
    assert speed.cells.Cell("deit-s", 1.53, "openvino-bf16", 8).name == "deit-s_1.53_openvino-bf16_b8_t1"


def test_a_run_goes_on_where_the_last_one_stopped(speed: SimpleNamespace, tmp_path: Path) -> None:
    cells = speed.main.chosen(["deit-s_2_onnx"], full=False)
    (tmp_path / f"{cells[0].name}.json").write_text("{}", encoding="utf-8")
    assert speed.main.missing(cells, tmp_path, again=False) == cells[1:]
    assert speed.main.missing(cells, tmp_path, again=True) == cells


def document(**changes: object) -> dict[str, object]:
    """Pruned twice as fast as dense cold, four times warm; static engines for the first sample."""

    def row(name: str, role: str, cold: list[float], warm: list[float], only: tuple[int, ...] = ()) -> dict[str, object]:
        own = {"name": name, "role": role, "only": list(only), "cold_ms": cold, "warm_ms": [warm, warm]}
        return {**own, "load_s": 1.0, "peak_mb": 100.0, "size_mb": 10.0}

    rows = [
        row("pruned", "pruned", [4.0, 4.0], [2.0, 2.0]), row("dense", "dense", [8.0, 8.0], [8.0, 8.0]),
        row("static", "static", [3.0], [1.5], (0,)), row("dense static", "dense static", [7.0], [6.0], (0,)),
        row("quick", "peer", [6.0, 6.0], [6.0, 6.0]),
    ]  # fmt: skip
    cell = {"name": "minilm-100_2.6_onnx-fp32_b1_t1", "batch": 1}
    plan = {"lowering": "bucketed", "buckets": [16], "lengths": [16], "primed": 0, "swept": [], "reason": "asked for"}
    flops = {"paper": 4.0, "graph": 5.0}
    known = {"date": "2026-12-01", "cell": cell, "plan": plan, "flops": flops, "samples": 2, "left_out": {"slow": "absent"}}
    return {**known, "rows": rows, **changes}


def test_figures_follow_from_times(speed: SimpleNamespace) -> None:
    found = speed.figures.figures(document())
    assert found.speedup == {"cold": 2.0, "warm": 4.0}
    assert found.realised == {"cold": 0.5, "warm": 1.0}
    assert found.bound == {"cold": 0.375, "warm": 0.75}
    assert found.ideal == 4.0
    assert found.best == {"cold": ("quick", 1.5), "warm": ("quick", 3.0)}


def test_who_met_no_shape_at_load_is_taken_warm_beside_who_did(speed: SimpleNamespace) -> None:
    """Dense takes 8 and 6 ms warm where ours, primed, takes 4 in the first pass; load and first pass are told as they are."""
    shown = document()
    pruned, dense, *others = shown["rows"]  # type: ignore[misc]  # rows
    slow = {**pruned, "name": "pruned, not primed", "role": "unprimed", "cold_ms": [5.0, 5.0], "load_s": 0.5}
    found = speed.figures.figures({**shown, "rows": [pruned, slow, {**dense, "warm_ms": [[6.0, 6.0]]}, *others]})
    assert found.speedup == {"cold": 1.5, "warm": 3.0}
    assert found.best["cold"] == ("dense", 1.5)
    assert found.start == pytest.approx((1000 + 16) / (1000 + 8))
    assert found.unprimed == pytest.approx((16 / 10, 1.5 / 5, (1000 + 16) / (500 + 10)))


def test_the_waterfall_says_what_each_step_keeps(speed: SimpleNamespace) -> None:
    line = speed.page.waterfall([document()]).splitlines()[-1]
    assert line == "| minilm-100_2.6_onnx-fp32_b1_t1 | 4.00 | 5.00 (1.25) | 4.00 (0.80) | 4.00 (1.00) | 2.00 (0.50) |"
    lines = speed.page.targets([document()]).splitlines()
    assert "| of the static bound, warm | 0.95 | 0 of 1 | 0.75 to 0.75 | minilm-100_2.6_onnx-fp32_b1_t1 0.75 |" in lines
    assert "| best dense / ours, warm, MiniLM /2.6 | 2.3 | 1 of 1 | 3.00 to 3.00 | - |" in lines
    batched = document(cell={"name": "minilm-100_2.6_onnx-fp32_b8_t1", "batch": 8})
    assert "| of the static bound, warm | 0.95 | 0 of 0 | not measured | - |" in speed.page.targets([batched])
    assert "Left out: slow: absent." in speed.page.cell(document())
    assert ", a core of 90 GFLOP/s and 25 GB/s; lowering" in speed.page.cell(document(core={"gflops": 90.4, "gbps": 24.9}))


def test_a_core_is_measured(speed: SimpleNamespace) -> None:
    found = speed.measure.core()
    assert found["gflops"] > 0
    assert found["gbps"] > 0


def test_a_disturbed_first_pass_is_told(speed: SimpleNamespace) -> None:
    calm, slow = document(), document()
    slow["rows"] = [{**row, "cold_ms": [3 * one for one in row["warm_ms"][0]]} for row in calm["rows"]]
    assert "Disturbed" not in speed.page.cell(calm)
    assert "at least 3.00 times" in speed.page.cell(slow)


def test_the_picture_has_a_mark_a_cell(speed: SimpleNamespace) -> None:
    """At the FLOPs ratio across, and the speed-up up: cold below warm."""
    cell = {"name": "it", "workload": "bert-128", "engine": "openvino-fp32", "batch": 8, "threads": 1}
    drawn = ET.fromstring(speed.plot.plot([document(cell=cell)]))
    (mark,) = drawn.findall("{*}g")
    line, shape = mark.findall("{*}path")
    (across, warm), (_, cold) = speed.plot._at(4.0, 4.0), speed.plot._at(4.0, 2.0)
    assert line.get("d") == f"M{across} {warm}V{cold}"
    assert (shape.get("transform"), shape.get("fill")) == (f"translate({across} {warm})", "white")
    assert warm < cold


def test_two_samples_have_no_percentile(speed: SimpleNamespace) -> None:
    assert speed.figures.spread(document()["rows"][0]) is None
    assert speed.figures.spread({"only": (), "warm_ms": [[*range(1, 30)]]}) == pytest.approx(26.2 / 15)
    assert "| pruned | 2 | 8 | 4 | - |" in speed.page.cell(document())


def site() -> onnx.ModelProto:
    """A mask of any length, and where it is true."""
    nodes = [helper.make_node("NonZero", ["mask"], ["index"]), helper.make_node("Identity", ["index"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("mask", TensorProto.BOOL, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1, None])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_a_graph_for_one_sample_has_no_free_size(speed: SimpleNamespace) -> None:
    fixed = speed.prepare.frozen(site(), {"mask": np.array([True, False, True])}, [2])
    shapes = {one.name: one for one in onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph.value_info}
    assert [dim.dim_value for dim in shapes["index"].type.tensor_type.shape.dim] == [1, 2]
    with pytest.raises(ValueError, match="zip"):
        speed.prepare.frozen(site(), {"mask": np.array([True])}, [2, 3])


@pytest.mark.parametrize(("mask", "first"), [([1, 0, 1, 0], [0, 2]), ([1, 1, 1, 0], [0, 1]), ([0, 0, 0, 1], [3, 0])])
def test_a_graph_for_one_sample_stores_its_count_whatever_is_kept(
    speed: SimpleNamespace, mask: list[int], first: list[int]
) -> None:
    feeds = {"mask": np.array(mask, dtype=bool)}
    fixed = speed.prepare.frozen(site(), feeds, [2])
    assert ReferenceEvaluator(fixed).run(None, feeds)[0].tolist() == [first]


def test_the_pages_say_what_was_measured(speed: SimpleNamespace) -> None:
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    assert documents
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == speed.page.page(documents)
    assert (ROOT / "docs" / "performance.svg").read_text(encoding="utf-8") == speed.plot.plot(documents)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.split(speed.page.MARKS)[1].strip() == speed.page.readme(documents)
