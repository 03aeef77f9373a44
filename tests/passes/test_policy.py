"""0-1 arithmetic as logic, and a softmax with a policy as a masked one."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile.passes import Canonicalize
from tpcompile.program import Program

Toy = Callable[..., Program]


class Policy(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        weights = (x - x.amax(-1, keepdim=True)).exp() * keep.float().unsqueeze(-1)
        return weights / weights.sum(-1, keepdim=True)


def test_case_2_a_softmax_with_a_policy(toy: Toy, show: Callable[[Program], str]) -> None:
    program = Canonicalize()(toy(Policy()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%_to_copy: f32[1, n] = aten._to_copy.default(%keep, dtype=torch.float32)
%unsqueeze: f32[1, n, 1] = aten.unsqueeze.default(%_to_copy, -1)
%ne_scalar: bool[1, n, 1] = aten.ne.Scalar(%unsqueeze, 0)
%where_scalar_other: f32[1, n, 4] = aten.where.ScalarOther(%ne_scalar, %x, -inf)
%softmax_int: f32[1, n, 4] = aten.softmax.int(%where_scalar_other, 2)
return (%softmax_int)""",
    )
    assert program.assumptions == ("test_policy.py:19 (): living logits lie less than 80 below those a policy hides",)


class Either(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        a, b = keep.float(), (x.sum(-1) > 0).float()
        match self.kind:
            case "sum and product":
                return a + b - a * b
            case "complement":
                return a + (1 - a) * b
            case "complement first":
                return b * (1.0 - a) + a
            case "not a mask":
                return a + (1 - a) * x.sum(-1)
            case "another complement":
                return a + (1 - b) * b
        return a + b - a * a


@pytest.mark.parametrize(
    ("kind", "logic"),
    [
        ("sum and product", True), ("complement", True), ("complement first", True), ("not a mask", False),
        ("another complement", False), ("square", False),
    ],
)  # fmt: skip
def test_case_1_arithmetic_on_masks(toy: Toy, agree: Callable[..., None], kind: str, logic: bool) -> None:
    program = Canonicalize()(toy(Either(kind)))
    assert any("maximum" in str(node.target) for node in program.graph.nodes) == logic
    agree(Either(kind), program)


class Weights(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        first = (torch.arange(x.shape[1]) == 0).unsqueeze(-1)
        mask = (keep.unsqueeze(-1) | first).float()
        logits = x.expand(1, -1, -1)
        match self.kind:
            case "policy":
                weights = (logits - logits.amax(1, keepdim=True)).exp() * mask
            case "plain":
                weights = mask * logits.exp()
            case "columns" | "eps":
                weights = logits.softmax(1) * mask
            case "another dim":
                weights = logits.softmax(2) * mask
            case "another top":
                weights = (logits - logits.amax(2, keepdim=True)).exp() * mask
            case _:
                weights = logits.exp() * mask * 2
        total = weights.sum(1, keepdim=True)
        return weights / (total + 1e-6 if self.kind == "eps" else total)


@pytest.mark.parametrize(
    ("kind", "softmaxes"),
    [("policy", 1), ("plain", 0), ("columns", 1), ("eps", 1), ("another dim", 1), ("another top", 0), ("doubled", 0)],
)
def test_cases_2_and_3_weights_over_their_sum(toy: Toy, agree: Callable[..., None], kind: str, softmaxes: int) -> None:
    program = Canonicalize()(toy(Weights(kind)))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.softmax.int") == softmaxes
    written = bool(program.assumptions)
    assert written == (kind in ("policy", "columns"))
    agree(Weights(kind), program)
