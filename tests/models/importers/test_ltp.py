import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tpcompile import models
from tpcompile.errors import ModelError, UsageError
from tpcompile.models.importers import ltp

Tiny = Callable[..., Any]
DELTAS = (0.0, 0.05, 0.07)


@pytest.fixture
def official(tiny: Tiny) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A RoBERTa classifier, and the same as the official code would save it."""
    model = tiny("roberta", head=True)
    weights = {name.replace("roberta.", "ibert.", 1): weight.clone() for name, weight in model.state_dict().items()}
    for layer, delta in enumerate(DELTAS):
        attention = f"ibert.encoder.layer.{layer}.attention.self"
        weights[f"{attention}.pruner.keep_threshold"] = torch.tensor(delta)
        weights[f"{attention}.query.weight_integer"] = torch.zeros(24, 24)
        weights[f"{attention}.query_activation.x_min"] = torch.zeros(1)
    weights["ibert.embeddings.position_ids"] = torch.arange(40)[None]
    config = {
        "model_type": "ltp",
        "architectures": ["LTPForSequenceClassification"],
        "prune_mode": "absolute_threshold",
        "final_token_threshold": 0.01,
        "quant_mode": False,
        **{name: model.config.to_dict()[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")},
        **{
            name: model.config.to_dict()[name] for name in ("num_attention_heads", "intermediate_size", "max_position_embeddings")
        },
        **{name: model.config.to_dict()[name] for name in ("type_vocab_size", "layer_norm_eps", "id2label", "label2id")},
    }
    return model, weights, config


def _write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_directory_is_recognised_and_read(tmp_path: Path, official: Any, padded: tuple[Tensor, Tensor]) -> None:
    model, weights, config = official
    source = models.load(_write(tmp_path, weights, config))
    assert source.architecture == "RobertaForSequenceClassification"
    expected = [float(torch.tensor(delta) + torch.tensor(0.01 * layer / 3)) for layer, delta in enumerate(DELTAS)]
    assert source.imported == ("ltp", {"thresholds": expected})
    logits = model(input_ids=padded[0], attention_mask=padded[1]).logits
    torch.testing.assert_close(source.model(*padded)["logits"], logits, rtol=0, atol=1e-5)
    parameters = source.parameters("ltp", {"n_ref": 12})
    assert models.prune(source.model, **parameters).method_parameters["n_ref"] == 12


def test_n_ref_is_asked_for(tmp_path: Path, official: Any) -> None:
    source = models.load(_write(tmp_path, official[1], official[2]))
    with pytest.raises(UsageError, match="does not record the padded length") as caught:
        source.parameters("ltp", {})
    assert "--param n_ref=128" in caught.value.fix


def test_recognised_by_its_keys_alone(official: Any) -> None:
    assert ltp.recognises({"model_type": "roberta"}, official[1])
    assert not ltp.recognises({"model_type": "roberta"}, {"roberta.encoder.layer.0.output.dense.bias": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prune_mode": "random"}, "prune_mode 'random'"),
        ({"prune_mode": "topk"}, "prune_mode topk and token_keep_rate None"),
        ({"quant_mode": True}, "quant_mode on"),
        ({"architectures": ["LTPForQuestionAnswering"]}, "LTP checkpoint of .*LTPForQuestionAnswering"),
        ({"final_token_threshold": None}, "final_token_threshold None"),
    ],
)
def test_other_checkpoints_are_refused(change: dict[str, Any], message: str, official: Any) -> None:
    _, weights, config = official
    with pytest.raises(ModelError, match=message):
        ltp.read(weights, config | change)


def test_a_missing_threshold_is_refused(official: Any) -> None:
    _, weights, config = official
    del weights["ibert.encoder.layer.1.attention.self.pruner.keep_threshold"]
    with pytest.raises(ModelError, match=r"has thresholds for layers \[0, 2\]"):
        ltp.read(weights, config)
