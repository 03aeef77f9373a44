"""compact -> compact: equal gathers are made once, dead ones are gone."""

from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.onnx.emit import emit
from tpcompile.passes import Cleanup, Lower, Pipeline, pipeline
from tpcompile.program import Program, Stage

PLAIN = pipeline(optimize=False)


class TwoReaders(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        old = nn.functional.relu(x)
        x = ops.prune(x, keep)
        mask = keep.unsqueeze(-1)
        return ((x + old) * mask).sum(1) + ((x - old) * mask).sum(1) + ((x + old) * mask).sum(1)


def test_equal_gathers_are_made_once(
    toy: Callable[..., Program], show: Callable[[Program], str], agree: Callable[..., None]
) -> None:
    program = PLAIN(toy(TwoReaders()))
    gathers = program.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
    assert [str(n.args[0]) for n in gathers] == ["relu"]
    assert_expected_inline(
        "\n".join(show(program).splitlines()[-12:]),
        """\
%relu: f32[1, t0, 4] = aten.relu.default(%x)
%unsqueeze: bool[1, t1, 1] = aten.unsqueeze.default(%getitem_1, -1)
%index_select_default: f32[1, u0, 4] = aten.index_select.default(%relu, 1, %select_int)
%add_9: f32[1, t1, 4] = aten.add.Tensor(%getitem, %index_select_default)
%mul_10: f32[1, t1, 4] = aten.mul.Tensor(%add_9, %unsqueeze)
%sum_1: f32[1, 4] = aten.sum.dim_IntList(%mul_10, [1])
%sub_5: f32[1, t1, 4] = aten.sub.Tensor(%getitem, %index_select_default)
%mul_17: f32[1, t1, 4] = aten.mul.Tensor(%sub_5, %unsqueeze)
%sum_2: f32[1, 4] = aten.sum.dim_IntList(%mul_17, [1])
%add_22: f32[1, 4] = aten.add.Tensor(%sum_1, %sum_2)
%add_30: f32[1, 4] = aten.add.Tensor(%add_22, %sum_1)
return (%add_30)""",
    )
    agree(TwoReaders(), program)


def test_the_stage_and_the_sites_stay(toy: Callable[..., Program]) -> None:
    before = Pipeline(PLAIN.passes[:-1])(toy(TwoReaders()))
    after = Cleanup()(before)
    assert after.stage is Stage.COMPACT
    assert after.sites == before.sites
    assert str(Cleanup()(after)) == str(after)


class Told(nn.Module):
    """The score of the first site is only reported, that of the second decides."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.prune(x, keep, (x @ x.transpose(1, 2)).softmax(-1).sum(1))
        score = y.sum(-1)
        later = keep & (score > 0)
        return (ops.prune(y * 2, later, score) * later.unsqueeze(-1)).sum(1)


def test_a_score_that_decides_nothing_is_no_tap_of_the_engine(toy: Callable[..., Program], agree: Callable[..., None]) -> None:
    program = PLAIN(toy(Told()))
    first, second = program.sites
    assert (first.score, bool(second.score)) == ("", True)
    assert first.keep
    agree(Told(), program)
    model = emit(program)
    assert model.taps == ("site0.keep", "site0.index", "site1.keep", "site1.score", "site1.index")
    assert "Softmax" not in {node.op_type for node in model.model.graph}
    assert "Softmax" in {node.op_type for node in emit(Lower(counts="4+3")(program)).model.graph}
