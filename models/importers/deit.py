"""Weights under the names of DeiT and timm, as the official vision code saves them, to a timm ``VisionTransformer``.

Every size is read from the weights but one: the number of heads, which only a config records (DeiT: one for each 64 of the width).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import ModelError
from tpcompile.models.library import listed, timm

HEAD_SIZE = 64
"""Width of a head in every DeiT."""


def arguments(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the model.

    Args:
        weights: the state dict.
        config: ``num_heads`` and ``img_size`` are read, where they are given.

    Raises:
        ModelError: weights of another kind of model, or a width that does not tell the number of heads.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ModelError(
            f"weights are missing for {listed(missing)}",
            fix="pass the state dict of a DeiT, the part of the checkpoint under 'model'",
        )
    if "dist_token" in weights:
        raise ModelError(
            "the checkpoint has a distillation token", fix="pass a checkpoint without one: pruning methods start from it"
        )
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
    heads = config.get("num_heads", width // HEAD_SIZE if width % HEAD_SIZE == 0 else None)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ModelError(
            f"the weights do not tell the number of heads: the width is {width}, num_heads {heads}",
            fix='put "num_heads" into config.json',
        )
    return {
        "img_size": config.get("img_size", grid * patch),
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": weights["head.weight"].shape[0] if "head.weight" in weights else 0,
        "embed_dim": width,
        "depth": 1 + max(int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))),
        "num_heads": heads,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }


def build(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """The model with its weights, in eval mode; torch's random state is left as it was.

    Args:
        weights: the state dict, without the method's own entries.
        config: see `arguments`.

    Raises:
        ModelError: weights are missing, have no place, or have another shape.
    """
    given = arguments(weights, config)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = timm().models.vision_transformer.VisionTransformer(**given)
    expected = model.state_dict()
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or foreign:
        what = f"weights are missing for {listed(missing)}" if missing else f"weights without a place: {listed(foreign)}"
        raise ModelError(what, fix="pass the checkpoint as the official code saved it, of a DeiT without LayerScale")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ModelError(
                f"{name} has shape {list(weight.shape)}, the other weights ask for {list(expected[name].shape)}",
                fix="pass the checkpoint as the official code saved it",
            )
    model.load_state_dict(dict(weights))
    return model.eval()
