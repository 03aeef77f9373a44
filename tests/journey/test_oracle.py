"""The official LTP numbers through every form: eager masked, eager gathered, and each engine."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tpcompile
from tpcompile import models
from tpcompile.backends import runnable
from tpcompile.kept import compose
from tpcompile.models.importers import ltp
from tpcompile.program import Program

ROOT = Path(__file__).resolve().parents[2]
ORACLES = Path(os.environ.get("TPCOMPILE_ORACLES") or ROOT.parent / "shared" / "oracles")
DYNAMIC = {name: {1: "seq"} for name in ("input_ids", "attention_mask")}


def _case(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return found


FOLDERS = [
    p.parent
    for p in sorted(ORACLES.glob("ltp*/case.json"))
    if _case(p.parent)["pruning"].get("prune_mode") == "absolute_threshold"
]
pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no LTP oracle in {ORACLES}; set TPCOMPILE_ORACLES")


class Oracle:
    """One folder of official numbers and our model of it; scores divide by the padded length, as the official code's do."""

    def __init__(self, folder: Path) -> None:
        self.case, self.io = _case(folder), load_file(folder / "io.safetensors")
        dense, parameters = ltp.read(load_file(folder / "weights.safetensors"), self.case["config"])
        self.model = models.prune(dense, "ltp", n_ref="padded", **parameters)
        self.runs = [sample["name"] for sample in self.case["samples"]]

    def inputs(self, run: str) -> dict[str, torch.Tensor]:
        return {name: self.io[f"{run}.{name}"] for name in DYNAMIC}

    def check(self, run: str, logits: np.ndarray, kept: tuple[np.ndarray, ...]) -> None:
        """Kept sets exactly, logits within the case's tolerance; sites are the layers whose threshold is not 0."""
        active = [i for i, theta in enumerate(self.case["pruning"]["theta"]) if theta != 0]
        np.testing.assert_array_equal(np.stack(kept), self.io[f"{run}.kept_mask"].numpy().astype(bool)[active])
        np.testing.assert_allclose(logits, self.io[f"{run}.logits"].numpy(), rtol=0, atol=self.case["tolerance"]["logits_abs"])


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


@pytest.fixture(scope="module")
def compact(oracle: Oracle) -> Program:
    return tpcompile.lower(oracle.model, oracle.inputs(oracle.runs[0]), dynamic=DYNAMIC)


def test_eager_masked(oracle: Oracle) -> None:
    for run in oracle.runs:
        trace = oracle.model.trace(**oracle.inputs(run))
        active = [k[0].numpy() for k, s in zip(trace.kept, trace.scores, strict=True) if s is not None]
        oracle.check(run, trace.outputs["logits"].numpy(), tuple(active))


def test_eager_gathered(oracle: Oracle, compact: Program) -> None:
    for run in oracle.runs:
        inputs = oracle.inputs(run)
        trace = compact.trace(**inputs)
        taps = {f"site{i}.keep": k.numpy() for i, k in enumerate(trace.keep)}
        taps |= {f"site{i}.index": k.numpy() for i, k in enumerate(trace.index) if k is not None}
        kept = compose(taps, len(trace.keep), inputs["input_ids"].shape[1])
        oracle.check(run, trace.outputs["logits"].numpy(), kept.masks)


@pytest.mark.parametrize("target", runnable())
def test_engine(oracle: Oracle, target: str, tmp_path: Path) -> None:
    tpcompile.export(oracle.model, oracle.inputs(oracle.runs[0]), tmp_path / "out", target=target, dynamic=DYNAMIC)
    with tpcompile.load(tmp_path / "out") as engine:
        for run in oracle.runs:
            outputs, kept = engine.kept(**{name: value.numpy() for name, value in oracle.inputs(run).items()})
            oracle.check(run, outputs["logits"], kept.masks)
