"""The official numbers of AS-ViT, ToP and Transkimmer: eager, gathered, and in every runtime; sizes and tolerances are the cases'."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tpcompile
from tpcompile import models
from tpcompile.backends import Session, runnable
from tpcompile.kept import compose
from tpcompile.models import Pruned
from tpcompile.models.importers import as_vit, top, transkimmer
from tpcompile.onnx.emit import OnnxModel, emit
from tpcompile.program import Program

Opened = Callable[[str, OnnxModel], AbstractContextManager[Session]]
ROOT = Path(__file__).resolve().parents[2]
ORACLES = Path(os.environ.get("TPCOMPILE_ORACLES") or ROOT.parent / "shared" / "oracles")
TEXT = {name: {1: "seq"} for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Kind:
    """How one method's cases are read.

    Attributes:
        read: weights, and the gates beside them, with the config, to the dense model and our parameters.
        given: case and variant to what no checkpoint records.
        variants: name in the case of what was run, and where its expected numbers stand: ``<run><variant>.logits``.
        first: the column of the first token in ``kept_mask``.
    """

    read: Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[nn.Module, dict[str, Any]]]
    given: Callable[["Case", str], dict[str, Any]]
    variants: tuple[str, ...] = ("",)
    first: int = 0


@dataclass(frozen=True)
class Case:
    """One folder: the case, its tensors, and what reads it."""

    case: dict[str, Any]
    io: dict[str, Tensor]
    weights: dict[str, Tensor]

    def inputs(self, run: str) -> dict[str, Tensor]:
        if f"{run}.pixel_values" in self.io:
            return {"pixel_values": self.io[f"{run}.pixel_values"]}
        ids = self.io[f"{run}.input_ids"]
        return {"input_ids": ids, "attention_mask": self.io.get(f"{run}.attention_mask", torch.ones_like(ids))}

    def runs(self, variant: str) -> list[str]:
        """The runs that a gathered model can reproduce: of ToP those whose kept sets do not depend on the votes of dropped tokens."""
        found = [sample["name"] for sample in self.case["samples"]]
        votes = {s["name"]: s.get(variant[1:], {}).get("alive_only_voting_gives_same_sets", [True]) for s in self.case["samples"]}
        return [run for run in found if all(votes[run])]


def _gates(case: Case, variant: str) -> dict[str, Any]:
    gates = case.io["zs.pruner_z_single" if variant == ".single" else "zs.pruner_z"]
    rows = {"zs.token_z": case.io["zs.token_z"], "zs.pruner_z": gates}
    return top.parameters(rows) | {"token_prune_loc": case.case["pruning"]["token_prune_loc"]}


KINDS: dict[str, Kind] = {
    "asvit": Kind(as_vit.read, lambda case, _: {"pruning_loc": case.case["pruning"]["pruning_loc"]}, first=1),
    "top": Kind(top.read, _gates, (".full", ".single")),
    "transkimmer": Kind(transkimmer.read, lambda *_: {}, (".renorm",)),
}
NAMES = {"asvit": "as_vit"}


def _case(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return found


FOLDERS = [path.parent for path in sorted(ORACLES.glob("*/case.json")) if _case(path.parent).get("method") in KINDS]
pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no oracle in {ORACLES}; set TPCOMPILE_ORACLES")


class Oracle:
    """One folder of official numbers, and our models of it by variant."""

    def __init__(self, folder: Path) -> None:
        io = load_file(folder / "io.safetensors")
        gates = {name: tensor for name, tensor in io.items() if name in top.NEEDED}
        self.case = Case(_case(folder), io, load_file(folder / "weights.safetensors") | gates)
        method = self.case.case["method"]
        self.kind = KINDS[method]
        self.dense, self.found = self.kind.read(self.case.weights, self.case.case["config"])
        self.method = NAMES.get(method, method)
        self.models = {variant: self.prune(self.dense, variant) for variant in self.kind.variants}
        self.model = self.models[self.kind.variants[0]]
        self.runs = self.case.runs(self.kind.variants[0])
        self.sites = [i for i, score in enumerate(self.model.trace(**self.case.inputs(self.runs[0])).scores) if score is not None]

    def prune(self, dense: nn.Module, variant: str) -> Pruned:
        return models.prune(dense, self.method, **(self.found | self.kind.given(self.case, variant)))

    def check(self, run: str, logits: Any, masks: Mapping[int, Any], variant: str = "") -> None:
        """Kept sets exactly, where tokens are real; logits within the case's tolerance.

        Args:
            run: name.
            logits: ``[1, labels]``.
            masks: block -> bool ``[N]``.
            variant: which of the case's.
        """
        variant, io, inputs = variant or self.kind.variants[0], self.case.io, self.case.inputs(run)
        real = inputs["attention_mask"][0].bool().numpy() if "attention_mask" in inputs else slice(None)
        for block, mask in masks.items():
            expected = io[f"{run}{variant}.kept_mask"][block].numpy().astype(bool)
            np.testing.assert_array_equal(np.asarray(mask)[self.kind.first :][real], expected[real])
        atol = self.case.case["tolerance"]["logits_abs"]
        np.testing.assert_allclose(np.asarray(logits), io[f"{run}{variant}.logits"].numpy(), rtol=0, atol=atol)

    def close(self, got: Tensor, expected: Tensor, tolerance: str) -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=self.case.case["tolerance"][tolerance])


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


@pytest.fixture(scope="module")
def program(oracle: Oracle) -> Program:
    inputs = oracle.case.inputs(oracle.runs[0])
    return tpcompile.lower(oracle.model, inputs, dynamic=TEXT if "input_ids" in inputs else {})


@pytest.fixture(scope="module")
def written(program: Program) -> OnnxModel:
    return emit(program)


def test_eager(oracle: Oracle) -> None:
    """Every kept set, hidden state of CLS and logit, of every variant; hidden states at full length where the case has them."""
    for variant, model in oracle.models.items():
        for run in oracle.case.runs(variant):
            seen, io = model.trace(**oracle.case.inputs(run)), oracle.case.io
            oracle.check(run, seen.outputs["logits"], {i: kept[0] for i, kept in enumerate(seen.kept)}, variant)
            expected = io[f"{run}{variant}.cls_hidden"]
            hidden = torch.stack([x[0, 0] for x in seen.hidden])[-len(expected) :]
            oracle.close(
                hidden, expected, "cls_hidden_abs" if "cls_hidden_abs" in oracle.case.case["tolerance"] else "hidden_abs"
            )


def _expected(io: Mapping[str, Tensor], run: str, variant: str, block: int) -> Tensor:
    """The score of every token but the first, as the variant's case names it."""
    if variant == ".full":
        return io[f"{run}.full.scores"][block - 1]
    if variant == ".renorm":
        return io[f"{run}.renorm.skim_logits"][block].diff()[:, 0]
    return io[f"{run}.scores.block{block}"]


def test_scores(oracle: Oracle) -> None:
    """The scores that decided, of the tokens that were there: AS-ViT's, those of ToP's first location, Transkimmer's gaps."""
    io, variant = oracle.case.io, oracle.kind.variants[0]
    for run in oracle.runs:
        inputs = oracle.case.inputs(run)
        seen = oracle.model.trace(**inputs)
        before = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(seen.kept[0])
        for block in oracle.sites[: 1 if variant == ".full" else None]:
            found = _expected(io, run, variant, block)
            score = seen.scores[block]
            assert score is not None
            alive = (before if block == 0 else seen.kept[block - 1] & before)[0, 1:]
            oracle.close(score[0, 1:][alive], found[alive], "skim_logits_abs" if variant == ".renorm" else "scores_abs")


def test_restored_rows(oracle: Oracle) -> None:
    """Dropped tokens end with their last hidden state, where the case has it."""
    variant = oracle.kind.variants[0]
    if f"{oracle.runs[0]}{variant}.last_hidden_state" not in oracle.case.io:
        pytest.skip("the case has no hidden states at full length")
    encoder: Any = oracle.dense
    tokens = oracle.prune(models.TokenEncoder(encoder.bert), variant)
    for run in oracle.runs:
        inputs = oracle.case.inputs(run)
        rows = tokens(**inputs)["last_hidden_state"][0].detach()
        real = inputs["attention_mask"][0].bool()
        oracle.close(rows[real], oracle.case.io[f"{run}{variant}.last_hidden_state"][real], "hidden_abs")


def test_eager_gathered(oracle: Oracle, program: Program) -> None:
    for run in oracle.runs:
        inputs = oracle.case.inputs(run)
        trace = program.trace(**inputs)
        taps = {name: tap.numpy() for name, tap in trace.taps.items()}
        kept = compose(taps, len(program.sites), taps["site0.keep"].shape[1])
        oracle.check(run, trace.outputs["logits"], dict(zip(oracle.sites, kept.masks, strict=True)))


@pytest.mark.parametrize("target", runnable())
def test_engine(oracle: Oracle, program: Program, written: OnnxModel, target: str, opened: Opened) -> None:
    with opened(target, written) as session:
        for run in oracle.runs:
            values = session.run({name: value.numpy() for name, value in oracle.case.inputs(run).items()})
            kept = compose(values, len(program.sites), values["site0.keep"].shape[1])
            oracle.check(run, values["logits"], dict(zip(oracle.sites, kept.masks, strict=True)))
