"""Tiny random models of both families, built by the libraries themselves."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile.models.families.bert import ARCHITECTURES
from tpcompile.models.library import timm, transformers

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
VIT_SIZES: dict[str, Any] = {
    "img_size": (16, 12),
    "patch_size": 4,
    "num_classes": 5,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2,
}
EXTRA: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 3},
}


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """``tiny(name, head=False)``: a small random library model in eval mode, with weights large enough to matter.

    ``head``: True for the sequence classifier, or the end of a class name, such as ``ForTokenClassification``.
    """

    def make(name: str, head: bool | str = False, **config: Any) -> nn.Module:
        transformers()
        row = next(row for row in ARCHITECTURES if row.name == name)
        ending = head if isinstance(head, str) else "ForSequenceClassification" if head else "Model"
        model_class = getattr(importlib.import_module(row.home), row.encoder.removesuffix("Model") + ending)
        torch.manual_seed(7)
        model: nn.Module = model_class(model_class.config_class(**(SIZES | EXTRA.get(name, {}) | config)))
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.endswith("LayerNorm.weight"):
                nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def tiny_vit() -> Callable[..., nn.Module]:
    """``tiny_vit(distilled=False, **options)``: a small random timm model in eval mode; 4 x 3 patches, 3 blocks, 3 heads."""

    def make(distilled: bool = False, **options: Any) -> nn.Module:
        timm()
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(7)
        model: nn.Module = (VisionTransformerDistilled if distilled else VisionTransformer)(**(VIT_SIZES | options))
        for name, parameter in model.named_parameters():
            if not name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def tiny_ast() -> nn.Module:
    """A small random AST: 12 patches in two bands of six, behind two prefix tokens; takes ``[B, 40, 16]``."""
    library = transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    grid = {"max_length": 40, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 6}
    model: nn.Module = library.ASTForAudioClassification(library.ASTConfig(**sizes, **grid, num_labels=3)).eval()
    return model


@pytest.fixture
def images() -> Tensor:
    """Two random images ``[2, 3, 16, 12]`` for ``tiny_vit``."""
    return torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Two rows of ids, the second with four pads on the right, and their mask. Id 1 pads: RoBERTa's default."""
    torch.manual_seed(3)
    ids = torch.randint(5, 60, (2, 12))
    mask = torch.ones_like(ids)
    ids[1, 8:] = 1
    mask[1, 8:] = 0
    return ids, mask
