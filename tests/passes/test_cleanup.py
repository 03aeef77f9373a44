"""compact -> compact: equal gathers are made once, dead ones are gone."""

from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.passes import DEFAULT, Cleanup, Pipeline
from tpcompile.program import Program, Stage


class TwoReaders(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        old = nn.functional.relu(x)
        x = ops.prune(x, keep)
        mask = keep.unsqueeze(-1)
        return ((x + old) * mask).sum(1) + (old * mask).sum(1) + ((x + old) * mask).sum(1)


def test_equal_gathers_are_made_once(toy: Callable[..., Program], show: Callable[[Program], str], agree: Callable[..., None]) -> None:
    program = DEFAULT(toy(TwoReaders()))
    gathers = program.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
    assert len(gathers) == 1
    assert_expected_inline("\n".join(show(program).splitlines()[-11:]), """""")
    agree(TwoReaders(), program)


def test_the_stage_and_the_sites_stay(toy: Callable[..., Program]) -> None:
    before = Pipeline(DEFAULT.passes[:-1])(toy(TwoReaders()))
    after = Cleanup()(before)
    assert after.stage is Stage.COMPACT
    assert after.sites == before.sites
    assert str(Cleanup()(after)) == str(after)
