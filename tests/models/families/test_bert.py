import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile import models
from tpcompile.errors import InputError, ModelError, UsageError
from tpcompile.models.families import FAMILIES, Dense, find
from tpcompile.models.families.bert import ARCHITECTURES

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]
NAMES = [row.name for row in ARCHITECTURES]


@pytest.mark.parametrize("theta", [0.0, 1e-5])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_classifier_without_drops_is_the_library(name: str, theta: float, tiny: Tiny, padded: Padded) -> None:
    model = tiny(name, head=True)
    ids, mask = padded
    pruned = models.prune(model, thresholds=[theta] * 3)
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(pruned(ids, mask)["logits"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pruned.dense(ids, mask)["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sentence_encoder_without_drops_is_the_library(name: str, pooling: str, tiny: Tiny, padded: Padded) -> None:
    encoder = tiny(name)
    ids, mask = padded
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    vectors = [hidden[0].mean(0), hidden[1, :8].mean(0)] if pooling == "mean" else [hidden[0, 0], hidden[1, 0]]
    expected = torch.stack([vector / vector.norm() for vector in vectors])
    dense = models.SentenceEncoder(encoder, pooling)
    pruned = models.prune(dense, thresholds=[1e-5] * 3)
    torch.testing.assert_close(dense(ids, mask)["sentence_embedding"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pruned(ids, mask)["sentence_embedding"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@torch.no_grad()
def test_bare_encoder_with_pooler(name: str, tiny: Tiny, padded: Padded) -> None:
    model = tiny(name)
    ids, mask = padded
    pruned = models.prune(model, thresholds=[1e-5] * 3)
    expected = model(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(pruned(ids, mask)["pooler_output"], expected, rtol=0, atol=1e-5)
    assert list(pruned.dense(ids, mask)) == ["pooler_output"]


@torch.no_grad()
def test_token_types_reach_the_embedding(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head=True)
    ids, mask = padded
    types = torch.zeros_like(ids)
    types[:, 5:] = 1
    got = models.prune(model, thresholds=[1e-5] * 3)(ids, mask, types)["logits"]
    torch.testing.assert_close(got, model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits, rtol=0, atol=1e-5)
    assert (got - model(input_ids=ids, attention_mask=mask).logits).abs().max() > 1e-2


@torch.no_grad()
def test_no_mask_means_every_token(tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("electra", head=True), thresholds=[0.05] * 3)
    ids = padded[0]
    torch.testing.assert_close(pruned(ids), pruned(ids, torch.ones_like(ids)))


def test_distilbert_refuses_token_types(tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("distilbert", head=True), thresholds=[0.0] * 3)
    types = torch.zeros_like(padded[0])
    with pytest.raises(InputError, match="takes no token_type_ids"):
        pruned(*padded, token_type_ids=types)
    with pytest.raises(InputError, match="3 inputs given, the model takes input_ids, attention_mask"):
        pruned(*padded, types)
    with pytest.raises(InputError, match="takes no token_type_ids"):
        pruned.dense(*padded, types)


def test_inputs_go_by_position_or_by_name(tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("bert", head=True), thresholds=[0.05] * 3)
    ids, mask = padded
    expected = pruned(ids, mask)["logits"]
    assert torch.equal(pruned(ids, attention_mask=mask)["logits"], expected)
    assert torch.equal(pruned(attention_mask=mask, input_ids=ids, token_type_ids=None)["logits"], expected)
    assert torch.equal(copy.deepcopy(pruned)(ids, mask)["logits"], expected)
    with pytest.raises(InputError, match="input_ids is missing") as caught:
        pruned(attention_mask=mask)
    assert caught.value.fix == "pass input_ids: the model takes input_ids, attention_mask, token_type_ids"
    with pytest.raises(InputError, match="input_ids is given twice"):
        pruned(ids, input_ids=ids)
    with pytest.raises(InputError, match="the model takes no pixel_values"):
        pruned.trace(ids, pixel_values=ids)


def test_a_mask_of_four_dims_is_refused(tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("bert", head=True), thresholds=[0.0] * 3)
    with pytest.raises(InputError, match="attention_mask has 4 dims"):
        pruned(padded[0], padded[1][:, None, None])


def test_max_length_leaves_out_offset_positions(tiny: Tiny) -> None:
    assert find(tiny("bert")).max_length == 40
    assert find(tiny("roberta")).max_length == 38


def test_modules_are_shared_not_copied(tiny: Tiny) -> None:
    model = tiny("bert", head=True)
    pruned = models.prune(model, thresholds=[0.1] * 3)
    assert {id(weight) for weight in pruned.parameters()} == {id(weight) for weight in model.parameters()}
    assert (pruned.family, pruned.method) == ("bert", "ltp")
    assert isinstance(pruned.dense, Dense)
    assert list(FAMILIES) == ["bert", "vit", "speech"]


def test_a_module_the_user_replaced_is_refused(tiny: Tiny) -> None:
    class Mine(nn.Module):
        pass

    model = tiny("bert", head=True)
    model.bert.encoder.layer[1].attention.self = Mine()
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.attention\.self is .*Mine, not the library's own module"):
        find(model)


def test_a_subclass_of_a_library_model_is_refused(tiny: Tiny) -> None:
    model = tiny("bert", head=True)
    model.__class__ = type("Custom", (type(model),), {"__module__": __name__})
    with pytest.raises(ModelError, match="no family names the parts of"):
        find(model)


def test_decoder_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="configured as a decoder"):
        find(tiny("bert", is_decoder=True))


def test_bare_encoder_without_pooler_asks_for_a_pooling(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="without a pooler has no sentence-level output") as caught:
        find(tiny("distilbert"))
    assert 'SentenceEncoder(model, pooling="mean")' in caught.value.fix
    assert "TokenEncoder(model)" in caught.value.fix


def test_an_unknown_head_is_refused(tiny: Tiny) -> None:
    from transformers.models.bert.modeling_bert import BertForMaskedLM

    with pytest.raises(ModelError, match="BertForMaskedLM has no head that tpcompile knows") as caught:
        find(BertForMaskedLM(tiny("bert").config))
    assert "BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering" in caught.value.fix


def test_foreign_module_is_refused() -> None:
    with pytest.raises(ModelError, match="no family names the parts of torch") as caught:
        find(nn.Linear(2, 2))
    assert "bert, roberta, xlm-roberta, camembert, electra, distilbert" in caught.value.fix
