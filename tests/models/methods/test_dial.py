"""Dials: every method that has one keeps fewer tokens the further it is turned, and the others say what decides instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models import METHODS
from tpcompile.models.methods.dial import Dial, moving, turned
from tpcompile.recipe import Recipe, shipped

Tiny = Callable[..., Any]
SHAPES: dict[str, dict[str, Any]] = {
    "ltp": {"thresholds": [0.02, 0.0, 0.05]},
    "cls-attention": {"thresholds": [0.02, 0.04, 0.0]},
    "as_vit": {"thresholds": [0.02, 0.04], "pruning_loc": [1, 2]},
    "power_bert": {"retention": [9, 7, 4]},
    "evit": {"base_keep_rate": 0.6, "drop_loc": [0, 2]},
    "tome": {"r": [2, 0, 2]},
    "ats": {"ats_blocks": [0, 2], "num_tokens": 12},
    "ltmp": {"merge_thresholds": [0.7] * 3, "prune_thresholds": [0.03] * 3},
    "zero_tprune": {"stages": [{"block": 0, "iterations": 5, "similar": 0.1, "keep": 0.7}]},
    "jmp": {"locations": [0, 2], "keep_rate": 0.6},
    "atome": {"blocks": [0, 2], "ratio": 0.2},
}
MODES: dict[str, dict[str, Any]] = {
    "topk": {"token_keep_rate": 0.5},
    "threshold": {"token_threshold": 0.2},
    "rising_threshold": {"final_token_threshold": 0.3},
}
FACTORS = (0.01, 0.2, 0.5, 1.0, 1.5, 3.0, 30.0)


def kept(pruned: models.Pruned, inputs: dict[str, Tensor], factor: float) -> int:
    """Tokens alive behind the blocks, all together."""
    return sum(int(alive.sum()) for alive in pruned.turned(factor).trace(**inputs).kept)


def falls(pruned: models.Pruned, inputs: dict[str, Tensor]) -> None:
    """Fewer and fewer stay, from nearly all to nearly none; and a factor of 1 changes nothing."""
    counts = [kept(pruned, inputs, factor) for factor in FACTORS]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 3
    assert counts[FACTORS.index(1.0)] == sum(int(alive.sum()) for alive in pruned.trace(**inputs).kept)
    assert pruned.turned(1.0).method_parameters == pruned.method_parameters


@pytest.mark.parametrize("method", sorted(SHAPES.keys() - {"power_bert", "atome"}))
def test_fewer_tokens_stay_of_an_image(method: str, tiny_vit: Tiny, images: Tensor) -> None:
    pruned = models.prune(tiny_vit(), method, **SHAPES[method])
    falls(pruned, {"pixel_values": images[:1]})


@pytest.mark.parametrize("method", ["ltp", "power_bert", "cls-attention"])
def test_fewer_tokens_stay_of_a_text(method: str, tiny: Tiny, padded: tuple[Tensor, Tensor]) -> None:
    pruned = models.prune(tiny("bert", head=True), method, **SHAPES[method])
    falls(pruned, {"input_ids": padded[0][:1], "attention_mask": padded[1][:1]})


@pytest.mark.parametrize("mode", MODES)
def test_fewer_tokens_stay_in_every_mode_of_ltp(mode: str, tiny: Tiny, padded: tuple[Tensor, Tensor]) -> None:
    layers = 6 if mode == "topk" else 3  # the first three keep all
    pruned = models.prune(tiny("bert", head=True, num_hidden_layers=layers), "ltp", prune_mode=mode, **MODES[mode])
    falls(pruned, {"input_ids": padded[0][:1], "attention_mask": padded[1][:1]})
    assert pruned.moves == tuple(MODES[mode])


def test_more_frames_merge(tiny_ast: nn.Module) -> None:
    pruned = models.prune(tiny_ast, "atome", **SHAPES["atome"])
    falls(pruned, {"input_values": torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0))})


def test_every_method_has_a_dial_or_says_what_decides() -> None:
    assert {name for name, method in METHODS.items() if method.dials} == SHAPES.keys()
    for method in METHODS.values():
        for dial in method.dials:
            assert dial.name in method.Parameters.model_fields
        assert method.dials or method.decided != models.Method.decided


@pytest.mark.parametrize("name", [name for name, path in shipped().items() if Recipe.read(path).flops])
def test_a_recipe_with_a_ratio_has_something_to_move(name: str) -> None:
    recipe = Recipe.read(shipped()[name])
    assert moving(METHODS[recipe.method].dials, recipe.parameters)


@pytest.mark.parametrize(
    ("dial", "value", "factor", "moved"),
    [
        (Dial("t", most=1.0), 0.3, 2.0, 0.6),
        (Dial("t", most=1.0), 0.3, 4.0, 1.0),
        (Dial("t", most=1.0), 1 / 3, 0.1, 0.0333333),
        (Dial("t"), 0, 5.0, 0),
        (Dial("r"), 5, 1.3, 6),
        (Dial("k", "from one", least=0.01), 0.7, 2.0, 0.4),
        (Dial("k", "from one", least=0.01), 0.7, 9.0, 0.01),
        (Dial("n", "over", least=3), 50, 4.0, 12),
        (Dial("n", "over", least=3), 50, 40.0, 3),
    ],
)
def test_a_value_moves_by_its_law_and_stops_at_its_end(dial: Dial, value: float, factor: float, moved: float) -> None:
    found = dial.moved(value, factor)
    assert found == pytest.approx(moved, abs=1e-9)
    assert type(found) is type(moved)


def test_lists_and_parts_move_value_by_value() -> None:
    given = {"stages": [{"block": 1, "keep": 0.5}, {"block": 3, "keep": 1.0}], "r": [1, 0, 4], "off": None}
    dials = (Dial("stages.keep", "from one"), Dial("r"), Dial("off"))
    found = turned(dials, given, 0.5)
    assert found == {"stages": [{"block": 1, "keep": 0.75}, {"block": 3, "keep": 1.0}], "r": [0, 0, 2], "off": None}
    assert moving(dials, given) == ("stages.keep", "r")
    assert given["r"] == [1, 0, 4]


def test_what_is_decided_elsewhere_is_refused(tiny: Tiny) -> None:
    pruned = models.prune(tiny("bert", head=True), "top", token_z=[[1, 0]])
    with pytest.raises(UsageError) as caught:
        _ = pruned.moves
    assert str(caught.value) == (
        "method top cannot be fitted to a FLOPs ratio: its gates are learned for each rank, and come with a checkpoint\n"
        "  fix     leave the FLOPs ratio out, or choose a method that has a dial, such as ltp or evit"
    )


@pytest.mark.parametrize(
    ("method", "given", "names"),
    [
        ("evit", {"base_keep_rate": 1.0, "drop_loc": [0]}, "base_keep_rate"),
        ("ats", {"ats_blocks": [0]}, "num_tokens"),
        ("ltmp", {"merge_thresholds": [1.0] * 3}, "merge_thresholds, prune_thresholds"),
        ("ltp", {"thresholds": [0.0] * 3}, "thresholds, token_threshold, final_token_threshold, token_keep_rate"),
    ],
)
def test_values_at_their_end_are_refused(method: str, given: dict[str, Any], names: str, tiny_vit: Tiny) -> None:
    pruned = models.prune(tiny_vit(), method, **given)
    with pytest.raises(UsageError) as caught:
        _ = pruned.moves
    assert str(caught.value) == (
        f"method {method} has nothing to move: no value of {names} is given that is not at its end\n"
        "  fix     give values that drop some tokens: their proportions stay, a common factor is found"
    )
