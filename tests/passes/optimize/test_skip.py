"""marked -> marked: the numbered cases of ``passes/optimize/skip.py``."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.flops import evaluate
from tpcompile.passes import DEFAULT, PASSES, Pipeline, Skip, pipeline
from tpcompile.passes.cost import polynomial
from tpcompile.program import Program

Toy = Callable[..., Program]
Agree = Callable[..., None]

MARKED = Pipeline(DEFAULT.passes[:3])


class Sites(nn.Module):
    """Much is computed behind the first and the third site, next to nothing between the second and the third."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 4)

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.block(ops.prune(x, keep))
        second = keep & (y.sum(-1) > -2)
        y = ops.prune(y, second) * 2
        third = second & (y.sum(-1) > -1)
        y = self.block(ops.prune(y, third))
        return (y * third.unsqueeze(-1)).sum(1)


def test_cases_1_and_2_a_site_that_saves_little_is_left_masked(toy: Toy, agree: Agree) -> None:
    model = Sites()
    marked = MARKED(toy(model))
    program = Skip(least=0.05)(marked)
    assert [site.name for site in program.sites] == ["site0", "site1"]
    assert [site.tokens.name for site in program.sites] == ["t1", "t2"]
    assert [site.where.line for site in program.sites] == [marked.sites[0].where.line, marked.sites[2].where.line]
    assert len(program.graph.find_nodes(op="call_function", target=ops.PRUNE)) == 2
    (line,) = [text for text in program.report if text.startswith("skip: ")]
    assert line == f"skip: site1 at {marked.sites[1].where} is left masked: it saves 0.2 % of the cost, least is 5.0 %"
    whole = pipeline(skip_below=0.05)(toy(model))
    assert "skip{least=0.05}" in whole.history
    agree(model, whole)
    sizes = {"t0": 16, "t1": 12, "t2": 10, "t3": 8}
    every = evaluate(polynomial(pipeline()(toy(model))), sizes)
    assert evaluate(polynomial(whole), {**sizes, "t2": 8}) == every  # no product stands between the two


def test_case_3_one_site_stays(toy: Toy, agree: Agree) -> None:
    model = Sites()
    program = pipeline(skip_below=1.0)(toy(model))
    assert len(program.sites) == 1
    agree(model, program)


class Restored(nn.Module):
    """The first site's rows come back at full length."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.restore(ops.prune(x, keep) * 2, keep, x)
        return y


def test_case_3_rows_that_come_back(toy: Toy, agree: Agree) -> None:
    program = pipeline(skip_below=1.0)(toy(Restored()))
    assert len(program.sites) == 1
    agree(Restored(), program)


def test_every_site_is_kept_by_default(toy: Toy) -> None:
    marked = MARKED(toy(Sites()))
    assert Skip(least=0.001)(marked) == replace(
        marked, report=(*marked.report, "skip: every site pays"), history=(*marked.history, "skip{least=0.001}")
    )
    assert "skip" not in str(DEFAULT)
    assert PASSES["skip"] is Skip


@pytest.mark.parametrize("keep", [0.2, 0.95])
def test_it_is_judged_at_the_counts_given(toy: Toy, keep: float) -> None:
    """Where nearly all is kept no site saves a tenth."""
    program = Skip(least=0.1, keep=keep)(MARKED(toy(Sites())))
    assert len(program.sites) == (2 if keep == 0.2 else 1)
