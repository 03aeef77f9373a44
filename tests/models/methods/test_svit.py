"""SViT: what is not selected keeps its state, may come back, and the map stays whole in every runtime."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models.library import timm
from tpcompile.models.methods import svit

DEPTH = 3


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """A vision transformer that gives its map, with a selector for each of two blocks."""
    timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: nn.Module = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=3, num_classes=0, global_pool=""
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
    svit.attach(model, nn.ModuleList(svit.Selector(24) for _ in range(2)))
    return model.eval()


def masked(vit: nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The method as it is trained: every block computes all tokens, and a selection takes new states or old ones."""
    parts = models.prune(vit, "ltp", thresholds=[0.0] * DEPTH).parts
    x, alive = parts.embed({"pixel_values": pixels})
    selected, selectors = [], iter(vit.get_submodule("selectors"))  # type: ignore[call-overload]
    for number, block in enumerate(parts.blocks):
        keep = alive if number == 0 else (next(selectors)(x) > 0).index_fill(1, torch.tensor(0), True)
        q, k, v = block.qkv(x)
        weights = (q @ k.mT * block.scale).masked_fill(~keep[:, None, None, :], -torch.inf).softmax(-1)
        y = block.feed_forward(block.attention_output((weights @ v).transpose(1, 2).flatten(2), x))
        x = torch.where(keep.unsqueeze(-1), y, x)
        selected += [keep] if number else []
    return parts.head(x, alive)["last_hidden_state"], selected


@torch.no_grad()
def test_the_map_is_that_of_the_masked_model(vit: nn.Module, tmp_path: Path) -> None:
    pruned = models.prune(vit, "svit", blocks=[1, 2])
    bundle = tpcompile.export(pruned, {"pixel_values": torch.randn(1, 3, 32, 32)}, tmp_path / "out")
    back = 0
    with tpcompile.load(bundle.path) as engine:
        for seed in range(4):
            pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            want, selected = masked(vit, pixels)
            outputs, kept = engine.kept(pixel_values=pixels.numpy())
            got = torch.from_numpy(outputs["last_hidden_state"])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))
            assert [mask.tolist() for mask in kept.masks] == [keep[0].tolist() for keep in selected]
            back += int((selected[1] & ~selected[0]).sum())
    assert back > 0, "no token comes back"
    assert tpcompile.validate(bundle.path).verdict == "PASSED"


def test_selectors_are_asked_for(vit: nn.Module) -> None:
    with pytest.raises(
        UsageError, match="svit needs a trained selector for each of 1 blocks, and this VisionTransformer carries 2"
    ):
        models.prune(vit, "svit", blocks=[1])
