"""placed -> placed: the numbered cases of ``passes/optimize/hoist.py``."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.flops import evaluate
from tpcompile.passes import Hoist, Pipeline, pipeline
from tpcompile.passes.cost import traffic
from tpcompile.program import Program

Toy = Callable[..., Program]
Show = Callable[[Program], str]
Agree = Callable[..., None]

PLAIN = pipeline(optimize=False)
PLACED = Pipeline(PLAIN.passes[:4])
HOISTED = Pipeline((*PLACED.passes, Hoist()))
WHOLE = Pipeline((*HOISTED.passes, *PLAIN.passes[4:]))


def changed(show: Show, before: Program, after: Program) -> str:
    """Lines that are new."""
    old = set(show(before).splitlines())
    return "\n".join(line for line in show(after).splitlines() if line not in old)


class Attention(nn.Module):
    """The mask of query rows stands on the map; its columns are the score; the logits are scaled. Cases 1, 2 and 3 at once."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        bias = torch.where(keep, 0.0, -1e4)[:, None, None, :]
        heads = x.view(1, -1, 2, 2).transpose(1, 2)
        probs = ((heads @ heads.transpose(2, 3)) * 0.5 + bias).softmax(-1) * keep[:, None, :, None].to(x.dtype)
        score = probs.sum((1, 2)) / 2
        later = keep & (score >= 0.4)
        y = (probs @ heads).transpose(1, 2).reshape(x.shape)
        return (ops.prune(y, later, score) * later.unsqueeze(-1)).sum(1)


def test_every_case_in_one_attention(toy: Toy, show: Show, agree: Agree) -> None:
    placed, program = PLACED(toy(Attention())), HOISTED(toy(Attention()))
    assert_expected_inline(
        changed(show, placed, program),
        """\
%mul_tensor: f32[1, 2, t0, 2] = aten.mul.Tensor(%transpose, 0.5)
%matmul_default: f32[1, 2, t0, t0] = aten.matmul.default(%mul_tensor, %transpose_1)
%add_25: f32[1, 2, t0, t0] = aten.add.Tensor(%matmul_default, %unsqueeze_1)
%transpose_int: f32[1, 1, 1, t0] = aten.transpose.int(%_to_copy, -2, -1)
%matmul_default_1: f32[1, 2, 1, t0] = aten.matmul.default(%transpose_int, %softmax)
%sum_dim_int_list: f32[1, t0] = aten.sum.dim_IntList(%matmul_default_1, [1, 2], False)
%div: f32[1, t0] = aten.div.Tensor(%sum_dim_int_list, 2)
%matmul_default_2: f32[1, 2, t0, 2] = aten.matmul.default(%softmax, %transpose)
%mul_tensor_1: f32[1, 2, t0, 2] = aten.mul.Tensor(%matmul_default_2, %_to_copy)
%transpose_2: f32[1, t0, 2, 2] = aten.transpose.int(%mul_tensor_1, 1, 2)""",
    )
    assert_expected_inline(
        changed(show, program, placed),
        """\
%matmul: f32[1, 2, t0, t0] = aten.matmul.default(%transpose, %transpose_1)
%mul_25: f32[1, 2, t0, t0] = aten.mul.Tensor(%matmul, 0.5)
%add_25: f32[1, 2, t0, t0] = aten.add.Tensor(%mul_25, %unsqueeze_1)
%mul_44: f32[1, 2, t0, t0] = aten.mul.Tensor(%softmax, %_to_copy)
%sum_1: f32[1, t0] = aten.sum.dim_IntList(%mul_44, [1, 2])
%div: f32[1, t0] = aten.div.Tensor(%sum_1, 2)
%matmul_1: f32[1, 2, t0, 2] = aten.matmul.default(%mul_44, %transpose)
%transpose_2: f32[1, t0, 2, 2] = aten.transpose.int(%matmul_1, 1, 2)""",
    )
    agree(Attention(), program)
    agree(Attention(), WHOLE(toy(Attention())))
    sizes = {"t0": 64, "t1": 32}
    saved = evaluate(traffic(placed), sizes) - evaluate(traffic(program), sizes)
    rows, mask, every = 2 * 64 * 2, 64, 2 * 64 * 64
    scale, case_1, case_2 = 2 * (every - rows), 2 * every + mask - 2 * rows - mask, every - (every + mask + 2 * 2 * 64)
    assert saved == 4 * (scale + case_1 + case_2 - 2 * mask)


class Twice(nn.Module):
    """Two scales in a row, and the product that is left is scaled by rows."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.prune(x, keep)
        logits = (y @ y.transpose(1, 2)) * 0.5 * 0.25
        probs = (logits + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1)
        return (probs @ y * keep.unsqueeze(-1)).sum(1)


def test_two_scales_in_a_row(toy: Toy, agree: Agree) -> None:
    program = WHOLE(toy(Twice()))
    assert "hoist: 2 products with a smaller side" in program.report
    agree(Twice(), program)


class Keys(nn.Module):
    """The factor varies along the summed keys."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        probs = (x @ x.transpose(1, 2)).softmax(-1) * keep.unsqueeze(1)
        return ops.prune(probs @ x, keep).mul(keep.unsqueeze(-1)).sum(1)


class Shared(nn.Module):
    """One reader needs the product itself."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        probs = (x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1) * keep.unsqueeze(-1)
        return (ops.prune(probs @ x, keep) * keep.unsqueeze(-1)).sum(1) + probs.amax(1).amax(1, keepdim=True)


class Square(nn.Module):
    """The product is both sides of another, and scaled by a tensor."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.prune(x, keep)
        probs = (y @ y.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1) * keep.unsqueeze(-1)
        return ((probs @ probs) @ torch.where(keep.unsqueeze(-1), y, 0.0) * keep.unsqueeze(-1)).sum(1)


class Widened(nn.Module):
    """The factor makes the map wider than what it was, and the other side of its product is as wide."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        wide = keep.unsqueeze(-1).double()
        probs = (x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1) * wide
        return ops.prune(probs @ (x * wide), keep).mul(keep.unsqueeze(-1)).sum(1)


class Whole(nn.Module):
    """Numbers without fractions, scaled to some with."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.prune(x, keep)
        whole = y.long()
        logits = (whole @ whole.transpose(1, 2)) * 0.5
        probs = (logits + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1)
        return (probs @ y * keep.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("model", [Keys(), Shared(), Square(), Widened(), Whole()], ids=lambda model: type(model).__name__)
def test_what_would_be_wrong_or_no_gain_stays(toy: Toy, agree: Agree, model: nn.Module) -> None:
    program = WHOLE(toy(model))
    assert "hoist: 0 products with a smaller side" in program.report
    agree(model, program)


class Scored(nn.Module):
    """The score is the sum itself: the site's tap follows."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        probs = (x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1) * keep.unsqueeze(-1)
        score = probs.sum(1)
        later = keep & (score >= 0.4)
        return (ops.prune(probs @ x, later, score) * later.unsqueeze(-1)).sum(1)


def test_a_sites_score_keeps_its_place(toy: Toy, agree: Agree) -> None:
    placed, program = PLACED(toy(Scored())), HOISTED(toy(Scored()))
    inputs = {"x": torch.randn(1, 7, 4), "keep": torch.ones(1, 7, dtype=torch.bool)}
    (want,), (got,) = placed.trace(**inputs).score, program.trace(**inputs).score
    torch.testing.assert_close(got, want)
    agree(Scored(), WHOLE(toy(Scored())))
