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
from tpcompile.models.importers import transkimmer

Tiny = Callable[..., Any]


def _weights(model: Any, kind: str) -> dict[str, Tensor]:
    """A classifier's weights with one predictor per layer, as the official code saves them."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for layer in range(3):
        for index, shape in ((0, (24,)), (1, (24, 24)), (2, (24,)), (4, (2, 24))):
            name = f"{kind}.encoder.skim_predictors.{layer}.predictor.{index}"
            weights |= {f"{name}.weight": torch.randn(shape, generator=generator), f"{name}.bias": torch.zeros(shape[0])}
    return weights | {f"{kind}.embeddings.position_ids": torch.arange(40)[None]}


def _write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_directory_is_recognised_and_read(kind: str, tmp_path: Path, tiny: Tiny, padded: tuple[Tensor, Tensor]) -> None:
    model = tiny(kind, head=True)
    weights = _weights(model, kind)
    source = models.load(_write(tmp_path, weights, model.config.to_dict()))
    assert source.imported == ("transkimmer", {})
    logits = model(input_ids=padded[0], attention_mask=padded[1]).logits
    torch.testing.assert_close(source.model(*padded)["logits"], logits, rtol=0, atol=1e-5)
    seen = models.prune(source.model, "transkimmer", **source.parameters("transkimmer", {})).trace(*padded)
    predictor = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 2))
    predictor.load_state_dict(
        {name.split("0.predictor.")[1]: w for name, w in weights.items() if f"{kind}.encoder.skim_predictors.0." in name}
    )
    said = predictor(seen.hidden[0])
    keep = padded[1].bool() & (said[..., 1] > said[..., 0])
    keep[:, 0] = True
    assert torch.equal(seen.kept[0], keep)
    other = {name: weight + name.endswith("2.predictor.4.bias") for name, weight in weights.items()}
    (tmp_path / "other").mkdir()
    assert models.load(_write(tmp_path / "other", other, model.config.to_dict())).weights_sha256 != source.weights_sha256


def test_refusals(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny("bert", head=True)
    weights, config = _weights(model, "bert"), model.config.to_dict()
    name = "bert.encoder.skim_predictors.1.predictor.4.bias"
    for change, text in (
        (
            {name: None},
            f"weights are missing for {name}\n  fix     save the whole model again, with the head its config.json names",
        ),
        (
            {name: torch.zeros(3)},
            (
                f"{name} has shape [3], config.json asks for [2]\n"
                "  fix     config.json and the weights are of different models: save both again"
            ),
        ),
        (
            {name.replace("1.p", "3.p"): torch.zeros(2)},
            (
                "weights without a place in BertForSequenceClassification: bert.encoder.skim_predictors.3.predictor.4.bias\n"
                "  fix     the checkpoint is of another architecture than its config.json says"
            ),
        ),
    ):
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        with pytest.raises(ModelError) as caught:
            transkimmer.read(changed, config)
        assert str(caught.value) == text
    with pytest.raises(ModelError, match="Transkimmer checkpoint of BertForMaskedLM"):
        transkimmer.read(weights, config | {"architectures": ["BertForMaskedLM"]})


def test_a_dense_model_has_no_predictors(tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(tiny("bert", head=True), "transkimmer")
    assert str(caught.value) == (
        "transkimmer decides by a trained predictor per layer, and this BertForSequenceClassification carries no skim_predictors for its "
        "3 layers\n  fix     pass the directory of an official Transkimmer checkpoint as the model"
    )
