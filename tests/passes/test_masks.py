"""Masks in any dress: the numbers a node holds, and what one mask says of another."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile.axes import NEG_INF
from tpcompile.passes import Canonicalize
from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.masks import Masks, Said, compared, said
from tpcompile.passes.values import Value
from tpcompile.program import Program

Toy = Callable[..., Program]


class Dresses(nn.Module):
    """One decision per output, each held in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("three", torch.tensor([1.0, 2.0, 3.0, 1.0]))
        self.gate = nn.Linear(4, 2)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        score = x.sum(-1)
        high = score > 0
        mask = torch.where(high, 0.0, -1e4)
        return {
            "bool": high,
            "float": high.float(),
            "minus": 1 - high.float(),
            "additive": (1 - high.float()) * -1e9,
            "infinite": torch.zeros_like(score).masked_fill(high, NEG_INF),
            "summed": mask + torch.where(keep, 0.0, -1e4),
            "rounded": torch.sigmoid(score).round(),
            "clamped": score.clamp(0.0, 1.0).round(),
            "sign": torch.sign(torch.relu(score)),
            "signs": torch.sign(score),
            "chosen": self.gate(x).argmax(-1),
            "joined": torch.cat([torch.ones_like(score[:, :1]), high.float()], 1),
            "log": torch.log(high.float()),
            "weight": self.three + 0,
            "broken": high.float() * NEG_INF,
            "score": score + 0,
            "product": high.float() * score,
        }


NUMBERS = {
    "bool": {0, 1}, "float": {0, 1}, "minus": {0, 1}, "additive": {0, -1e9}, "infinite": {0, NEG_INF}, "summed": {0, -1e4, -2e4},
    "rounded": {0, 1}, "clamped": {0, 1}, "sign": {0, 1}, "signs": {-1, 0, 1}, "chosen": {0, 1}, "joined": {0, 1}, "log": {0, NEG_INF},
    "weight": {1, 2, 3}, "broken": set(), "score": set(), "product": set(),
}  # fmt: skip


def masks_of(program: Program) -> tuple[AxesMap, Masks, dict[str, torch.fx.Node]]:
    axes = AxesMap(program.graph)
    results = dict(zip(program.output_names, program.graph.output_node().args[0], strict=True))
    return axes, Masks(axes, program.constants()), results


def test_the_numbers_a_node_holds(toy: Toy) -> None:
    _, masks, results = masks_of(Canonicalize()(toy(Dresses())))
    found = {name: {torch.tensor(number).item() for number in masks(node)} for name, node in results.items()}
    want = {name: {torch.tensor(float(number)).item() for number in numbers} for name, numbers in NUMBERS.items()}
    assert found == want


def test_the_numbers_are_those_of_a_run(toy: Toy) -> None:
    program = Canonicalize()(toy(Dresses()))
    _, masks, results = masks_of(program)
    x, keep = torch.randn(1, 40, 4), torch.rand(1, 40) > 0.5
    for name, value in program(x=x, keep=keep).items():
        if masks(results[name]):
            assert set(value.double().flatten().tolist()) <= masks(results[name]), name


class Made(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        score = x.sum(-1)
        high = score >= 0.25
        both = high & keep
        grown = torch.where(both, torch.zeros_like(score), torch.where(keep, 0.0, -1e9))
        return {"high": high, "keep": keep | False, "both": both, "dead": ~both, "either": high | keep, "grown": grown}


@pytest.mark.parametrize(
    ("start", "alive", "dropped", "expected"),
    [
        ("both", 1.0, {0.0}, {("ge", 1.0, (0.0, 1.0)), ("inputs_keep", 1.0, (0.0, 1.0))}),
        ("dead", 0.0, {1.0}, {("__and__", 1.0, (0.0,)), ("ge", 1.0, (0.0, 1.0)), ("inputs_keep", 1.0, (0.0, 1.0))}),
        ("either", 0.0, {1.0}, {("ge", 0.0, (0.0, 1.0)), ("inputs_keep", 0.0, (0.0, 1.0))}),
        ("either", 1.0, {0.0}, set()),
    ],
)
def test_what_a_mask_says_of_its_ingredients(
    toy: Toy, start: str, alive: float, dropped: set[float], expected: set[tuple[str, float, tuple[float, ...]]]
) -> None:
    axes, masks, results = masks_of(Canonicalize()(toy(Made())))
    told = said(Said(results[start], 1, alive, frozenset(dropped)), axes, masks)
    found = {(one.node.name.rstrip("_0123456789"), one.alive, tuple(sorted(one.dropped))) for one in told}
    assert {(name.replace("and", "__and__") if name == "and" else name, a, d) for name, a, d in found} == expected


def test_a_comparison_bounds_what_it_dropped(toy: Toy) -> None:
    axes, _, results = masks_of(Canonicalize()(toy(Made())))
    ((operand, dim, value),) = compared(Said(results["high"], 1, 1.0, frozenset((0.0,))), axes)
    assert (operand.name.startswith("sum"), dim, value) == (True, 1, Value(NEG_INF, 0.25))
    assert not list(compared(Said(results["high"], 1, 1.0, frozenset((0.0, 1.0))), axes))
