"""ToMe and Zero-TPrune on texts: against their own form for images, against plain loops, with padding and without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models.methods.tome import TextBlock, TomeBlock, rows_enough, rows_left
from tpcompile.models.methods.zero_tprune import Pruning, Stage, TextPruning, ZeroTpruneParameters

Tiny = Callable[..., Any]
STAGES = [
    {"block": 0, "iterations": 5, "similar": 0.3, "keep": 0.8},
    {"block": 1, "iterations": 1, "similar": 0.0, "keep": 0.7},
]
SOME: dict[str, dict[str, Any]] = {"tome": {"r": [2, 0, 3]}, "zero_tprune": {"stages": STAGES}}
NOTHING: dict[str, dict[str, Any]] = {
    "tome": {"r": 0},
    "zero_tprune": {"stages": [{"block": 1, "iterations": 3, "similar": 0.0, "keep": 1.0}]},
}
HEADS = ["mean", "cls", "classifier"]


def _model(tiny: Tiny, head: str) -> Any:
    return tiny("bert", head=True) if head == "classifier" else models.SentenceEncoder(tiny("bert"), pooling=head)


def _text(length: int) -> Tensor:
    return torch.randint(5, 60, (1, length), generator=torch.Generator().manual_seed(length))


def _pad(texts: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    ids, mask = torch.ones(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
    return ids, mask


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", SOME)
@torch.no_grad()
def test_padding_and_batch_mates_do_not_matter(method: str, head: str, tiny: Tiny) -> None:
    """Every length from CLS alone on, beside the longest and with pads behind all: outputs, kept tokens and scores as alone."""
    pruned = models.prune(_model(tiny, head), method, **SOME[method])
    texts = [_text(length) for length in range(1, 15)]
    together = pruned.trace(*_pad(texts, 17))
    for row, text in enumerate(texts):
        alone = pruned.trace(text)
        for name, value in alone.outputs.items():
            torch.testing.assert_close(together.outputs[name][row], value[0], rtol=0, atol=1e-5)
        for own, theirs in zip(alone.kept, together.kept, strict=True):
            assert own.sum() == theirs[row].sum()
            assert theirs[row, : int(own.sum())].all()  # dead rows stand behind the others


@pytest.mark.parametrize("method", SOME)
@torch.no_grad()
def test_what_pads_hold_does_not_matter(method: str, tiny: Tiny) -> None:
    pruned = models.prune(_model(tiny, "mean"), method, **SOME[method])
    ids, mask = _pad([_text(9)], 14)
    other = torch.where(mask == 1, ids, 33)
    a, b = (pruned(given, mask)["sentence_embedding"] for given in (ids, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", SOME)
@torch.no_grad()
def test_nothing_goes(method: str, head: str, tiny: Tiny, padded: tuple[Tensor, Tensor]) -> None:
    model = _model(tiny, head)
    want = model(input_ids=padded[0], attention_mask=padded[1])
    for parameters, near in ((NOTHING[method], True), (SOME[method], False)):
        for name, value in models.prune(model, method, **parameters)(*padded).items():
            assert (float((value - want[name]).abs().max()) < 1e-5) is near


@pytest.mark.parametrize("name", ["roberta", "electra", "distilbert"])
@pytest.mark.parametrize("method", SOME)
@torch.no_grad()
def test_the_whole_family(method: str, name: str, tiny: Tiny, padded: tuple[Tensor, Tensor]) -> None:
    pruned = models.prune(tiny(name, head=True), method, **SOME[method])
    both = pruned(*padded)["logits"]
    torch.testing.assert_close(both[1:], pruned(padded[0][1:, :8])["logits"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_merging_is_that_of_images(tiny: Tiny) -> None:
    """Without padding, rows, order and sizes are those of the form for images, block after block."""
    blocks = models.prune(tiny("bert", head=True), "tome", r=0).parts.blocks
    x = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(1))
    size_, x_, size = None, x, None
    for block, r, count in zip(blocks, (3, 2, 2), rows_left(13, 1, (3, 2, 2)), strict=True):
        alive = torch.ones(x.shape[:2], dtype=torch.bool)
        image, size = TomeBlock(block, 1, r, True)(x, alive, size, count)
        text, size_ = TextBlock(block, 1, r, True)(x_, alive, size_, count)
        x, x_ = image.x, text.x
        assert text.alive.all()
        torch.testing.assert_close(x_, x, rtol=0, atol=1e-5)
        torch.testing.assert_close(size_, size, rtol=0, atol=0)


@torch.no_grad()
def test_pruning_is_that_of_images(tiny: Tiny) -> None:
    blocks = models.prune(tiny("bert", head=True), "tome", r=0).parts.blocks
    x = torch.randn(3, 13, 24, generator=torch.Generator().manual_seed(1))
    for stage in (Stage(block=0, iterations=4, similar=0.3, keep=0.6), Stage(block=0, iterations=1, similar=0.0, keep=0.5)):
        options = ZeroTpruneParameters(stages=[stage])
        alive = torch.ones(x.shape[:2], dtype=torch.bool)
        image, text = (kind(blocks[0], 1, stage, options)(x, alive) for kind in (Pruning, TextPruning))
        assert text.alive.all()
        torch.testing.assert_close(text.x, image.x, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mean_over_tokens_counts_sizes(tiny: Tiny, padded: tuple[Tensor, Tensor]) -> None:
    """In both texts the sizes of what is left sum to the tokens that were there."""
    model = models.SentenceEncoder(tiny("bert"), normalize=False)
    pruned = models.prune(model, "tome", r=2)
    steps = pruned.body(*pruned.parts.embed({"input_ids": padded[0], "attention_mask": padded[1]}))
    size = steps[-1].weight
    assert size.sum(dim=1).tolist() == [12.0, 8.0]
    assert size.max() > 1
    want = torch.stack([sizes @ rows / sizes.sum() for sizes, rows in zip(size, steps[-1].x, strict=True)])
    torch.testing.assert_close(pruned(*padded)["sentence_embedding"], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merges", [(2, 2, 2, 2), (3, 0, 1, 5), (0, 0), (20, 1, 4), (1, 20, 2)])
def test_enough_rows_are_stored(merges: tuple[int, ...]) -> None:
    """Never fewer than live, never more than before; and exactly as many while the largest r of them may still merge."""
    for tokens in range(1, 60):
        left, enough = rows_left(tokens, 1, merges), rows_enough(tokens, 1, merges)
        assert all(few <= many for few, many in zip(left, enough, strict=True))
        assert all(after <= before for before, after in zip([tokens, *enough], enough, strict=False))
        for block, (few, many) in enumerate(zip(left, enough, strict=True)):
            assert few == many or few - 1 < max(merges[: block + 1])


def test_at_most_half_merges(tiny: Tiny) -> None:
    pruned = models.prune(_model(tiny, "mean"), "tome", r=4)
    for length, counts in ((2, [2, 2, 2]), (3, [2, 2, 2]), (8, [5, 3, 2]), (14, [10, 6, 4])):
        assert [int(kept.sum()) for kept in pruned.trace(_text(length)).kept] == counts


@pytest.mark.parametrize("method", SOME)
def test_an_output_per_token_is_refused(method: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(tiny("bert", head="ForTokenClassification"), method, **SOME[method])
    assert str(caught.value) == (
        f"{method} gathers by itself and brings no dropped row back, and the outputs of BertForTokenClassification have one per token\n"
        "  fix     use ltp, or a model with a pooled output"
    )
