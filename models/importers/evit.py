"""Official EViT checkpoints (github.com/youweiliang/evit): DeiT's names, and nothing of the method: rate and places are the caller's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import UsageError
from tpcompile.models.importers import deit

NAME = "evit"


def recognises(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Never: an EViT checkpoint looks like any DeiT's."""
    return config.get("method") == NAME


def read(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        weights: the state dict, the part of the file under ``model``.
        config: see `deit.arguments`.

    Returns:
        The dense ``VisionTransformer`` and no parameters: none is recorded.

    Raises:
        ModelError: missing, extra or misshapen weights.
    """
    return deit.build(weights, config), {}


def demand(parameters: Mapping[str, Any]) -> None:
    """Demand what no checkpoint records.

    Raises:
        UsageError: the keep rate is not given.
    """
    if "base_keep_rate" not in parameters:
        raise UsageError(
            "an EViT checkpoint does not record its keep rate",
            fix="add --param base_keep_rate=0.7 (and --param drop_loc=[3,6,9]), as the checkpoint was trained",
        )
