"""Official Transkimmer checkpoints (github.com/ChandlerGuan/Transkimmer): a BERT or RoBERTa with a predictor beside each of its layers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import ModelError
from tpcompile.models.families.bert import ARCHITECTURES, Architecture
from tpcompile.models.library import build, fill
from tpcompile.models.methods.transkimmer import ATTRIBUTE, attach

NAME = "transkimmer"
KINDS = ("bert", "roberta")
"""The model types that the official code has, which are the prefixes of its names too."""

_MARK = re.compile(rf"^({'|'.join(KINDS)})\.encoder\.{ATTRIBUTE}\.\d+\.predictor\.")


def recognises(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights hold predictors; ``model_type`` stays that of the backbone."""
    return any(_MARK.search(name) for name in weights)


def read(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        weights: the official state dict.
        config: the content of its config.json.

    Returns:
        The dense classifier (or question answering model, where config.json names one) with its predictors attached, and no parameters:
        the method has none. ``skim_coefficient`` is of the training only.

    Raises:
        ModelError: another head than those; weights that are missing, have no place or have another shape.
    """
    names = _architecture(weights)
    stated = (config.get("architectures") or [names.classifier])[0]
    if stated not in names.heads_by_class:
        raise ModelError(f"Transkimmer checkpoint of {stated}", fix=f"supported: {', '.join(names.heads_by_class)}")
    model: Any = build(names, stated, config)
    encoder = getattr(model, names.base).encoder
    attach(encoder, len(encoder.layer), model.config.hidden_size)
    fill(model, weights, names.base)
    return model, {}


def _architecture(weights: Mapping[str, Tensor]) -> Architecture:
    """The backbone that the names tell."""
    kind = next(found[1] for name in weights if (found := _MARK.search(name)))
    return next(row for row in ARCHITECTURES if row.name == kind)


def demand(parameters: Mapping[str, Any]) -> None:
    """A checkpoint records all that the method needs."""
