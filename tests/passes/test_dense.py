"""The dense program: the numbered cases of ``passes/dense.py``."""

from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.passes import Canonicalize
from tpcompile.passes.dense import KeepAll
from tpcompile.program import Program


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        score = x.mean(-1)
        keep = score > 0.0
        y = ops.prune(x + 1, keep, score)
        later = torch.logical_and(keep, y.sum(-1) > 4.0)
        z = ops.prune(y * 2, later)
        mask = later.unsqueeze(-1)
        return (z * mask).sum(1) / mask.sum(1)


def test_cases_1_and_2_sites_and_scores_are_gone(toy: Callable[..., Program], show: Callable[[Program], str]) -> None:
    program = KeepAll()(Canonicalize()(toy(Pool(), x=torch.randn(1, 6, 4))))
    text = show(program)
    assert "prune" not in text
    assert "gt" not in text
    assert_expected_inline(
        text,
        """\
program @ captured
input %x: f32[1, n, 4]
%add_4: f32[1, n, 4] = aten.add.Tensor(%x, 1)
%sym_size_int_1: SymInt = aten.sym_size.int(%x, 1)
%full_default_1: bool[1, n] = aten.full.default([1, %sym_size_int_1], True, dtype=torch.bool)
%mul_13: f32[1, n, 4] = aten.mul.Tensor(%add_4, 2)
%unsqueeze: bool[1, n, 1] = aten.unsqueeze.default(%full_default_1, -1)
%mul_21: f32[1, n, 4] = aten.mul.Tensor(%mul_13, %unsqueeze)
%sum_2: f32[1, 4] = aten.sum.dim_IntList(%mul_21, [1])
%sum_3: i64[1, 1] = aten.sum.dim_IntList(%unsqueeze, [1])
%div: f32[1, 4] = aten.div.Tensor(%sum_2, %sum_3)
return (%div)""",
    )


def test_the_dense_program_keeps_every_token(toy: Callable[..., Program]) -> None:
    program = KeepAll()(Canonicalize()(toy(Pool(), x=torch.randn(1, 6, 4))))
    for length in (2, 7):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(program(x=x)["output"], ((x + 1) * 2).mean(1))
