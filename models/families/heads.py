"""Heads of the BERT family: the library's own output modules, called on hidden states ``[B, N, C]``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def classify_pooled(model: Any, encoder: Any, x: Tensor) -> Tensor:
    """BERT: pooler of the first token, then a linear classifier. ``[B, N, C] -> [B, L]``."""
    logits: Tensor = model.classifier(encoder.pooler(x))
    return logits


def classify_all(model: Any, encoder: Any, x: Tensor) -> Tensor:
    """RoBERTa, ELECTRA: a classification head that takes the first token itself. ``[B, N, C] -> [B, L]``."""
    logits: Tensor = model.classifier(x)
    return logits


def classify_first(model: Any, encoder: Any, x: Tensor) -> Tensor:
    """DistilBERT: first token, linear, ReLU, linear. ``[B, N, C] -> [B, L]``."""
    logits: Tensor = model.classifier(nn.functional.relu(model.pre_classifier(x[:, 0])))
    return logits


def _spans(model: Any, encoder: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Where an answer starts and ends. ``[B, N, C] -> [B, N], [B, N]``."""
    logits: Tensor = model.qa_outputs(x)
    return logits[..., 0], logits[..., 1]


@dataclass(frozen=True, slots=True)
class Head:
    """What stands behind the last block.

    Attributes:
        outputs: names, as the library gives them.
        token_level: the outputs have one row per token.
        compute: (model, encoder, hidden states ``[B, N, C]``) to one tensor per output.
    """

    outputs: tuple[str, ...]
    token_level: bool
    compute: Callable[[Any, Any, Tensor], tuple[Tensor, ...]]


def classifier(logits: Callable[[Any, Any, Tensor], Tensor]) -> Head:
    """The head of a sequence classifier."""
    return Head(("logits",), False, lambda model, encoder, x: (logits(model, encoder, x),))


TOKENS = Head(("logits",), True, lambda model, encoder, x: (model.classifier(x),))
"""Token classification: ``logits [B, N, L]``."""

SPANS = Head(("start_logits", "end_logits"), True, _spans)
"""Question answering: ``start_logits``, ``end_logits``, each ``[B, N]``."""

HIDDEN = Head(("last_hidden_state",), True, lambda model, encoder, x: (x,))
"""A bare encoder without pooling: ``last_hidden_state [B, N, C]``."""

POOLED = Head(("pooler_output",), False, lambda model, encoder, x: (encoder.pooler(x),))
"""A bare encoder with its own pooler: ``pooler_output [B, C]``."""
