"""ToP and PoWER-BERT against plain loops over tokens, batch by batch; what they refuse, by text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcompile import models
from tpcompile.capture import capture
from tpcompile.errors import UsageError
from tpcompile.passes import pipeline
from tpcompile.rows import Rows

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]
TOP: dict[str, Any] = {"token_z": [[1, 1, 0, 1, 0], [1, 0, 1, 0, 0]]}
POWER: dict[str, Any] = {"retention": [7, 7, 2]}


def _alive(mask: Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found


def _ranked(scores: list[float], alive: list[int]) -> list[int]:
    """Living tokens beside CLS, the best first, of equal ones those in front."""
    return sorted((token for token in alive if token), key=lambda token: -scores[token])


@torch.no_grad()
def test_top_keeps_the_open_bins(tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("bert", head=True), "top", **TOP)
    seen = pruned.trace(*padded)
    for row in range(2):
        alive = _alive(padded[1][row])
        assert seen.scores[0] is None
        for layer, gates in zip((1, 2), TOP["token_z"], strict=True):
            score = seen.scores[layer]
            assert score is not None
            order = _ranked(score[row].tolist(), alive)
            kept = [0] + [t for rank, t in enumerate(order) if gates[int(rank / (len(order) + 1e-6) * len(gates))]]
            assert sorted(kept) == _alive(seen.kept[layer][row])
            assert 1 < len(kept) < len(alive)
            alive = sorted(kept)
        alone = pruned.trace(padded[0][row : row + 1, : int(padded[1][row].sum())])
        torch.testing.assert_close(alone.outputs["logits"][0], seen.outputs["logits"][row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_closed_pruner_drops_nothing(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head=True)
    seen = models.prune(model, "top", **TOP, pruner_z=[0, 0]).trace(*padded)
    assert seen.scores == (None, None, None)
    want = model(input_ids=padded[0], attention_mask=padded[1]).logits
    torch.testing.assert_close(seen.outputs["logits"], want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_power_bert_keeps_the_most_significant(tiny: Tiny, padded: Padded) -> None:
    model = tiny("bert", head=True)
    pruned = models.prune(model, "power_bert", **POWER)
    seen = pruned.trace(*padded)
    attention = model(input_ids=padded[0], attention_mask=padded[1], output_attentions=True).attentions[0].mean(1)
    for row in range(2):
        alive = _alive(padded[1][row])
        own = attention[row][alive].sum(0) - attention[row].diagonal()
        assert seen.scores[0] is not None
        torch.testing.assert_close(seen.scores[0][row][alive], own[alive], rtol=0, atol=1e-5)
        for layer, count in ((0, 7), (2, 2)):
            score = seen.scores[layer]
            assert score is not None
            kept = [0, *_ranked(score[row].tolist(), alive)[: count - 1]]
            assert sorted(kept) == _alive(seen.kept[layer][row])
            alive = sorted(kept)
    assert seen.scores[1] is None


@pytest.mark.parametrize(("method", "parameters"), [("top", TOP), ("power_bert", POWER)])
def test_gathered_equals_masked(method: str, parameters: dict[str, Any], tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(tiny("bert", head="ForTokenClassification"), method, **parameters)
    names = ("input_ids", "attention_mask")
    dynamic = {name: {0: "batch", 1: "seq"} for name in names}
    program = pipeline("ragged")(
        capture(pruned, dict(zip(names, padded, strict=True)), dynamic, {"batch": (1, 8), "seq": (2, 40)})
    )
    if method == "power_bert":
        assert program.rows == (Rows(limit=7), Rows(limit=2))
    for length in (12, 6, 2):
        ids, mask = (part[:, :length].flip(0) for part in padded)
        want = pruned(ids, mask)["logits"]
        torch.testing.assert_close(program(input_ids=ids, attention_mask=mask)["logits"], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters", "text"),
    [
        (
            "top",
            {"token_z": [[1, 0], [1]]},
            "token_z has rows of [2, 1] bins\n  fix     pass one row of gates per location, all of one length",
        ),
        (
            "top",
            {"token_z": [[1, 0]], "token_prune_loc": [3]},
            "token_prune_loc is [3], the model has blocks 0 to 2\n  fix     give rising block numbers from 1 to 2",
        ),
        (
            "top",
            {"token_z": [[1, 0]], "pruner_z": [1, 1]},
            "token_z has 1 rows, pruner_z 2 gates, token_prune_loc 1 layers\n  fix     pass as many of each",
        ),
        (
            "power_bert",
            {"retention": [4, 5, 2]},
            "retention is [4, 5, 2], the model has 3 layers\n  fix     pass 3 counts of tokens, none above the one before",
        ),
        (
            "power_bert",
            {"retention": [4, 0, 0]},
            (
                "method power_bert: parameter retention[1] = 0: input should be greater than or equal to 1; parameter retention[2] = 0: "
                "input should be greater than or equal to 1\n  fix     power_bert accepts: fill, retention"
            ),
        ),
    ],
    ids=["bins", "depth", "gates", "rising", "zero"],
)
def test_refusals(method: str, parameters: dict[str, Any], text: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(tiny("bert", head=True), method, **parameters)
    assert str(caught.value) == text
