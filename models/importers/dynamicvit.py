"""Official checkpoints of DynamicViT (github.com/raoyongming/DynamicViT) and dTPS (github.com/megvii-research/TPS-CVPR2023).

Both hold a DeiT and one predictor per location, under the same names: which of the two a file is, the caller must say; and neither records
where it prunes, and how much.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import ModelError, UsageError
from tpcompile.models.importers import deit
from tpcompile.models.library import listed
from tpcompile.models.methods.predictor import ATTRIBUTE, attach, parts_of

NAME = "dynamicvit"
_MARK = re.compile(rf"^{ATTRIBUTE}\.\d+\.in_conv\.")


def recognises(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights hold predictors."""
    return any(_MARK.search(name) for name in weights)


def read(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        weights: the state dict, the part of the file under ``model``.
        config: see `deit.arguments`.

    Returns:
        The dense ``VisionTransformer`` with its predictors attached, and no parameters: none is recorded.

    Raises:
        ModelError: missing, extra or misshapen weights.
    """
    own = {name: weight for name, weight in weights.items() if name.startswith(f"{ATTRIBUTE}.")}
    model = deit.build({name: weight for name, weight in weights.items() if name not in own}, config)
    expected = parts_of(own, weights["cls_token"].shape[-1])
    missing, foreign = sorted(expected.keys() - own.keys()), sorted(own.keys() - expected.keys())
    wrong = [name for name, weight in own.items() if name in expected and tuple(weight.shape) != expected[name]]
    if missing or foreign or wrong:
        what = "are missing for" if missing else "have no place:" if foreign else "have another shape:"
        raise ModelError(
            f"predictor weights {what} {listed(missing or foreign or wrong)}",
            fix="pass the checkpoint as the official code saved it",
        )
    attach(model, own)
    return model, {}


def demand(parameters: Mapping[str, Any]) -> None:
    """Demand what no checkpoint records.

    Raises:
        UsageError: the ratio is not given.
    """
    if "keep_ratio" not in parameters:
        raise UsageError(
            "a checkpoint of DynamicViT or dTPS does not record its keep ratio",
            fix="add --param keep_ratio=0.7 (and --param prune_loc=[3,6,9]), as the checkpoint was trained",
        )
