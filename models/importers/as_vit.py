"""Official AS-ViT checkpoints (github.com/Cydia2018/AS-ViT): a DeiT, and one learned threshold per stage."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import ModelError, UsageError
from tpcompile.models.importers import deit
from tpcompile.models.methods.as_vit import LOCATIONS

NAME = "as_vit"
_THRESHOLD = re.compile(r"^score_predictor\.(\d+)\.keep_threshold$")


def recognises(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights hold thresholds of stages."""
    return any(_THRESHOLD.match(name) for name in weights)


def read(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        weights: the state dict, the part of the file under ``model``.
        config: see `deit.arguments`.

    Returns:
        The dense ``VisionTransformer``, and ``thresholds``. Where they stand is not recorded: the paper's blocks for its depths, else the
        caller's ``pruning_loc``.

    Raises:
        ModelError: weights or thresholds that are missing, have no place or have another shape.
    """
    found = {int(match[1]): value for name, value in weights.items() if (match := _THRESHOLD.match(name))}
    wrong = next((stage for stage, value in found.items() if value.numel() != 1), None)
    if wrong is not None or sorted(found) != list(range(len(found))):
        what = f"stages {sorted(found)}" if wrong is None else f"{found[wrong].numel()} numbers for stage {wrong}"
        raise ModelError(
            f"score_predictor.*.keep_threshold: {what}",
            fix="pass the checkpoint as the official code saved it: one number for each stage from 0",
        )
    model: Any = deit.build({name: weight for name, weight in weights.items() if not _THRESHOLD.match(name)}, config)
    places = LOCATIONS.get(len(model.blocks))
    known = {"pruning_loc": places} if places is not None and len(places) == len(found) else {}
    return model, {"thresholds": [float(found[stage].reshape(())) for stage in range(len(found))], **known}


def demand(parameters: Mapping[str, Any]) -> None:
    """Demand what no checkpoint records.

    Raises:
        UsageError: the stages' blocks, for a depth that the paper does not have.
    """
    if "pruning_loc" not in parameters:
        raise UsageError(
            f"an AS-ViT checkpoint does not record its {len(parameters['thresholds'])} stages' blocks, and the paper has none for this "
            "depth",
            fix="add --param pruning_loc=[4,7,10], the blocks it was trained with",
        )
