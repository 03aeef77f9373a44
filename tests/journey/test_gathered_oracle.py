"""The official numbers of the methods that gather or merge by nature: eager, and in every runtime; sizes and tolerances are the cases'."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tpcompile
from tpcompile import models
from tpcompile.backends import Session, runnable
from tpcompile.kept import Kept, compose
from tpcompile.models.importers import deit, dynamicvit, evit, ltmp
from tpcompile.onnx.emit import OnnxModel, emit
from tpcompile.program import Program

Opened = Callable[[str, OnnxModel], AbstractContextManager[Session]]
ROOT = Path(__file__).resolve().parents[2]
ORACLES = Path(os.environ.get("TPCOMPILE_ORACLES") or ROOT.parent / "shared" / "oracles")
Read = Callable[[dict[str, Any], dict[str, Any]], tuple[nn.Module, dict[str, Any]]]


def _plain(weights: dict[str, Any], config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A case without an importer: ATS's buffer of zeros is no weight."""
    return deit.build({name: weight for name, weight in weights.items() if not name.endswith("out_zero_mask")}, config), {}


READ: dict[str, Read] = {"evit": evit.read, "dynamicvit": dynamicvit.read, "dtps": dynamicvit.read, "ltmp": ltmp.read}


def _parameters(case: dict[str, Any], drop: bool = False) -> tuple[str, dict[str, Any]]:
    """Our method and what a checkpoint does not record."""
    method, given = case["method"], case["pruning"]
    if method == "evit":
        rate = min(given["keep_rate"])
        return "evit", {"base_keep_rate": rate, "drop_loc": given["drop_loc"], "fuse_token": given["fuse_token"] and not drop}
    if method == "tome":
        return "tome", {"r": given["r_per_block"], "prop_attn": given["prop_attn"] and not drop}
    if method in ("dynamicvit", "dtps"):
        own = {"prune_loc": given["prune_loc"], "keep_ratio": given["keep_ratio"]}
        return ("dynamicvit", own) if method == "dynamicvit" else ("tps", own | {"temperature": given["temperature"]})
    if method == "ats":
        return "ats", {"ats_blocks": given["ats_blocks"], "num_tokens": given["n_ref_tokens"]}
    return "ltmp", {}


def _case(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return found


METHODS = ("evit", "tome", "dynamicvit", "dtps", "ats", "ltmp")
FOLDERS = [path.parent for path in sorted(ORACLES.glob("*/case.json")) if _case(path.parent).get("method") in METHODS]
pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no oracle in {ORACLES}; set TPCOMPILE_ORACLES")


class Oracle:
    """One folder of official numbers and our model of it."""

    def __init__(self, folder: Path) -> None:
        self.case, self.io = _case(folder), load_file(folder / "io.safetensors")
        weights = load_file(folder / "weights.safetensors")
        self.dense, found = READ.get(self.case["method"], _plain)(weights, self.case["config"])
        self.runs = [sample["name"] for sample in self.case["samples"]]
        method, parameters = _parameters(self.case)
        self.model = models.prune(self.dense, method, **found, **parameters)

    def pixels(self, run: str) -> torch.Tensor:
        return self.io[f"{run}.pixel_values"]

    def logits(self, run: str, got: Any, name: str = "logits") -> None:
        expected = self.io[f"{run}.{name}"].numpy()
        np.testing.assert_allclose(
            np.asarray(got.detach() if isinstance(got, torch.Tensor) else got),
            expected,
            rtol=0,
            atol=self.case["tolerance"]["logits_abs"],
        )

    def check(self, run: str, logits: Any, kept: Kept) -> None:
        """Counts, kept sets and groups exactly, logits within tolerance, by every block that has a site."""
        blocks = self.blocks(run, kept)
        assert [self.counts(run)[block] for block in blocks] == list(kept.counts)
        if f"{run}.kept_mask" in self.io:
            np.testing.assert_array_equal(np.stack(kept.masks)[:, 1:], self.io[f"{run}.kept_mask"].numpy().astype(bool)[blocks])
        if f"{run}.group" in self.io:
            np.testing.assert_array_equal(np.stack(kept.groups), self.io[f"{run}.group"].numpy()[blocks])
        for site, block in enumerate(blocks):
            self.score(run, block, kept.scores[site])
            self.host(run, block, kept, site)
        self.logits(run, logits)

    def counts(self, run: str) -> list[int]:
        found: list[int] = next(sample for sample in self.case["samples"] if sample["name"] == run)["tokens_after_block"]
        return found

    def blocks(self, run: str, kept: Kept) -> list[int]:
        """The blocks with a site, in order."""
        given = self.case["pruning"]
        named = given.get("drop_loc") or given.get("prune_loc") or given.get("ats_blocks")
        return named or [b for b, r in enumerate(given.get("r_per_block", [1] * len(kept.masks))) if r]

    def score(self, run: str, block: int, got: np.ndarray) -> None:
        """Scores of those that were there, where the case gives them by original position; EViT's later ones are in its storage order."""
        expected = self.io.get(f"{run}.scores.block{block}")
        if expected is None:
            return
        right = expected.numpy()
        if right.size == got.size - 1:
            seen = ~np.isnan(right)
            np.testing.assert_allclose(got[1:][seen], right[seen], rtol=0, atol=self.case["tolerance"]["scores_abs"])

    def host(self, run: str, block: int, kept: Kept, site: int) -> None:
        """Where squeezed tokens went: the group of each that fell here is its host's."""
        expected = self.io.get(f"{run}.host.block{block}")
        if expected is None:
            return
        hosts = expected.numpy()
        for patch in np.flatnonzero(hosts >= 0):
            assert kept.groups[site][patch + 1] == kept.groups[site][hosts[patch] + 1]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


@pytest.fixture(scope="module")
def program(oracle: Oracle) -> Program:
    return tpcompile.lower(oracle.model, {"pixel_values": oracle.pixels(oracle.runs[0])})


@pytest.fixture(scope="module")
def written(program: Program) -> OnnxModel:
    return emit(program)


def test_eager(oracle: Oracle) -> None:
    for run in oracle.runs:
        seen = oracle.model.trace(oracle.pixels(run))
        assert [hidden.shape[1] for hidden in seen.hidden[1:]] == oracle.counts(run)
        cls = torch.stack([hidden[0, 0] for hidden in seen.hidden[1:]])
        torch.testing.assert_close(cls, oracle.io[f"{run}.cls_hidden"], rtol=0, atol=oracle.case["tolerance"]["cls_hidden_abs"])
        oracle.logits(run, seen.outputs["logits"])


def test_eager_variants(oracle: Oracle) -> None:
    """EViT without fusion, ToMe without proportional attention, and the dense model, where the case gives them; batches of fixed counts."""
    found = [name for name in ("nofuse.logits", "noprop.logits") if f"{oracle.runs[0]}.{name}" in oracle.io]
    for name in found:
        method, parameters = _parameters(oracle.case, drop=True)
        other = models.prune(oracle.dense, method, **parameters)
        for run in oracle.runs:
            oracle.logits(run, other(oracle.pixels(run))["logits"], name)
    if f"{oracle.runs[0]}.dense_logits" in oracle.io:
        oracle.logits(oracle.runs[0], oracle.dense(oracle.pixels(oracle.runs[0])), "dense_logits")
    batch = oracle.model(torch.cat([oracle.pixels(run) for run in oracle.runs]))["logits"]
    for run, logits in zip(oracle.runs, batch, strict=True):
        oracle.logits(run, logits.unsqueeze(0))


def test_captured(oracle: Oracle, program: Program) -> None:
    for run in oracle.runs:
        trace = program.trace(pixel_values=oracle.pixels(run))
        taps = {name: tap.numpy() for name, tap in trace.taps.items()}
        kept = compose(taps, len(program.sites), taps["site0.keep"].shape[1])
        oracle.check(run, trace.outputs["logits"], kept)


def test_the_graph_is_static_or_compacts_once_a_site(oracle: Oracle, program: Program, written: OnnxModel) -> None:
    found = sum(node.op_type == "NonZero" for node in written.model.graph)
    fixed = len({tuple(oracle.counts(run)) for run in oracle.runs}) == 1
    assert found == (0 if fixed else len(program.sites))


@pytest.mark.parametrize("target", runnable())
def test_engine(oracle: Oracle, program: Program, written: OnnxModel, target: str, opened: Opened) -> None:
    with opened(target, written) as session:
        for run in oracle.runs:
            values = session.run({"pixel_values": oracle.pixels(run).numpy()})
            kept = compose(values, len(program.sites), values["site0.keep"].shape[1])
            oracle.check(run, values["logits"], kept)
