"""placed -> placed: the numbered cases of ``passes/optimize/tally.py``."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.flops import evaluate
from tpcompile.passes import Pipeline, Tally, pipeline
from tpcompile.passes.cost import polynomial, traffic
from tpcompile.program import Program

Toy = Callable[..., Program]
Show = Callable[[Program], str]
Agree = Callable[..., None]

PLACED = Pipeline(pipeline(optimize=False).passes[:4])
TALLIED = Pipeline((*PLACED.passes, Tally()))
SIZES = {"t0": 64, "t1": 32, "t2": 16}


def changed(show: Show, before: Program, after: Program) -> str:
    """Lines that are new."""
    old = set(show(before).splitlines())
    return "\n".join(line for line in show(after).splitlines() if line not in old)


class Received(nn.Module):
    """The attention a token receives: the mean over heads, then the sum over queries."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        heads = x.view(x.shape[0], -1, 2, 2).transpose(1, 2)
        probs = (heads @ heads.transpose(2, 3) + torch.where(keep, 0.0, -1e4)[:, None, None, :]).softmax(-1)
        score = probs.mean(1).sum(1)
        later = keep & (score >= 0.8)
        y = (probs @ heads).transpose(1, 2).reshape(x.shape)
        return (ops.prune(y, later, score) * later.unsqueeze(-1)).sum(1)


def test_cases_1_and_2_one_product_instead_of_two_sums(toy: Toy, show: Show, agree: Agree) -> None:
    placed, program = PLACED(toy(Received())), TALLIED(toy(Received()))
    assert_expected_inline(
        changed(show, placed, program),
        """\
%full_default: f32[1, 1] = aten.full.default([1, 1], 1.0, dtype=torch.float32)
%sym_size_int: SymInt = aten.sym_size.int(%softmax, 2)
%expand_default: f32[1, t0] = aten.expand.default(%full_default, [1, %sym_size_int])
%matmul_default: f32[1, 2, 1, t0] = aten.matmul.default(%expand_default, %softmax)
%sum_dim_int_list_2: f32[1, t0] = aten.sum.dim_IntList(%matmul_default, [1, 2], False)
%div_tensor_1: f32[1, t0] = aten.div.Tensor(%sum_dim_int_list_2, 2)
%ge: bool[1, t0] = aten.ge.Scalar(%div_tensor_1, 0.8)
%prune: f32[1, t1, 4] = tpcompile.prune.default(%_unsafe_view, %and_1, %div_tensor_1)""",
    )
    assert_expected_inline(
        changed(show, program, placed),
        """\
%sum_dim_int_list: f32[1, t0, t0] = aten.sum.dim_IntList(%softmax, [1], False, dtype=torch.float32)
%div_tensor: f32[1, t0, t0] = aten.div.Tensor(%sum_dim_int_list, 2)
%sum_1: f32[1, t0] = aten.sum.dim_IntList(%div_tensor, [1])
%ge: bool[1, t0] = aten.ge.Scalar(%sum_1, 0.8)
%prune: f32[1, t1, 4] = tpcompile.prune.default(%_unsafe_view, %and_1, %sum_1)""",
    )
    agree(Received(), program)
    agree(Received(), pipeline()(toy(Received())))
    every, row = 2 * 64 * 64, 2 * 64
    before = every + 64 * 64 + 2 * 64 * 64 + 64 * 64 + 64
    after = every + 64 + 2 * row + 64 + 2 * 64 + 1
    assert evaluate(traffic(placed), SIZES) - evaluate(traffic(program), SIZES) == 4 * (before - after)
    assert evaluate(polynomial(program), SIZES) - evaluate(polynomial(placed), SIZES) == 2 * every


class Behind(nn.Module):
    """Two sites; the map of the second stands on the set of the first."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.prune(x, keep)
        probs = (y @ y.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1)
        score = torch.where(keep.unsqueeze(-1), probs, 0.0).sum(1)
        later = keep & (score >= 0.5)
        z = ops.prune(probs @ y, later, score)
        return (z * later.unsqueeze(-1)).sum(1)


def test_the_ones_follow_the_set_of_their_map(toy: Toy, agree: Agree) -> None:
    program = pipeline()(toy(Behind()))
    assert "tally: 1 sums over maps" in program.report
    (ones,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default)
    assert program.placements[ones.name].dims == {1: 1}
    agree(Behind(), program)


class Masked(nn.Module):
    """A map under a mask of its rows is for ``hoist``; a sum over keys is none over rows."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        probs = (x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1) * keep.unsqueeze(-1)
        later = keep & (probs.sum(1) >= 0.5)
        return (ops.prune(probs @ x, later) * later.unsqueeze(-1)).sum(1) + probs.sum(2).sum(1, keepdim=True)


def test_what_hoist_takes_and_sums_over_keys_stay(toy: Toy, agree: Agree) -> None:
    program = TALLIED(toy(Masked()))
    assert "tally: 0 sums over maps" in program.report
    agree(Masked(), pipeline()(toy(Masked())))


@pytest.mark.parametrize("made", [Received, Behind])
def test_each_sample_by_its_own_rows(made: type[nn.Module]) -> None:
    model, generator = made().eval(), torch.Generator().manual_seed(3)
    x, keep = torch.randn(3, 7, 4, generator=generator), torch.rand(3, 7, generator=generator) > 0.4
    keep[:, 0] = True
    captured = capture(model, {"x": x, "keep": keep}, {"x": {0: "b", 1: "n"}, "keep": {0: "b", 1: "n"}}, {"n": (2, 64)})
    program = pipeline("ragged")(captured)
    torch.testing.assert_close(program(x=x, keep=keep)["output"], model(x, keep), rtol=0, atol=1e-5)
