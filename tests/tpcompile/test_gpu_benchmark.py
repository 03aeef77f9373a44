"""The GPU benchmark where there is no GPU: it ends with a reason, and what can be had on a CPU is exact there."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tpcompile.proof.parity import TOLERANCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_reason(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["-o", str(tmp_path / "gpu.json")]) == 3
    assert "nothing can be measured: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, where it copies a program
def test_what_a_cpu_can_do_is_exact(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in two batch sizes: the gathered program in torch's own ops equals the masked model; the absent say why."""
    case = script.bert("tiny", 12, width=64, depth=3)
    wanted = ("masked eager", "dense eager", "pruned eager", "pruned onnxruntime")
    every = script.contenders
    monkeypatch.setattr(script, "contenders", lambda *given: (one for one in every(*given) if one[0] in wanted))
    rows = list(script.case_rows(case, (1, 3), "cpu", rounds=2))
    absent = {row["contender"]: row["absent"] for row in rows if "absent" in row}
    assert absent == {"pruned onnxruntime": "this onnxruntime has no CUDA provider"}
    timed = [row for row in rows if "ms" in row]
    assert [(row["batch"], row["contender"]) for row in timed] == [(batch, name) for batch in (1, 3) for name in wanted[:3]]
    assert max(row["off_by"] for row in timed if row["off_by"] is not None) <= TOLERANCE
    assert all(row["against_best_dense"] > 0 for row in timed)


def test_what_fails_fails_alone(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that cannot take a batch is a row with its reason; the others are timed."""

    def small(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(inputs["x"]) > 1:
            raise ValueError("too many\nsamples")
        return inputs["x"]

    case = script.Case("one", torch.nn.Identity, lambda batch, seed: {"x": torch.ones(batch, 2)}, "ltp", ())
    made = {"masked eager": lambda inputs: inputs["x"], "pruned aoti": small}
    monkeypatch.setattr(script, "_time", lambda run, inputs, device: 3.0 if run is small else 2.0)
    first, second = (script.measured(case, batch, made, "cpu", rounds=2) for batch in (1, 2))
    assert [(row["contender"], row["off_by"], row["against_best_dense"]) for row in first] == [(name, 0.0, None) for name in made]
    assert second[1] == {"case": "one", "batch": 2, "contender": "pruned aoti", "absent": "ValueError: too many"}
    assert [row.get("ms") for row in (*first, *second)] == [2.0, 3.0, 2.0, None]


def test_a_batch_without_a_reference_leaves_the_others_be(script: ModuleType) -> None:
    def small(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(inputs["x"]) > 1:
            raise MemoryError("out of memory")
        return inputs["x"]

    case = script.Case("one", torch.nn.Identity, lambda batch, seed: {"x": torch.ones(batch, 2)}, "ltp", ())
    made = {"masked eager": small, "pruned aoti": lambda inputs: inputs["x"]}
    row = {"case": "one", "batch": 2}
    assert script.measured(case, 2, made, "cpu", rounds=2) == [
        row | {"contender": "masked eager", "absent": "MemoryError: out of memory"},
        row | {"contender": "pruned aoti", "absent": "no reference at this batch"},
    ]
    assert [one["off_by"] for one in script.measured(case, 1, made, "cpu", rounds=2)] == [0.0, 0.0]
