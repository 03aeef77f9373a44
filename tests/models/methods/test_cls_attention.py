from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models import Trace

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]
THETA = [0.05, 0.0, 0.09]


def _reference(
    model: Any, images: Tensor, thresholds: list[float], received: bool, prefix: int
) -> tuple[list[list[int]], Tensor]:
    """One image, gathered by hand through timm's own modules: kept positions per block, and the tokens left ``[1, K, C]``."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    positions, total, kept = list(range(x.shape[1])), x.shape[1], []
    for block, theta in zip(model.blocks, thresholds, strict=True):
        attn, h = block.attn, block.norm1(x)
        packed = attn.qkv(h).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = attn.q_norm(packed[0]), attn.k_norm(packed[1])
        weights = torch.softmax(query @ key.mT * attn.scale, -1)[0]  # [H, K, K]
        x = x + block.ls1(attn(h))
        if theta:
            scores = weights.mean(0).sum(0) / total if received else weights[:, 0].mean(0)
            stays = [i for i, place in enumerate(positions) if place < prefix or float(scores[i]) >= theta]
            x, positions = x[:, stays], [positions[i] for i in stays]
        kept.append(positions)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return kept, x


def _positions(seen: Trace) -> list[list[int]]:
    return [kept[0].nonzero().flatten().tolist() for kept in seen.kept]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distilled": True},
        {"reg_tokens": 2},
        {"qk_norm": True, "init_values": 0.5},
        {"no_embed_class": True, "pre_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(("method", "parameters"), [("cls-attention", {}), ("ltp", {"protect": "prefix"}), ("ltp", {})])
@torch.no_grad()
def test_keeps_what_a_gathered_model_keeps(
    method: str, parameters: dict[str, str], options: dict[str, Any], tiny_vit: Tiny, images: Tensor
) -> None:
    model = tiny_vit(**options)
    pruned = models.prune(model, method, thresholds=THETA, **parameters)
    batch = pruned.trace(images)
    prefix = pruned.parts.prefix if method == "cls-attention" or parameters else 0
    dropped = 0
    for row in range(2):
        seen = pruned.trace(images[row : row + 1])
        kept, x = _reference(model, images[row : row + 1], THETA, received=method == "ltp", prefix=prefix)
        assert _positions(seen) == kept
        assert all(torch.equal(one[row], alone[0]) for one, alone in zip(batch.kept, seen.kept, strict=True))
        torch.testing.assert_close(seen.hidden[-1][:, kept[-1]], x, rtol=1e-5, atol=1e-5)
        dropped += seen.hidden[0].shape[1] - len(kept[-1])
        if 0 in kept[-1]:
            logits = model.forward_head(model.norm(x))
            torch.testing.assert_close(seen.outputs["logits"], logits, rtol=1e-5, atol=1e-5)
    assert dropped


@torch.no_grad()
def test_average_pooling_is_the_mean_of_the_patches_left(tiny_vit: Tiny, images: Tensor) -> None:
    model = tiny_vit(global_pool="avg", reg_tokens=1)
    seen = models.prune(model, "cls-attention", thresholds=THETA).trace(images[:1])
    kept, x = _reference(model, images[:1], THETA, received=False, prefix=2)
    assert 2 < len(kept[-1]) < 14
    expected = model.head(model.fc_norm(x[:, 2:].mean(1)))
    torch.testing.assert_close(seen.outputs["logits"], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_score_is_the_librarys_cls_row(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head=True)
    ids, mask = padded
    seen = models.prune(model, "cls-attention", thresholds=[1e-5] * 3).trace(ids, mask)
    expected = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[0][:, :, 0].mean(1)
    assert seen.scores[0] is not None
    torch.testing.assert_close(seen.scores[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(seen.kept[-1], mask.bool())


@pytest.mark.parametrize(("method", "parameters"), [("cls-attention", {}), ("ltp", {"protect": "prefix"})])
def test_the_prefix_never_falls_and_padding_never_rises(
    method: str, parameters: dict[str, str], tiny: Tiny, tiny_vit: Tiny, padded: Padded, images: Tensor
) -> None:
    vit = models.prune(tiny_vit(reg_tokens=2), method, thresholds=[2.0] * 3, **parameters).trace(images)
    assert _positions(vit) == [[0, 1, 2]] * 3
    text = models.prune(tiny("bert", head=True), method, thresholds=[2.0] * 3, **parameters)
    assert _positions(text.trace(*padded)) == [[0]] * 3
    mask = padded[1].clone()
    mask[:, 0] = 0
    assert not text.trace(padded[0], mask).kept[0].any()


@torch.no_grad()
def test_a_tie_is_kept(tiny_vit: Tiny, images: Tensor) -> None:
    model = tiny_vit()
    scores = models.prune(model, "cls-attention", thresholds=[1e-5] * 3).trace(images[:1]).scores[0]
    assert scores is not None
    tied = scores[0, 4]
    above = torch.nextafter(tied, torch.tensor(1.0))
    for theta, stays in ((tied, True), (above, False)):
        kept = models.prune(model, "cls-attention", thresholds=[float(theta), 0.0, 0.0]).trace(images[:1]).kept[0]
        assert bool(kept[0, 4]) == stays


def test_a_model_without_cls_is_refused(tiny_vit: Tiny) -> None:
    for options in ({}, {"reg_tokens": 2}):
        with pytest.raises(UsageError, match="this VisionTransformer has none") as caught:
            models.prune(tiny_vit(class_token=False, global_pool="avg", **options), "cls-attention", thresholds=[0.1] * 3)
        assert caught.value.fix.startswith("use --method ltp")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"thresholds": [0.1] * 2}, "thresholds has 2 values, the model has 3 layers"),
        ({"thresholds": [0.1] * 3, "n_ref": "length"}, "method cls-attention: unknown parameter 'n_ref'"),
        ({}, "parameter 'thresholds' is required"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, Any], message: str, tiny_vit: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(tiny_vit(), "cls-attention", **parameters)
    assert message in str(caught.value)
    assert caught.value.fix


def test_unknown_protection_is_refused(tiny_vit: Tiny) -> None:
    with pytest.raises(UsageError, match="parameter protect = 'cls': input should be 'none' or 'prefix'"):
        models.prune(tiny_vit(), "ltp", thresholds=[0.1] * 3, protect="cls")
