"""Official LTP checkpoints (github.com/kssteven418/LTP) to a RoBERTa classifier and our parameters.

The checkpoint stores one difference per layer; a layer's threshold is ``delta[l] + final_token_threshold * l / L``, in float32.
I-BERT's quantisation buffers beside the weights have no part in the float model.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import ModelError, UsageError
from tpcompile.models.families.bert import ARCHITECTURES
from tpcompile.models.library import build, fill

NAME = "ltp"
MODE = "absolute_threshold"
NUMBERS = {"topk": "token_keep_rate", "threshold": "token_threshold", "rising_threshold": "final_token_threshold"}
"""The other modes, with the entry of config.json that each reads."""

HEAD = "LTPForSequenceClassification"

_DELTA = re.compile(r"\.encoder\.layer\.(\d+)\.attention\.self\.pruner\.keep_threshold$")
_IGNORED = re.compile(
    r"(weight_integer|bias_integer|fc_scaling_factor|weight_scaling_factor|\.x_min|\.x_max|act_scaling_factor|LayerNorm\.shift"
    r"|embeddings\.position_ids|\.pruner\.keep_threshold)$"
)
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "num_labels",
    "id2label",
    "label2id",
)


def recognises(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether config or weights are those of an official LTP checkpoint."""
    return config.get("model_type") == NAME or any(_DELTA.search(name) for name in weights)


def read(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        weights: the official state dict.
        config: the content of its config.json.

    Returns:
        The dense ``RobertaForSequenceClassification`` in eval mode, and the parameters the checkpoint holds: ``thresholds``, or another
        mode and its number. The padded length of its training, our ``n_ref``, is recorded nowhere.

    Raises:
        ModelError: another mode or head than the one supported; missing weights or thresholds.
    """
    _refuse(config)
    names = next(row for row in ARCHITECTURES if row.name == "roberta")
    model = build(names, names.classifier, {field: config[field] for field in _FIELDS if field in config})
    backbone = {re.sub(r"^ibert\.", "roberta.", name): weight for name, weight in weights.items() if not _IGNORED.search(name)}
    fill(model, backbone, names.base)
    mode = config["prune_mode"]
    return model, {"thresholds": thresholds(weights, config)} if mode == MODE else {"prune_mode": mode, **_number(mode, config)}


def thresholds(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[float]:
    """Every layer's threshold.

    Raises:
        ModelError: a layer has none, or ``final_token_threshold`` is not in the config.
    """
    layers, final = config.get("num_hidden_layers"), config.get("final_token_threshold")
    deltas = {int(found[1]): delta for name, delta in weights.items() if (found := _DELTA.search(name)) and delta.numel() == 1}
    if not isinstance(layers, int) or not isinstance(final, int | float) or sorted(deltas) != list(range(layers)):
        raise ModelError(
            f"an LTP checkpoint of {layers} layers with final_token_threshold {final} has thresholds for layers {sorted(deltas)}",
            fix="pass config.json and weights as the official code saved them",
        )
    rises = (torch.tensor(final * layer / layers, dtype=torch.float32) for layer in range(layers))
    return [float(deltas[layer].reshape(()).float() + rise) for layer, rise in enumerate(rises)]


def _number(mode: str, config: Mapping[str, Any]) -> dict[str, float]:
    """The one number of another mode.

    Raises:
        ModelError: config.json does not hold it.
    """
    number = config.get(NUMBERS[mode])
    if not isinstance(number, int | float):
        raise ModelError(
            f"LTP checkpoint with prune_mode {mode} and {NUMBERS[mode]} {number}", fix=f"put {NUMBERS[mode]} into config.json"
        )
    return {NUMBERS[mode]: float(number)}


def demand(parameters: Mapping[str, Any]) -> None:
    """Demand what no checkpoint records.

    Raises:
        UsageError: ``n_ref`` is not given.
    """
    if "n_ref" not in parameters and parameters.get("prune_mode", MODE) == MODE:
        raise UsageError(
            "an official LTP checkpoint does not record the padded length of its training, and its thresholds depend on it",
            fix="add --param n_ref=128 (n_ref=128 in Python), the official script's length, or the length you trained with",
        )


def _refuse(config: Mapping[str, Any]) -> None:
    """Refuse checkpoints that compute something else."""
    if config.get("prune_mode") not in (MODE, *NUMBERS):
        raise ModelError(
            f"LTP checkpoint with prune_mode {config.get('prune_mode')!r}", fix=f"supported: {', '.join((MODE, *NUMBERS))}"
        )
    if config.get("quant_mode"):
        raise ModelError("LTP checkpoint with quant_mode on (integer I-BERT)", fix="save it with quant_mode false")
    if config.get("architectures", [HEAD]) != [HEAD]:
        raise ModelError(f"LTP checkpoint of {config['architectures']}", fix=f"only {HEAD} is supported")
