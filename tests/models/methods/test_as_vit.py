"""AS-ViT against a gathered model by hand, and what it refuses, by text; the official numbers are in tests/journey."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcompile import models
from tpcompile.errors import UsageError

Tiny = Callable[..., Any]
STAGES: dict[str, Any] = {"thresholds": [0.05, 0.09], "pruning_loc": [1, 2]}


def _reference(model: Any, image: Tensor) -> tuple[list[list[int]], Tensor]:
    """One image, gathered by hand through timm's own modules: kept positions per block, and the logits."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    positions, score, kept = torch.arange(x.shape[1]), torch.zeros(x.shape[1]), []
    for index, block in enumerate(model.blocks):
        if index in STAGES["pruning_loc"]:
            stays = score > STAGES["thresholds"][STAGES["pruning_loc"].index(index)]
            stays[0] = True
            x, positions, score = x[:, stays], positions[stays], score[stays]
        kept.append(positions.tolist())
        attn = block.attn
        packed = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(packed[0] @ packed[1].mT * attn.scale, -1)[0]
        norms = (weights @ packed[2][0]).norm(dim=-1)
        score = (norms / (norms.sum(0) + 1e-8) * weights[:, 0]).sum(0)
        x = block(x)
    return kept, model.forward_head(model.norm(x))


@torch.no_grad()
def test_keeps_what_a_gathered_model_keeps(tiny_vit: Tiny, images: Tensor) -> None:
    model = tiny_vit()
    pruned = models.prune(model, "as_vit", **STAGES)
    batch = pruned.trace(images)
    dropped = 0
    for row in range(2):
        kept, logits = _reference(model, images[row : row + 1])
        assert [one[row].nonzero().flatten().tolist() for one in batch.kept] == kept
        torch.testing.assert_close(batch.outputs["logits"][row : row + 1], logits, rtol=1e-5, atol=1e-5)
        dropped += 13 - len(kept[-1])
    assert dropped


@torch.no_grad()
def test_a_sum_of_scores_decides(tiny_vit: Tiny, images: Tensor) -> None:
    model = tiny_vit(depth=5)
    plain = models.prune(model, "as_vit", thresholds=[0.0], pruning_loc=[4]).trace(images)
    accu = models.prune(model, "as_vit", thresholds=[0.0], pruning_loc=[4], accu=True).trace(images)
    before = models.prune(model, "as_vit", thresholds=[0.0], pruning_loc=[3]).trace(images)
    assert plain.scores[4] is not None
    assert accu.scores[4] is not None
    assert before.scores[3] is not None
    torch.testing.assert_close(accu.scores[4], plain.scores[4] + before.scores[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "parameters", "text"),
    [
        (
            {},
            {"thresholds": [0.1]},
            "the paper has no blocks for a model of 3\n  fix     add --param pruning_loc=[4,7,10] with your blocks",
        ),
        (
            {"depth": 12},
            {"thresholds": [0.1]},
            (
                "thresholds has 1 values, and there are 3 stages, at blocks [4, 7, 10]\n"
                "  fix     pass 3 thresholds, or other blocks with --param pruning_loc"
            ),
        ),
        (
            {},
            {"thresholds": [0.1, 0.1], "pruning_loc": [0, 1]},
            "pruning_loc is [0, 1], the model has blocks 0 to 2\n  fix     give rising block numbers from 1 to 2",
        ),
        (
            {"distilled": True},
            STAGES,
            (
                "as_vit knows a CLS token and patches, and this VisionTransformerDistilled has 2 leading tokens\n"
                "  fix     use a model without distillation and register tokens, or --method cls-attention"
            ),
        ),
        (
            {"class_token": False, "global_pool": "avg"},
            STAGES,
            (
                "as_vit scores tokens by a CLS token, and this VisionTransformer has none\n"
                "  fix     use --method ltp, which averages over all queries"
            ),
        ),
    ],
    ids=["blocks", "stages", "depth", "distilled", "no-cls"],
)
def test_refusals(options: dict[str, Any], parameters: dict[str, Any], text: str, tiny_vit: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(tiny_vit(**options), "as_vit", **parameters)
    assert str(caught.value) == text
