import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpcompile import models
from tpcompile.errors import ModelError, UsageError
from tpcompile.models.importers import as_vit

Tiny = Callable[..., Any]


def _weights(model: Any, stages: int = 3) -> dict[str, Tensor]:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return weights | {f"score_predictor.{stage}.keep_threshold": torch.tensor(0.01 * (stage + 1)) for stage in range(stages)}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@torch.no_grad()
def test_directory_is_recognised_and_read(file: str, tmp_path: Path, tiny_vit: Tiny) -> None:
    model = tiny_vit(depth=12, img_size=16)
    if file.endswith("bin"):
        torch.save({"model": _weights(model), "epoch": 3}, tmp_path / file)
    else:
        save_file(_weights(model), tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3}), encoding="utf-8")
    source = models.load(tmp_path)
    name, parameters = source.imported or ("", {})
    assert name == "as_vit"
    assert parameters == {"thresholds": pytest.approx([0.01, 0.02, 0.03]), "pruning_loc": [4, 7, 10]}
    assert source.patches is not None
    assert source.patches.tokens == 17
    pixels = source.example["pixel_values"]
    torch.testing.assert_close(source.model(pixels)["logits"], model(pixels), rtol=0, atol=1e-5)
    assert models.prune(source.model, "as_vit", **source.parameters("as_vit", {})).trace(pixels).scores[4] is not None


def test_blocks_are_asked_for(tiny_vit: Tiny) -> None:
    _, parameters = as_vit.read(_weights(tiny_vit(img_size=16), 2), {"num_heads": 3})
    with pytest.raises(UsageError) as caught:
        as_vit.demand(parameters)
    assert str(caught.value) == (
        "an AS-ViT checkpoint does not record its 2 stages' blocks, and the paper has none for this depth\n"
        "  fix     add --param pruning_loc=[4,7,10], the blocks it was trained with"
    )


def test_a_checkpoint_of_a_model_by_name(tmp_path: Path) -> None:
    from tpcompile.models.library import timm

    torch.manual_seed(0)
    weights = _weights(timm().create_model("deit_tiny_patch16_224"))
    torch.save({"model": weights}, tmp_path / "asvit.pth")
    source = models.load("timm/deit_tiny_patch16_224", checkpoint=tmp_path / "asvit.pth")
    assert source.imported is not None
    assert source.imported[0] == "as_vit"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"score_predictor.1.keep_threshold": None},
            (
                "score_predictor.*.keep_threshold: stages [0, 2]\n"
                "  fix     pass the checkpoint as the official code saved it: one number for each stage from 0"
            ),
        ),
        (
            {"score_predictor.1.keep_threshold": torch.zeros(2)},
            (
                "score_predictor.*.keep_threshold: 2 numbers for stage 1\n"
                "  fix     pass the checkpoint as the official code saved it: one number for each stage from 0"
            ),
        ),
        (
            {"blocks.1.norm1.bias": None},
            (
                "weights are missing for blocks.1.norm1.bias\n"
                "  fix     pass the checkpoint as the official code saved it, of a DeiT without LayerScale"
            ),
        ),
        (
            {"blocks.1.norm3.bias": torch.zeros(2)},
            (
                "weights without a place: blocks.1.norm3.bias\n"
                "  fix     pass the checkpoint as the official code saved it, of a DeiT without LayerScale"
            ),
        ),
    ],
    ids=["stage", "numbers", "missing", "foreign"],
)
def test_other_checkpoints_are_refused(change: dict[str, Any], text: str, tiny_vit: Tiny) -> None:
    changed = {name: w for name, w in (_weights(tiny_vit(img_size=16)) | change).items() if w is not None}
    with pytest.raises(ModelError) as caught:
        as_vit.read(changed, {"num_heads": 3})
    assert str(caught.value) == text
