"""Heads with one row per token, and bare encoders without pooling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcompile import models
from tpcompile.models.families import find
from tpcompile.models.families.bert import ARCHITECTURES

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]
NAMES = [row.name for row in ARCHITECTURES]
OFF = [0.0] * 3


def _real(outputs: Any, mask: Tensor) -> dict[str, Tensor]:
    """The rows of real tokens: what padding holds, nobody reads, and masked form leaves it without attention."""
    return {name: value[mask.bool()] for name, value in outputs.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("theta", [0.0, 1e-5])
@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        ("ForTokenClassification", {"logits": (2, 12, 3)}),
        ("ForQuestionAnswering", {"start_logits": (2, 12), "end_logits": (2, 12)}),
    ],
)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_drops_it_is_the_library(
    name: str, head: str, shapes: dict[str, tuple[int, ...]], theta: float, tiny: Tiny, padded: Padded
) -> None:
    model = tiny(name, head=head, num_labels=3 if "logits" in shapes else 2)
    ids, mask = padded
    expected = model(input_ids=ids, attention_mask=mask)
    pruned = models.prune(model, thresholds=[theta] * 3)
    got = pruned(ids, mask)
    assert {key: tuple(value.shape) for key, value in got.items()} == shapes
    torch.testing.assert_close(_real(got, mask), _real(expected, mask), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pruned.dense(ids, mask), {key: expected[key] for key in shapes}, rtol=0, atol=0)
    assert pruned.parts.token_level


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_bare_encoder_gives_a_vector_per_token(name: str, tiny: Tiny, padded: Padded) -> None:
    encoder = tiny(name)
    ids, mask = padded
    pruned = models.prune(models.TokenEncoder(encoder), thresholds=OFF)
    expected = {"last_hidden_state": encoder(input_ids=ids, attention_mask=mask).last_hidden_state}
    torch.testing.assert_close(_real(pruned(ids, mask), mask), _real(expected, mask), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pruned.dense(ids, mask), expected, rtol=0, atol=0)
    assert find(pruned.dense).token_level


def test_other_heads_are_not_token_level(tiny: Tiny) -> None:
    for model in (tiny("bert"), tiny("bert", head=True), models.SentenceEncoder(tiny("bert"))):
        assert not find(model).token_level
