"""LTP against numbers that the official implementation produced; every size, rule and tolerance comes from the case."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tpcompile import models
from tpcompile.models import Pruned
from tpcompile.models.importers import ltp

ROOT = Path(__file__).resolve().parents[3]
ORACLES = Path(os.environ.get("TPCOMPILE_ORACLES") or ROOT.parent / "shared" / "oracles")


def _read(folder: Path) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return case


FOLDERS = [
    path.parent
    for path in sorted(ORACLES.glob("ltp*/case.json"))
    if _read(path.parent).get("pruning", {}).get("prune_mode") == "absolute_threshold"
]
RUNS = [(folder, sample["name"]) for folder in FOLDERS for sample in _read(folder)["samples"]]
pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no LTP oracle in {ORACLES}; set TPCOMPILE_ORACLES")


class Case:
    """One oracle folder: expected numbers, and our model from its official weights."""

    def __init__(self, folder: Path) -> None:
        self.case = _read(folder)
        self.tolerance = self.case["tolerance"]
        self.io = load_file(folder / "io.safetensors")
        self.dense, self.parameters = ltp.read(load_file(folder / "weights.safetensors"), self.case["config"])

    def pruned(self, n_ref: int | str) -> Pruned:
        return models.prune(self.dense, method="ltp", n_ref=n_ref, **self.parameters)

    def sample(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(sample for sample in self.case["samples"] if sample["name"] == name)
        return found

    def expected(self, run: str, name: str) -> Tensor:
        return self.io[f"{run}.{name}"]


@pytest.fixture(scope="module")
def case() -> Callable[[Path], Case]:
    cases: dict[Path, Case] = {}
    return lambda folder: cases.setdefault(folder, Case(folder)) if folder not in cases else cases[folder]


def _close(got: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_thresholds_are_imported(folder: Path, case: Callable[[Path], Case]) -> None:
    assert case(folder).parameters["thresholds"] == case(folder).case["pruning"]["theta"]


@pytest.mark.parametrize("form", ["padded", "number"])
@pytest.mark.parametrize(("folder", "run"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_sample(folder: Path, run: str, form: str, case: Callable[[Path], Case]) -> None:
    oracle = case(folder)
    sample = oracle.sample(run)
    ids, mask = oracle.expected(run, "input_ids"), oracle.expected(run, "attention_mask")
    seen = oracle.pruned("padded" if form == "padded" else sample["N_ref"]).trace(ids, mask)
    kept = torch.stack([kept[0] for kept in seen.kept])
    assert torch.equal(kept, oracle.expected(run, "kept_mask").bool())
    assert kept.sum(dim=1).tolist() == sample["kept_count"]
    entry = torch.cat([mask.bool(), kept[:-1]])
    for layer, score in enumerate(seen.scores):
        expected = oracle.expected(run, "scores")[layer]
        assert bool(expected.isnan().all()) == (score is None)
        if score is not None:
            _close(score[0][entry[layer]], expected[entry[layer]], oracle.tolerance["scores_abs"])
    _close(
        torch.stack([hidden[0, 0] for hidden in seen.hidden]),
        oracle.expected(run, "cls_hidden"),
        oracle.tolerance["cls_hidden_abs"],
    )
    _close(seen.outputs["logits"], oracle.expected(run, "logits"), oracle.tolerance["logits_abs"])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_batch(folder: Path, case: Callable[[Path], Case]) -> None:
    oracle = case(folder)
    if "batch.input_ids" not in oracle.io:
        pytest.skip("the case has no batch")
    seen = oracle.pruned("padded").trace(oracle.expected("batch", "input_ids"), oracle.expected("batch", "attention_mask"))
    kept = torch.stack(seen.kept, dim=1)  # [B, L, N]
    assert torch.equal(kept, oracle.expected("batch", "kept_mask").bool())
    assert torch.equal(kept.sum(dim=2), oracle.expected("batch", "kept_count"))
    _close(seen.outputs["logits"], oracle.expected("batch", "logits"), oracle.tolerance["logits_abs"])
