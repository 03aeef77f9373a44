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
    with pytest.raises(UsageError) as caught:
        evit.demand({"drop_loc": [3]})
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "an EViT checkpoint does not record its keep rate\n"
        "  fix     add --param base_keep_rate=0.7 (and --param drop_loc=[3,6,9]), as the checkpoint was trained"
    )
    evit.demand({"base_keep_rate": 0.7})
    with pytest.raises(UsageError) as caught:
        dynamicvit.demand({"prune_loc": [3]})
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "a checkpoint of DynamicViT or dTPS does not record its keep ratio\n"
        "  fix     add --param keep_ratio=0.7 (and --param prune_loc=[3,6,9]), as the checkpoint was trained"
    )
    dynamicvit.demand({"keep_ratio": 0.7})
    ltmp.demand({})


SAVED = "pass the checkpoint as the official code saved it"
PLAIN = f"{SAVED}, of a DeiT without LayerScale"
STATE = "pass the state dict of a DeiT, the part of the checkpoint under 'model'"
HEADS = 'put "num_heads" into config.json'
DIST = "pass a checkpoint without one: pruning methods start from it"
REFUSED: dict[str, tuple[tuple[str, ...], Weights, dict[str, Any], str, str]] = {
    "positions": (("pos_embed",), {}, CONFIG, "weights are missing for pos_embed", STATE),
    "wrapped": (
        ("pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"),
        {},
        CONFIG,
        "weights are missing for patch_embed.proj.weight, pos_embed, cls_token and 1 more",
        STATE,
    ),
    "missing": (("norm.bias",), {}, CONFIG, "weights are missing for norm.bias", PLAIN),
    "foreign": ((), {"blocks.0.ls1.gamma": torch.ones(24)}, CONFIG, "weights without a place: blocks.0.ls1.gamma", PLAIN),
    "shape": ((), {"norm.bias": torch.zeros(7)}, CONFIG, "norm.bias has shape [7], the other weights ask for [24]", SAVED),
    "distilled": ((), {"dist_token": torch.zeros(1, 1, 24)}, CONFIG, "the checkpoint has a distillation token", DIST),
    "heads": ((), {}, {}, "the weights do not tell the number of heads: the width is 24, num_heads None", HEADS),
    "uneven": ((), {}, {"num_heads": 5}, "the weights do not tell the number of heads: the width is 24, num_heads 5", HEADS),
}
"""Case -> weights left out, weights put in, the config; what is said, and the fix."""


@pytest.mark.parametrize("importer", [evit, dynamicvit], ids=["evit", "dynamicvit"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_weights(case: str, importer: Any, weights: Weights) -> None:
    without, more, config, message, fix = REFUSED[case]
    given = {name: weight for name, weight in (weights | more).items() if name not in without}
    own = _predictors() if importer is dynamicvit else {}
    with pytest.raises(ModelError) as caught:
        importer.read(given | own, config)
    assert caught.value.exit_code == 4
    assert str(caught.value) == f"{message}\n  fix     {fix}"


@pytest.mark.parametrize(
    ("without", "more", "message"),
    [
        ("1.out_conv.4.bias", {}, "predictor weights are missing for score_predictor.1.out_conv.4.bias"),
        ("", {"0.extra": torch.zeros(1)}, "predictor weights have no place: score_predictor.0.extra"),
        ("", {"0.out_conv.4.bias": torch.zeros(3)}, "predictor weights have another shape: score_predictor.0.out_conv.4.bias"),
        ("1.in_conv.0.weight", {"0.extra": torch.zeros(1)}, "predictor weights are missing for score_predictor.1.in_conv.0.weight"),
    ],
    ids=["missing", "foreign", "shape", "both"],
)
def test_refused_predictors(without: str, more: Weights, message: str, weights: Weights) -> None:
    own = _predictors() | {f"{ATTRIBUTE}.{name}": weight for name, weight in more.items()}
    own = {name: weight for name, weight in own.items() if name != f"{ATTRIBUTE}.{without}"}
    with pytest.raises(ModelError) as caught:
        dynamicvit.read(weights | own, CONFIG)
    assert caught.value.exit_code == 4
    assert str(caught.value) == f"{message}\n  fix     {SAVED}"


def test_predictors_without_a_number_or_out_of_the_row_are_refused(weights: Weights) -> None:
    own = _predictors()
    first = f"{ATTRIBUTE}.0.in_conv.0.bias, {ATTRIBUTE}.0.in_conv.0.weight, {ATTRIBUTE}.0.in_conv.1.bias and"
    far = {name.replace(f"{ATTRIBUTE}.1.", f"{ATTRIBUTE}.1000000000."): weight for name, weight in own.items()}
    for predictors, message in (
        (own | {f"{ATTRIBUTE}.extra": torch.zeros(1)}, f"predictor weights have no place: {ATTRIBUTE}.extra"),
        (far, f"predictor weights are missing for {first.replace('.0.in', '.1.in')} {len(own) // 2 - 3} more"),
        ({}, f"predictor weights are missing for {first} {len(own) // 2 - 3} more"),
    ):
        with pytest.raises(ModelError) as caught:
            dynamicvit.read(weights | predictors, CONFIG)
        assert str(caught.value) == f"{message}\n  fix     {SAVED}"
