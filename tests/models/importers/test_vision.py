"""Importers of vision checkpoints: every size from the weights, and every refusal by its text."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile import models
from tpcompile.errors import ModelError, UsageError
from tpcompile.models.importers import IMPORTERS, deit, dynamicvit, evit, ltmp, recognise
from tpcompile.models.library import timm
from tpcompile.models.methods.predictor import ATTRIBUTE, Predictor

Weights = dict[str, Tensor]


@pytest.fixture
def dense() -> Any:
    torch.manual_seed(5)
    build = timm().models.vision_transformer.VisionTransformer
    return build(img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0).eval()


@pytest.fixture
def weights(dense: Any) -> Weights:
    return dict(dense.state_dict())


CONFIG = {"num_heads": 3}


def _predictors() -> Weights:
    return {f"{ATTRIBUTE}.{n}": w for n, w in nn.ModuleList(Predictor(24) for _ in range(2)).state_dict().items()}


@torch.no_grad()
def test_every_size_is_read_from_the_weights(dense: Any, weights: Weights) -> None:
    model, found = evit.read(weights, CONFIG)
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(model(image), dense(image))
    assert found == {}
    assert not evit.recognises({}, weights)
    assert recognise({}, weights) is None


def test_heads_follow_from_the_width_of_a_deit() -> None:
    model = timm().models.vision_transformer.VisionTransformer(img_size=16, patch_size=8, embed_dim=128, depth=1, num_heads=2)
    assert deit.arguments(model.state_dict(), {})["num_heads"] == 2


def test_dynamicvit(weights: Weights) -> None:
    both = weights | _predictors()
    assert recognise({}, both) is IMPORTERS["dynamicvit"]
    model, found = dynamicvit.read(both, CONFIG)
    assert found == {}
    for method in ("dynamicvit", "tps"):  # which of the two a file is, only the caller knows
        pruned = models.prune(model, method, prune_loc=[0, 1], keep_ratio=0.5)
        assert pruned.trace(torch.randn(1, 3, 16, 16)).hidden[-1].shape[1] == 1 + int(16 * 0.25)


def test_ltmp(weights: Weights) -> None:
    thresholds = {
        f"blocks.{i}.{kind}_masker.threshold": torch.tensor([0.25 * (i + 1)]) for i in range(2) for kind in ("merge", "prune")
    }
    assert recognise({}, weights | thresholds) is IMPORTERS["ltmp"]
    expected = {"merge_thresholds": [0.25, 0.5], "prune_thresholds": [0.25, 0.5]}
    model, found = ltmp.read(weights | thresholds, CONFIG)
    assert found == expected
    models.prune(model, "ltmp", **found)
    assert ltmp.thresholds(thresholds) == expected
    only = {name: value for name, value in thresholds.items() if "merge" in name}
    assert ltmp.thresholds(only) == {"merge_thresholds": [0.25, 0.5]}
    with pytest.raises(ModelError, match="thresholds alone, and no model"):
        ltmp.read(thresholds, CONFIG)
    del only["blocks.0.merge_masker.threshold"]
    with pytest.raises(ModelError, match="merge_thresholds: blocks 0 have none"):
        ltmp.read(weights | only, CONFIG)
    with pytest.raises(ModelError, match=r"blocks.0.merge_masker.threshold holds 2 numbers"):
        ltmp.thresholds({"blocks.0.merge_masker.threshold": torch.zeros(2)})


def test_what_no_checkpoint_records_is_asked_for() -> None:
    with pytest.raises(UsageError, match="does not record its keep rate") as caught:
        evit.demand({})
    assert "--param base_keep_rate=0.7" in str(caught.value)
    evit.demand({"base_keep_rate": 0.7})
    with pytest.raises(UsageError, match="does not record its keep ratio") as caught:
        dynamicvit.demand({"prune_loc": [3]})
    assert "--param keep_ratio=0.7" in str(caught.value)
    dynamicvit.demand({"keep_ratio": 0.7})
    ltmp.demand({})


def test_refused_weights(weights: Weights) -> None:
    cases: list[tuple[Weights, dict[str, Any], str]] = [
        ({n: w for n, w in weights.items() if n != "pos_embed"}, CONFIG, "weights are missing for pos_embed"),
        ({n: w for n, w in weights.items() if n != "norm.bias"}, CONFIG, "weights are missing for norm.bias"),
        (weights | {"fc_norm.weight": torch.ones(24)}, CONFIG, "weights without a place: fc_norm.weight"),
        (weights | {"norm.bias": torch.zeros(7)}, CONFIG, r"norm.bias has shape \[7\], the other weights ask for \[24\]"),
        (weights | {"dist_token": torch.zeros(1, 1, 24)}, CONFIG, "the checkpoint has a distillation token"),
        (weights, {}, "the weights do not tell the number of heads: the width is 24, num_heads None"),
        (weights, {"num_heads": 5}, "the width is 24, num_heads 5"),
    ]
    for given, config, message in cases:
        with pytest.raises(ModelError, match=message):
            evit.read(given, config)
    own = _predictors()
    missing = {n: w for n, w in own.items() if n != f"{ATTRIBUTE}.1.out_conv.4.bias"}
    for predictors, message in (
        (missing, "predictor weights are missing for score_predictor.1.out_conv.4.bias"),
        (own | {f"{ATTRIBUTE}.0.extra": torch.zeros(1)}, "predictor weights have no place: score_predictor.0.extra"),
        (own | {f"{ATTRIBUTE}.0.out_conv.4.bias": torch.zeros(3)}, "predictor weights have another shape: score_predictor.0"),
    ):
        with pytest.raises(ModelError, match=message):
            dynamicvit.read(weights | predictors, CONFIG)
