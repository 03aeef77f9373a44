"""Official LTMP checkpoints (github.com/Mxbonn/ltmp): a timm ViT with two thresholds a block, or the thresholds alone."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import ModelError
from tpcompile.models.importers import deit

NAME = "ltmp"
_THRESHOLD = re.compile(r"^blocks\.(\d+)\.(merge|prune)_masker\.threshold$")


def recognises(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights hold thresholds of LTMP."""
    return any(_THRESHOLD.match(name) for name in weights)


def read(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint that holds the model too.

    Args:
        weights: the state dict.
        config: see `deit.arguments`.

    Returns:
        The dense ``VisionTransformer``, and the parameters: ``merge_thresholds`` and ``prune_thresholds``, those that there are.

    Raises:
        ModelError: missing, extra or misshapen weights; thresholds for some blocks only; a file of thresholds alone.
    """
    found = thresholds(weights)
    rest = {name: weight for name, weight in weights.items() if not _THRESHOLD.match(name)}
    if not rest:
        raise ModelError(
            "the checkpoint holds thresholds alone, and no model",
            fix="load the model it was trained on, with these thresholds as its checkpoint: -m DIR --checkpoint FILE",
        )
    return deit.build(rest, config), found


def alone(weights: Mapping[str, Tensor]) -> bool:
    """Whether there is nothing but thresholds: the form in which the official tools keep what was learned."""
    return all(_THRESHOLD.match(name) for name in weights)


def thresholds(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The parameters in a checkpoint, whether it holds a model or thresholds alone.

    Raises:
        ModelError: a block has none, or one that is no number.
    """
    found: dict[str, dict[int, float]] = {}
    for name, value in weights.items():
        if (match := _THRESHOLD.match(name)) is not None:
            if value.numel() != 1:
                raise ModelError(f"{name} holds {value.numel()} numbers", fix="pass the checkpoint as the official code saved it")
            found.setdefault(f"{match[2]}_thresholds", {})[int(match[1])] = min(max(float(value), 0.0), 1.0)
    depth = 1 + max((block for values in found.values() for block in values), default=-1)
    for name, values in found.items():
        if len(values) != depth:
            missing = ", ".join(str(block) for block in range(depth) if block not in values)
            raise ModelError(f"{name}: blocks {missing} have none", fix="pass the checkpoint as the official code saved it")
    return {name: [values[block] for block in range(depth)] for name, values in sorted(found.items())}


def demand(parameters: Mapping[str, Any]) -> None:
    """A checkpoint records all that the method needs."""
