"""placed -> compact: the numbered cases of ``passes/compact.py``."""

from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.passes import pipeline
from tpcompile.program import Program

aten = torch.ops.aten
PLAIN = pipeline(optimize=False)
Toy = Callable[..., Program]
Show = Callable[[Program], str]
Agree = Callable[..., None]


def more(length: int) -> dict[str, Tensor]:
    """A second decision."""
    return {"more": torch.arange(length).unsqueeze(0) % 3 != 1}


def inputs(length: int = 6) -> dict[str, Tensor]:
    """Example inputs of a model with two decisions."""
    return {"x": torch.randn(1, length, 4), "keep": torch.ones(1, length, dtype=torch.bool)} | more(length)


class Shared(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.prune(x + 1, keep)
        z = ops.prune(x * 2, keep)
        return ((y * z) * keep.unsqueeze(-1)).sum(1)


def test_case_1_one_compact_per_site(toy: Toy, show: Show, agree: Agree) -> None:
    program = PLAIN(toy(Shared()))
    assert_expected_inline(
        show(program).partition("compact.default")[2],
        """\
(%add, %keep, %lt_scalar, None)
%getitem: f32[1, t1, 4] = getitem(%compact_default, 0)
%getitem_1: bool[1, u0] = getitem(%compact_default, 1)
%getitem_2: i64[1, u0] = getitem(%compact_default, 2)
%select_int: i64[u0] = aten.select.int(%getitem_2, 0, 0)
%mul_6: f32[1, t0, 4] = aten.mul.Tensor(%x, 2)
%index_select_default: f32[1, t1, 4] = aten.index_select.default(%mul_6, 1, %select_int)
%mul_13: f32[1, t1, 4] = aten.mul.Tensor(%getitem, %index_select_default)
%unsqueeze: bool[1, t1, 1] = aten.unsqueeze.default(%getitem_1, -1)
%mul_18: f32[1, t1, 4] = aten.mul.Tensor(%mul_13, %unsqueeze)
%sum_1: f32[1, 4] = aten.sum.dim_IntList(%mul_18, [1])
return (%sum_1)""",
    )
    agree(Shared(), program)


class Skips(nn.Module):
    """Rows of every earlier set meet the newest one."""

    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> Tensor:
        first = ops.prune(x, keep)
        later = keep & more
        second = ops.prune(first * 2, later)
        return ((second + first + x) * later.unsqueeze(-1)).sum(1)


def test_case_2_older_sets_are_gathered_at_joins(toy: Toy, show: Show, agree: Agree) -> None:
    program = PLAIN(toy(Skips(), **inputs()))
    assert_expected_inline(
        "\n".join(show(program).splitlines()[-10:]),
        """\
%getitem_4: bool[1, u1] = getitem(%compact_default_1, 1)
%getitem_5: i64[1, u1] = getitem(%compact_default_1, 2)
%select_int_1: i64[u1] = aten.select.int(%getitem_5, 0, 0)
%index_select_default_1: f32[1, u1, 4] = aten.index_select.default(%getitem, 1, %select_int_1)
%add_11: f32[1, t2, 4] = aten.add.Tensor(%getitem_3, %index_select_default_1)
%add_15: f32[1, t2, 4] = aten.add.Tensor(%add_11, %index_select_default_1)
%unsqueeze: bool[1, t2, 1] = aten.unsqueeze.default(%getitem_4, -1)
%mul_18: f32[1, t2, 4] = aten.mul.Tensor(%add_15, %unsqueeze)
%sum_1: f32[1, 4] = aten.sum.dim_IntList(%mul_18, [1])
return (%sum_1)""",
    )
    agree(Skips(), program, more)


class Pairs(nn.Module):
    """One tensor stands on both sides of a product, with other dims pruned on each."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        p = (x @ x.transpose(1, 2)).softmax(-1)
        y = ops.prune(x, keep)
        return ((p @ p) @ torch.where(keep.unsqueeze(-1), y, 0.0) * keep.unsqueeze(-1)).sum(1)


def test_case_2_a_tensor_used_twice_is_gathered_per_use(toy: Toy, agree: Agree) -> None:
    agree(Pairs(), PLAIN(toy(Pairs())))


class Heads(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        n = x.shape[1]
        heads = x.view(1, n, 2, 2).transpose(1, 2)
        bias = torch.where(keep, 0.0, -1e4)[:, None, None, :].expand(1, 2, n, n)
        y = ((heads @ heads.transpose(2, 3) + bias).softmax(-1) @ heads).transpose(1, 2).reshape(1, n, 4)
        return (y * keep.unsqueeze(-1)).sum(1) / n


def test_case_3_shapes_follow_the_set_and_numbers_stay(toy: Toy, agree: Agree) -> None:
    program = PLAIN(toy(Heads()))
    (divide,) = program.graph.find_nodes(op="call_function", target=aten.div.Tensor)
    assert divide.args[1].args[0].op == "placeholder"
    (expand,) = program.graph.find_nodes(op="call_function", target=aten.expand.default)
    assert expand.args[1][3].args[0].name == program.sites[0].index
    agree(Heads(), program)


def test_case_3_a_captured_length_follows_the_set_too(toy: Toy, agree: Agree) -> None:
    program = PLAIN(toy(Heads(), dynamic=False))
    agree(Heads(), program, lengths=(6, 6, 6))


class First(nn.Module):
    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> Tensor:
        y = ops.prune(x, keep)
        later = keep & more
        return ops.prune(y, later)[:, 1]


def test_case_4_a_set_is_never_empty_and_pins_reach_back(toy: Toy, agree: Agree) -> None:
    program = PLAIN(toy(First(), **inputs()))
    assert [site.pinned for site in program.sites] == [2, 2]
    agree(First(), program, more)
    nothing = torch.zeros(1, 7, dtype=torch.bool)
    trace = program.trace(x=torch.randn(1, 7, 4), keep=nothing, more=nothing)
    assert [index.tolist() for index in trace.index if index is not None] == [[[0, 1]], [[0, 1]]]
    assert [keep.sum().item() for keep in trace.keep] == [0, 0]


class Scored(nn.Module):
    def forward(self, x: Tensor, keep: Tensor, score: Tensor) -> Tensor:
        y = ops.prune(x, keep, score)
        later = keep & (score > 0.0)
        z = ops.prune(y, later, score)
        return (z * later.unsqueeze(-1)).sum(1)


def test_decisions_and_scores_stand_on_the_storage_the_site_sees(toy: Toy, agree: Agree) -> None:
    given = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool), "score": torch.randn(1, 6)}
    program = PLAIN(toy(Scored(), **given))
    keep = torch.tensor([[True, False, True, True, False, True]])
    trace = program.trace(**given | {"keep": keep})
    assert [k.shape[1] for k in trace.keep] == [6, 4]
    assert [s.shape[1] for s in trace.score if s is not None] == [6, 4]
    assert trace.index[0] is not None
    torch.testing.assert_close(trace.score[1], given["score"][:, trace.index[0][0]])
    agree(Scored(), program, more=lambda n: {"score": torch.randn(1, n)})
