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
    assert_expected_inline(text, """""")


def test_the_dense_program_keeps_every_token(toy: Callable[..., Program]) -> None:
    program = KeepAll()(Canonicalize()(toy(Pool(), x=torch.randn(1, 6, 4))))
    for length in (2, 7):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(program(x=x)["output"], ((x + 1) * 2).mean(1))
