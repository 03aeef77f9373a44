"""Tiny random models of the BERT family, built by the library itself."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile.models.families.bert import ARCHITECTURES
from tpcompile.models.library import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "attn_implementation": "eager",
}
EXTRA: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 3},
}


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """``tiny(name, head=False)``: a small random library model in eval mode, with weights large enough to matter."""

    def make(name: str, head: bool = False, **config: Any) -> nn.Module:
        transformers()
        row = next(row for row in ARCHITECTURES if row.name == name)
        model_class = getattr(importlib.import_module(row.home), row.classifier if head else row.encoder)
        torch.manual_seed(7)
        model: nn.Module = model_class(model_class.config_class(**(SIZES | EXTRA.get(name, {}) | config)))
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.endswith("LayerNorm.weight"):
                nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Two rows of ids, the second with four pads on the right, and their mask. Id 1 pads: RoBERTa's default."""
    torch.manual_seed(3)
    ids = torch.randint(5, 60, (2, 12))
    mask = torch.ones_like(ids)
    ids[1, 8:] = 1
    mask[1, 8:] = 0
    return ids, mask
