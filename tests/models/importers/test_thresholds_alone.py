"""LTMP's tools keep the thresholds alone: beside a model that has its own weights they are a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpcompile import models
from tpcompile.errors import ModelError
from tpcompile.models.importers import ltmp

Tiny = Callable[..., Any]


def _thresholds(blocks: int) -> dict[str, Tensor]:
    return {f"blocks.{b}.{kind}_masker.threshold": torch.tensor([0.1 * b]) for b in range(blocks) for kind in ("merge", "prune")}


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_thresholds_beside_a_model(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"thresholds.{ending}"
    if ending == "pth":
        torch.save({"state_dict": _thresholds(6)}, path)
    else:
        save_file(_thresholds(6), path)
    plain, source = models.load("tpcompile/digits-vit"), models.load("tpcompile/digits-vit", checkpoint=path)
    values = pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert source.imported == ("ltmp", {"merge_thresholds": values, "prune_thresholds": values})
    assert source.weights_sha256 == plain.weights_sha256
    assert models.prune(source.model, "ltmp", **source.parameters("ltmp", {})).method == "ltmp"


def test_a_directory_of_thresholds_is_no_model() -> None:
    with pytest.raises(ModelError) as caught:
        ltmp.read(_thresholds(6), {})
    assert str(caught.value) == (
        "the checkpoint holds thresholds alone, and no model\n"
        "  fix     load the model it was trained on, with these thresholds as its checkpoint: -m DIR --checkpoint FILE"
    )
