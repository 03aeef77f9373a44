"""Vision transformers through every engine: real digits, and token counts that equal every other size there is."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tpcompile
from tpcompile import models
from tpcompile.backends import runnable
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.bundle import read, stage
from tpcompile.capture import capture
from tpcompile.compat import ensure_torchvision
from tpcompile.data.images import digits
from tpcompile.onnx.emit import emit
from tpcompile.passes import pipeline
from tpcompile.passes.cost import polynomial
from tpcompile.recipe import Recipe
from tpcompile.subject import subject_of

TARGETS = runnable()


@pytest.fixture(scope="module")
def halved() -> Compiled:
    """The shipped model at half its tokens, in batches, compiled once for every target."""
    recipe = Recipe.read(Path("digits-50"))
    return compile_subject(subject_of("tpcompile/digits-vit", None, None, recipe.method, recipe.parameters, batch="ragged"))


@pytest.mark.parametrize("target", TARGETS)
def test_digits(halved: Compiled, target: str, tmp_path: Path) -> None:
    """Every image as the masked model has it, and the accuracy of its recipe."""
    out = tmp_path / "out"
    with stage(out) as folder:
        fill(folder, halved, target)
    patches = read(out).manifest.patches
    assert patches is not None
    assert patches.spec.tokens == 65
    assert (out / "preprocessor_config.json").is_file()
    parity = tpcompile.validate(out, data="digits:test", samples=120, batch=16)
    assert parity.verdict == "PASSED"
    assert parity.flipped <= 2
    assert parity.task is not None
    assert parity.task.name == "accuracy"
    assert parity.task.pruned is not None
    assert parity.task.pruned > 0.9
    pixels, _ = digits("test")
    with tpcompile.load(out) as engine:
        images = {"pixel_values": (pixels[:3, None].astype(np.float32) / 255 - 0.5) / 0.5}
        _, kept = engine.kept_each(**images)
        assert len({one.stored for one in kept}) == 1
        assert len({one.counts for one in kept}) > 1


def vit(size: int, width: int, heads: int, cls: bool, ratio: float = 4.0) -> nn.Module:
    """A random timm ViT with patches of 16 pixels and uneven attention."""
    ensure_torchvision()
    made = importlib.import_module("timm.models.vision_transformer")
    torch.manual_seed(5)
    pool = {"class_token": True, "global_pool": "token"} if cls else {"class_token": False, "global_pool": "avg"}
    model: nn.Module = made.VisionTransformer(
        img_size=size,
        patch_size=16,
        in_chans=1,
        num_classes=5,
        embed_dim=width,
        depth=3,
        num_heads=heads,
        mlp_ratio=ratio,
        **pool,
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.mark.parametrize(
    ("size", "width", "heads", "batch", "ratio"),
    [
        (128, 128, 2, 1, 4.0),  # 64 tokens, head size 64
        (128, 64, 4, 1, 1.0),  # 64 tokens, width 64, an MLP of 64
        (64, 64, 16, 1, 4.0),  # 16 tokens, 16 heads
        (64, 32, 2, 16, 0.5),  # 16 tokens, batch 16, head size 16, an MLP of 16
    ],
    ids=["head-size", "width", "heads", "batch"],
)
def test_counts_that_coincide(size: int, width: int, heads: int, batch: int, ratio: float) -> None:
    tokens = (size // 16) ** 2
    pruned = models.prune(vit(size, width, heads, False, ratio), "ltp", thresholds=[0.9 / tokens, 0.9 / tokens, 0.8 / tokens])
    shape = (batch, 1, size, size)
    program = pipeline("one" if batch == 1 else "ragged")(capture(pruned, {"pixel_values": torch.zeros(shape)}))
    kept = 0
    for seed in range(4):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = pruned(image)["logits"]
        trace = program.trace(pixel_values=image)
        assert (trace.outputs["logits"] - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
        for got, expected in zip((trace.keep[0],), pruned.trace(image).kept[:1], strict=True):
            assert torch.equal(got, expected)
        kept += int(trace.keep[-1].sum())
    assert 0 < kept < 4 * batch * tokens * 0.9
    linear = [c for c, names in polynomial(program) if names == ("t3",)]
    projection, mean = 2 * width * width, 2 * width
    assert linear == [projection + 2 * 2 * width * int(width * ratio) + mean]  # per sample: what runs behind the last site


def test_a_fixed_count_is_in_no_shape_behind_a_site() -> None:
    """Of 197 tokens (224 pixels, DeiT's shape) nothing is left behind the first site but gathers from what stands before it.

    Optimised, the queries that are left meet all keys there: nothing is left behind the second site.
    """
    pruned = models.prune(vit(224, 32, 2, True), "cls-attention", thresholds=[0.003, 0.003, 0.0])
    image = {"pixel_values": torch.randn(1, 1, 224, 224)}
    captured = capture(pruned, image)
    for first, program in enumerate((pipeline(optimize=False)(captured), pipeline()(captured))):
        behind = False
        for node in program.graph.nodes:
            behind = behind or node.name == program.sites[first].node
            value = node.meta.get("val")
            if behind and isinstance(value, torch.Tensor) and 197 in [size for size in value.shape if isinstance(size, int)]:
                raise AssertionError(node.format_node())
    model = emit(program)
    assert model.inputs[0].shape == (1, 1, 224, 224)
    with torch.no_grad():
        want = pruned(**image)["logits"]
    assert (program(**image)["logits"] - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
