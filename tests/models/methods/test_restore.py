"""Outputs with one row per token: what a dropped token gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models import Trace
from tpcompile.ops import RESTORE

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]
THRESHOLDS = [0.04, 0.0, 0.2]


def _expected(seen: Trace, fill: str) -> Tensor:
    """Token by token: the hidden state at the first site that dropped it, zeros, or the last block's. ``[B, N, C]``."""
    rows = seen.hidden[-1].clone()
    for sample in range(rows.shape[0]):
        for token in range(rows.shape[1]):
            sites = [(kept, base) for kept, base in zip(seen.kept, seen.bases, strict=True) if base is not None]
            fell = next((base for kept, base in sites if not kept[sample, token]), None)
            if fell is not None:
                rows[sample, token] = fell[sample, token] if fill == "last" else 0.0
    return rows


@pytest.mark.parametrize("fill", ["last", "zero"])
@pytest.mark.parametrize("method", ["ltp", "cls-attention"])
@torch.no_grad()
def test_a_dropped_token_gives_the_head_of_its_last_hidden_state(method: str, fill: str, tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head="ForTokenClassification")
    seen = models.prune(model, method, thresholds=THRESHOLDS, fill=fill).trace(*padded)
    assert seen.kept[0][0].any()
    assert [int((~kept[0]).sum()) > 0 for kept in seen.kept] == [True, True, True]
    assert not torch.equal(seen.kept[0], seen.kept[2])
    torch.testing.assert_close(seen.outputs["logits"], model.classifier(_expected(seen, fill)), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_base_is_the_hidden_state_between_attention_and_feed_forward(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head="ForTokenClassification")
    ids = padded[0][:1]
    pruned = models.prune(model, thresholds=[2.0, 0.0, 0.0])
    layer = model.bert.encoder.layer[0]
    x = model.bert.embeddings(input_ids=ids)
    expected = model.classifier(layer.attention(x)[0])  # everything falls in the first block
    torch.testing.assert_close(pruned(ids)["logits"], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_zero_gives_the_bias_of_the_head(tiny: Tiny, padded: Padded) -> None:
    model = tiny("distilbert", head="ForQuestionAnswering", num_labels=2)
    seen = models.prune(model, thresholds=[2.0, 0.0, 0.1], fill="zero").trace(*padded)
    for name, bias in zip(("start_logits", "end_logits"), model.qa_outputs.bias, strict=True):
        torch.testing.assert_close(seen.outputs[name], bias.expand(2, 12))


@torch.no_grad()
def test_survivors_do_not_depend_on_the_fill(tiny: Tiny, padded: Padded) -> None:
    model = models.TokenEncoder(tiny("roberta"))
    last, zero = (models.prune(model, thresholds=THRESHOLDS, fill=fill).trace(*padded) for fill in ("last", "zero"))
    alive = last.kept[-1]
    assert alive.any()
    for seen in (last, zero):
        assert torch.equal(seen.outputs["last_hidden_state"][alive], last.hidden[-1][alive])
    dropped = ~alive
    assert not zero.outputs["last_hidden_state"][dropped].any()
    assert last.outputs["last_hidden_state"][dropped].any()


@torch.no_grad()
def test_a_vision_model_without_pooling(tiny_vit: Tiny, images: Tensor) -> None:
    model = tiny_vit(global_pool="", num_classes=0)
    seen = models.prune(model, "cls-attention", thresholds=[0.06, 0.0, 0.08]).trace(images)
    assert not torch.equal(seen.kept[0], seen.kept[2])
    torch.testing.assert_close(seen.outputs["last_hidden_state"], model.norm(_expected(seen, "last")), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("head", "sites"), [("ForTokenClassification", 2), (True, 0)])
@torch.no_grad()
def test_only_outputs_per_token_are_restored(head: str | bool, sites: int, tiny: Tiny, padded: Padded) -> None:
    from tpcompile.capture import capture

    inputs = dict(zip(("input_ids", "attention_mask"), (value[:1] for value in padded), strict=True))
    pruned = models.prune(tiny("bert", head=head), thresholds=THRESHOLDS)
    program = capture(pruned, inputs, {name: {1: "seq"} for name in inputs}, {"seq": (2, 40)})
    assert len([node for node in program.graph.nodes if node.target is RESTORE]) == sites
    shorter = {name: value[:, :7] for name, value in inputs.items()}
    torch.testing.assert_close(program(**shorter), pruned(**shorter), rtol=1e-5, atol=1e-5)


def test_unknown_fill_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="parameter fill = 'mean': input should be 'last' or 'zero'"):
        models.prune(tiny("bert", head=True), thresholds=[0.0] * 3, fill="mean")
