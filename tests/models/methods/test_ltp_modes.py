"""LTP's other modes against plain loops over tokens, and through the compiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcompile import models
from tpcompile.capture import capture
from tpcompile.errors import UsageError
from tpcompile.models.methods.ltp import rates
from tpcompile.passes import pipeline

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]

MODES: list[dict[str, Any]] = [
    {"prune_mode": "topk", "token_keep_rate": 0.3},
    {"prune_mode": "threshold", "token_threshold": 0.4},
    {"prune_mode": "rising_threshold", "final_token_threshold": 0.9},
]


def _uneven(tiny: Tiny, layers: int) -> Any:
    """A classifier whose attention tells tokens apart."""
    model = tiny("bert", head=True, num_hidden_layers=layers)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.weight.data *= 4
    return model


def _kept(mode: str, layer: int, layers: int, scores: list[float], alive: list[int], length: int, number: float) -> list[int]:
    """The tokens that leave a layer, by a loop."""
    if mode == "topk":
        if layer < 3:
            return alive
        rate = max(0.01, 1 + (number - 1) * (layer - 2) / (layers - 3))
        best = sorted(alive, key=lambda token: -scores[token])[: round(length * rate)]
        return sorted(best)
    share = number if mode == "threshold" else number * layer / layers
    highest = max(scores[token] for token in alive)
    return [token for token in alive if scores[token] / highest >= share]


@pytest.mark.parametrize("parameters", MODES, ids=lambda parameters: parameters["prune_mode"])
def test_keeps_what_a_loop_keeps(parameters: dict[str, Any], tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(_uneven(tiny, 6), "ltp", **parameters)
    seen = pruned.trace(*padded)
    mode, number = parameters.values()
    for row in range(2):
        alive = padded[1][row].nonzero().flatten().tolist()
        length, dropped = len(alive), 0
        for layer in range(6):
            score = seen.scores[layer]
            now = alive if score is None else _kept(mode, layer, 6, score[row].tolist(), alive, length, number)
            assert seen.kept[layer][row].nonzero().flatten().tolist() == now
            dropped += len(alive) - len(now)
            alive = now
        assert dropped


@pytest.mark.parametrize("parameters", MODES, ids=lambda parameters: parameters["prune_mode"])
def test_gathered_equals_masked(parameters: dict[str, Any], tiny: Tiny, padded: Padded) -> None:
    pruned = models.prune(_uneven(tiny, 5), "ltp", **parameters)
    names = ("input_ids", "attention_mask")
    given = dict(zip(names, padded, strict=True))
    ranges = {"batch": (1, 8), "seq": (2, 40)}
    program = pipeline("ragged")(capture(pruned, given, {name: {0: "batch", 1: "seq"} for name in names}, ranges))
    for length in (12, 7):
        ids, mask = (part[:, :length].flip(0) for part in padded)
        want = pruned.trace(ids, mask)
        got = program.trace(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(got.outputs["logits"], want.outputs["logits"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_topk_of_images_is_a_constant_count(tiny_vit: Tiny, images: Tensor) -> None:
    pruned = models.prune(tiny_vit(depth=5), "ltp", prune_mode="topk", token_keep_rate=0.4)
    program = pipeline("one")(capture(pruned, {"pixel_values": images[:1]}))
    assert [site.most for site in program.sites] == [1 + 9, 1 + 5]  # CLS is stored though it may fall: 13 tokens at 0.7 and 0.4
    for image in images.split(1):
        want = pruned.trace(image)
        assert [int(want.kept[layer].sum()) for layer in (3, 4)] == [9, 5]
        torch.testing.assert_close(program(pixel_values=image)["logits"], want.outputs["logits"], rtol=0, atol=1e-5)


def test_rates_fall_from_the_fourth_layer() -> None:
    assert rates(0.25, 6) == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(0.001, 4) == [1.0, 1.0, 1.0, 0.01]
    assert rates(0.5, 2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {"prune_mode": "topk"},
            (
                "method ltp: parameter 'token_keep_rate' is required with prune_mode topk\n"
                "  fix     add --param token_keep_rate=..., or choose another prune_mode: "
                "absolute_threshold, topk, threshold, rising_threshold"
            ),
        ),
        (
            {"prune_mode": "threshold", "token_threshold": 0.1, "thresholds": [0.1]},
            "method ltp: prune_mode threshold does not read thresholds\n  fix     leave it out: it reads token_threshold",
        ),
        (
            {"prune_mode": "topk", "token_keep_rate": 1.5},
            (
                "method ltp: parameter token_keep_rate = 1.5: input should be less than or equal to 1\n  fix     ltp accepts: fill, "
                "thresholds, n_ref, protect, prune_mode, token_keep_rate, token_threshold, final_token_threshold"
            ),
        ),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, Any], text: str, tiny: Tiny) -> None:
    with pytest.raises(UsageError) as caught:
        models.prune(tiny("bert", head=True), "ltp", **parameters)
    assert str(caught.value) == text
