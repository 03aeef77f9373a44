from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpcompile import models
from tpcompile.errors import UsageError

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]


@torch.no_grad()
def test_first_score_is_the_librarys_mean_attention(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head=True)
    ids = padded[0][:1]
    seen = models.prune(model, thresholds=[1e-5] * 3, n_ref="padded").trace(ids)
    expected = model(input_ids=ids, output_attentions=True).attentions[0].mean(dim=(1, 2))
    assert seen.scores[0] is not None
    torch.testing.assert_close(seen.scores[0], expected, rtol=0, atol=1e-6)


def test_length_ignores_padding_and_batch(tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("roberta", head=True), thresholds=[0.06, 0.09, 0.12])
    ids, mask = padded
    batch, alone = pruned.trace(ids, mask), pruned.trace(ids[1:, :8])
    assert [int(kept.sum()) for kept in alone.kept] != [8, 8, 8]
    for in_batch, single in zip(batch.kept, alone.kept, strict=True):
        assert torch.equal(in_batch[1, :8], single[0])
        assert not in_batch[1, 8:].any()
    torch.testing.assert_close(batch.outputs["logits"][1:], alone.outputs["logits"], rtol=0, atol=1e-5)


def test_padded_depends_on_padding_and_equals_that_number(tiny: Tiny, padded: Padded) -> None:
    ids, mask = padded
    row = (ids[1:], mask[1:])
    model = tiny("bert", head=True)
    official = models.prune(model, thresholds=[0.06] * 3, n_ref="padded")
    number = models.prune(model, thresholds=[0.06] * 3, n_ref=12)
    length = models.prune(model, thresholds=[0.06] * 3)
    seen, same = official.trace(*row), number.trace(*row)
    torch.testing.assert_close((seen.outputs, seen.scores), (same.outputs, same.scores), rtol=0, atol=0)
    score, own = seen.scores[0], length.trace(*row).scores[0]
    assert score is not None
    assert own is not None
    torch.testing.assert_close(score * 12, own * 8)


@torch.no_grad()
def test_a_fallen_first_token_computes_on_and_is_read(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head=True)
    ids = padded[0][:1]
    scores = models.prune(model, thresholds=[1e-5] * 3).trace(ids).scores[0]
    assert scores is not None
    theta = float(scores[0, 0]) + 1e-4
    pruned = models.prune(model, thresholds=[theta, 0.0, 0.0])
    seen = pruned.trace(ids)
    assert not seen.kept[0][0, 0]
    assert seen.kept[0].any()
    # The zombie's attention context is 0: its attention output is LayerNorm(bias + itself).
    layer = model.bert.encoder.layer[1]
    cls = seen.hidden[1][:, :1]
    expected = layer.attention.output.LayerNorm(layer.attention.output.dense.bias + cls)
    expected = layer.output.LayerNorm(layer.output.dense(layer.intermediate(expected)) + expected)
    torch.testing.assert_close(seen.hidden[2][:, :1], expected, rtol=0, atol=1e-5)
    # Nobody attends to it: the survivors do not change with what it holds.
    changed = seen.hidden[1].clone()
    changed[:, 0] += 1.0
    step = pruned.body.steps[1]
    score_of = pruned.body.score(seen.hidden[1], seen.kept[0])
    alive = seen.kept[0]
    before, after = (step(x, alive, score_of, alive).x for x in (seen.hidden[1], changed))
    torch.testing.assert_close(before[alive], after[alive], rtol=0, atol=0)


def test_everything_may_die(tiny: Tiny, padded: Padded) -> None:
    seen = models.prune(models.SentenceEncoder(tiny("bert")), thresholds=[2.0, 0.1, 0.1]).trace(*padded)
    assert not any(kept.any() for kept in seen.kept)
    assert torch.equal(seen.outputs["sentence_embedding"], torch.zeros(2, 24))
    assert all(hidden.isfinite().all() for hidden in seen.hidden)


def test_a_tie_is_kept_and_decisions_are_float32(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head=True)
    ids = padded[0][:1]
    scores = models.prune(model, thresholds=[1e-5] * 3).trace(ids).scores[0]
    assert scores is not None
    tied = float(scores[0, 4])
    pruned = models.prune(model, thresholds=[tied, 0.0, 0.0])
    assert pruned.body.steps[0].threshold.dtype == torch.float32
    assert torch.equal(pruned.trace(ids).kept[0], scores >= scores[0, 4])
    above = float(torch.nextafter(scores[0, 4], torch.tensor(1.0)))
    assert not models.prune(model, thresholds=[above, 0.0, 0.0]).trace(ids).kept[0][0, 4]


def test_tokens_never_return_and_zero_switches_off(tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("electra", head=True), thresholds=[0.08, 0.0, 0.1])
    seen = pruned.trace(*padded)
    assert seen.scores[1] is None
    assert torch.equal(seen.kept[0], seen.kept[1])
    assert not (seen.kept[2] & ~seen.kept[1]).any()
    assert len(seen.hidden) == 4


def test_below_the_floor_is_the_floor(tiny: Tiny) -> None:
    pruned = models.prune(tiny("bert", head=True), thresholds=[1e-9, 1e-60, 0.5])
    assert [step.active for step in pruned.body.steps] == [True, False, True]
    assert pruned.body.steps[0].threshold == torch.tensor(1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ltq", "thresholds": [0.1] * 3}, "unknown method 'ltq' (did you mean 'ltp'?)"),
        ({"treshold": [0.1] * 3}, "unknown parameter 'treshold' (did you mean 'thresholds'?)"),
        ({}, "parameter 'thresholds' is required"),
        ({"thresholds": [0.1, 0.2]}, "thresholds has 2 values, the model has 3 layers"),
        ({"thresholds": [0.1, -0.2, 0.0]}, "thresholds[1] = -0.2: input should be greater than or equal to 0"),
        ({"thresholds": [0.1, float("nan"), 0.0]}, "thresholds[1] = nan: input should be"),
        ({"thresholds": [0.1] * 3, "n_ref": 0}, "n_ref = 0"),
        ({"thresholds": [0.1] * 3, "n_ref": "long"}, "n_ref = 'long'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(tiny("bert", head=True), **arguments)
    assert message in str(caught.value)
    assert caught.value.fix


def test_training_mode_and_other_types_are_refused(tiny: Tiny) -> None:
    model = tiny("bert", head=True)
    with pytest.raises(UsageError, match="training mode"):
        models.prune(model.train(), thresholds=[0.1] * 3)
    with pytest.raises(UsageError, match=r"is torch\.bfloat16, not float32"):
        models.prune(model.eval().bfloat16(), thresholds=[0.1] * 3)


def test_parameters_are_recorded(tiny: Tiny) -> None:
    pruned = models.prune(tiny("bert", head=True), thresholds=[0, 0.1, 0.2])
    assert pruned.method_parameters == {
        "thresholds": [0.0, 0.1, 0.2],
        "n_ref": "length",
        "protect": "none",
        "prune_mode": "absolute_threshold",
        "fill": "last",
    }


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("n_ref", ["length", "padded", 16])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_exports_with_a_dynamic_length(name: str, n_ref: int | str, tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny(name, head=True), thresholds=[0.08, 0.0, 0.1], n_ref=n_ref)
    ids = padded[0][:1]
    seq = torch.export.Dim("seq", min=2, max=38)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        exported = torch.export.export(
            pruned,
            (),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            strict=False,
            dynamic_shapes={"input_ids": {1: seq}, "attention_mask": {1: seq}},
        )
        nodes = [node for node in exported.graph.nodes if node.target is torch.ops.tpcompile.prune.default]
        places = [list(node.meta["nn_module_stack"].values())[-1][0] for node in nodes]
        assert places == ["body.steps.0", "body.steps.2"]
        shorter = padded[0][1:, :8]
        mask = torch.ones_like(shorter)
        got = exported.module()(input_ids=shorter, attention_mask=mask)["logits"]
        torch.testing.assert_close(got, pruned(shorter, mask)["logits"], rtol=0, atol=1e-6)
