"""Recipes stand where their papers stand: FLOPs of DeiT-S at 224 pixels, counted on tensors without numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tpcompile import models
from tpcompile.models.library import timm
from tpcompile.models.methods.predictor import ATTRIBUTE, Predictor
from tpcompile.recipe import Recipe, shipped

SAVED = {
    "zero-tprune-deit-s": 0.347,
    "jmp-deit-s": 0.35,
    "evit-deit-s": 1 - 3.0 / 4.6,
    "dtps-deit-s": 1 - 3.0 / 4.6,
    "dynamicvit-deit-s": 1 - 2.9 / 4.6,
    "tome-deit-s": 1 - 2.7 / 4.6,
}
"""Recipe -> the share of FLOPs that the paper saves."""


def flops(run: Callable[[Tensor], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run(torch.empty(1, 3, 224, 224, device="meta"))
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def deit_s() -> nn.Module:
    """DeiT-S with predictors for three stages."""
    timm()
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(embed_dim=384, depth=12, num_heads=6)
        model.add_module(ATTRIBUTE, nn.ModuleList(Predictor(384) for _ in range(3)))
    return model.eval()


@pytest.mark.parametrize("name", SAVED)
def test_saves_what_the_paper_saves(name: str, deit_s: nn.Module) -> None:
    recipe = Recipe.read(shipped()[name])
    assert recipe.model == "deit_small_patch16_224"
    saved = 1 - flops(models.prune(deit_s, recipe.method, **recipe.parameters)) / flops(deit_s)
    assert saved == pytest.approx(SAVED[name], abs=0.02)
