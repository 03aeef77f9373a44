"""marked -> placed: the numbered cases of ``passes/place.py``; refusals by their exact text."""

import re
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import AxisError, RevivedToken, TokenMismatch, UnknownOp, UnmaskedFold
from tpcompile.passes import DEFAULT, Canonicalize, Mark, Pipeline, Place
from tpcompile.program import Program

Toy = Callable[..., Program]
Show = Callable[[Program], str]
Agree = Callable[..., None]
Refused = Callable[[type[AxisError], Program], AxisError]
PlaceOf = Callable[[str], str]

PLACE = Pipeline((Canonicalize(), Mark(), Place()))
FOLD_FIX = (
    "multiply by the keep mask before a sum, or fill with -inf or -1e4 before a softmax or max; "
    "the masked model reads dropped tokens here"
)


def pool(x: Tensor, keep: Tensor) -> Tensor:
    """Sum of the kept rows."""
    return (x * keep.unsqueeze(-1)).sum(1)


class Attention(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        logits = x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)
        y = (logits.softmax(-1) @ x) * keep.unsqueeze(-1)
        return y.sum(1)


def test_case_1_token_dims_are_found_both_ways(toy: Toy, show: Show, agree: Agree) -> None:
    program = PLACE(toy(Attention()))
    assert_expected_inline(
        show(program),
        """\
program @ placed
tokens t1 < t0   site0  HERE
input %x: f32[1, t0, 4]
input %keep: bool[1, t0]
%prune: f32[1, t1, 4] = tpcompile.prune.default(%x, %keep)
%transpose: f32[1, 4, t1] = aten.transpose.int(%prune, 1, 2)
%matmul: f32[1, t1, t1] = aten.matmul.default(%prune, %transpose)
%where: f32[1, t1] = aten.where.Scalar(%keep, 0.0, -10000.0)
%unsqueeze: f32[1, 1, t1] = aten.unsqueeze.default(%where, 1)
%add_12: f32[1, t1, t1] = aten.add.Tensor(%matmul, %unsqueeze)
%softmax: f32[1, t1, t1] = aten.softmax.int(%add_12, -1)
%matmul_1: f32[1, t1, 4] = aten.matmul.default(%softmax, %prune)
%unsqueeze_1: bool[1, t1, 1] = aten.unsqueeze.default(%keep, -1)
%mul_24: f32[1, t1, 4] = aten.mul.Tensor(%matmul_1, %unsqueeze_1)
%sum_1: f32[1, 4] = aten.sum.dim_IntList(%mul_24, [1])
return (%sum_1)""",
    )
    agree(Attention(), program)


class Square(nn.Module):
    """As many tokens as channels: a value says nothing, a factor does."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        heads = x.view(1, 4, 2, 2).transpose(1, 2)
        logits = (heads @ heads.transpose(2, 3)).masked_fill(~keep[:, None, None, :], -1e4)
        merged = (logits.softmax(-1) @ heads).transpose(1, 2).reshape(1, 4, 4)
        return pool(merged, keep)


def test_case_1_sizes_say_nothing(toy: Toy, agree: Agree) -> None:
    program = DEFAULT(toy(Square(), length=4, dynamic=False))
    agree(Square(), program, lengths=(4, 4, 4))
    assert [placement.dims for placement in program.placements.values() if 1 in placement.dims.values()][-1] == {1: 1}


class TwoSites(nn.Module):
    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> Tensor:
        bias = torch.where(keep, 1.0, 0.0)
        y = ops.prune(x, keep)
        later = keep & more
        z = ops.prune(y * 2, later)
        return pool(z + y + bias.unsqueeze(-1), later)


def more(length: int) -> dict[str, Tensor]:
    """A second decision."""
    return {"more": torch.arange(length).unsqueeze(0) % 3 != 1}


def test_cases_2_and_3_newest_forward_and_raised_backward(toy: Toy, show: Show, agree: Agree) -> None:
    inputs = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool)} | more(6)
    program = PLACE(toy(TwoSites(), **inputs))
    assert_expected_inline(
        show(program),
        """\
program @ placed
tokens t1 < t0   site0  HERE
tokens t2 < t1   site1  HERE
input %x: f32[1, t0, 4]
input %keep: bool[1, t0]
input %more: bool[1, t0]
%where: f32[1, t0] = aten.where.Scalar(%keep, 1.0, 0.0)
%prune: f32[1, t1, 4] = tpcompile.prune.default(%x, %keep)
%and_1: bool[1, t1] = aten.__and__.Tensor(%keep, %more)
%mul_6: f32[1, t1, 4] = aten.mul.Tensor(%prune, 2)
%prune_1: f32[1, t2, 4] = tpcompile.prune.default(%mul_6, %and_1)
%add_13: f32[1, t2, 4] = aten.add.Tensor(%prune_1, %prune)
%unsqueeze: f32[1, t2, 1] = aten.unsqueeze.default(%where, -1)
%add_20: f32[1, t2, 4] = aten.add.Tensor(%add_13, %unsqueeze)
%unsqueeze_1: bool[1, t2, 1] = aten.unsqueeze.default(%and_1, -1)
%mul_22: f32[1, t2, 4] = aten.mul.Tensor(%add_20, %unsqueeze_1)
%sum_1: f32[1, 4] = aten.sum.dim_IntList(%mul_22, [1])
return (%sum_1)""",
    )
    agree(TwoSites(), program, more)
    agree(TwoSites(), DEFAULT(toy(TwoSites(), **inputs)), more)


class BeforeTheSite(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        skip = x * 3
        return pool(ops.prune(x, keep) + skip, keep)


def test_case_3_a_result_made_before_the_site_stays_full(toy: Toy, agree: Agree) -> None:
    program = PLACE(toy(BeforeTheSite()))
    assert program.placements["mul"].dims == {1: 0}
    agree(BeforeTheSite(), DEFAULT(toy(BeforeTheSite())))


class Mean(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        rows = ops.prune(x, keep)
        return rows.mean(1)


def test_case_4_a_mean_over_all_tokens_is_refused(toy: Toy, refused: Refused, place_of: PlaceOf) -> None:
    site, line = place_of("rows = ops.prune(x, keep)"), place_of("return rows.mean(1)")
    error = refused(UnmaskedFold, toy(Mean()))
    assert str(error) == (
        f"aten.sum.dim_IntList combines over tokens that site0 ({site}) dropped, and nothing masks them there\n"
        f"  at      {line} in forward:  return rows.mean(1)\n"
        f"  node    %sum_dim_int_list: f32[1, 4] = aten.sum.dim_IntList(%prune, [1], False, dtype=torch.float32)   # {line}\n"
        "  during  place, after canonicalize, recognise, mark\n"
        f"  fix     {FOLD_FIX}"
    )


class Softmax(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = (x @ x.transpose(1, 2)).softmax(-1)
        return pool(p @ x, keep)


class Weighted(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (x.transpose(1, 2) @ ops.prune(x, keep)).sum(1)


class Largest(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep) * keep.unsqueeze(-1)).amax(1)


class TopChannels(nn.Module):
    """Two results of one op: each runs over the site's set."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        values, _ = ops.prune(x, keep).topk(2, -1)
        return values.sum(1)


class Doubled(nn.Module):
    """The mask is added with the wrong sign: dropped keys win."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        mask = torch.where(keep, 0.0, -1e4).unsqueeze(1)
        return pool(torch.add(x @ x.transpose(1, 2), mask, alpha=-1).softmax(-1) @ x, keep)


class Undone(nn.Module):
    """A mask that is taken back."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        mask = torch.where(keep, 0.0, -1e4).unsqueeze(1)
        back = torch.where(keep, 0.0, 1e4).unsqueeze(1)
        return pool(((x @ x.transpose(1, 2) + mask) + back).softmax(-1) @ x, keep)


@pytest.mark.parametrize(
    ("model", "op"),
    [
        (Softmax(), "softmax.int"),
        (Weighted(), "matmul.default"),
        (Largest(), "amax.default"),
        (TopChannels(), "sum.dim_IntList"),
        (Doubled(), "softmax.int"),
        (Undone(), "softmax.int"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_case_4_every_fold_needs_its_neutral_value(toy: Toy, model: nn.Module, op: str, refused: Refused) -> None:
    error = refused(UnmaskedFold, toy(model))
    assert error.message.startswith(f"aten.{op} combines over tokens that site0 (test_place.py:")
    assert error.fix == FOLD_FIX


class Revived(nn.Module):
    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> Tensor:
        first = ops.prune(x, keep)
        return pool(ops.prune(first, more), keep & more)


class ByScore(nn.Module):
    """The neutral score of a dropped token fails the comparison."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        score = x.abs().sum(-1) * keep
        later = score >= 0.5
        return pool(ops.prune(x, later, score), later)


class ByLowScore(ByScore):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        score = x.abs().sum(-1) * keep
        later = score < 0.5
        return pool(ops.prune(x, later, score), later)


def test_case_6_a_token_that_could_return_is_refused(toy: Toy, agree: Agree, refused: Refused, place_of: PlaceOf) -> None:
    error = refused(RevivedToken, toy(Revived(), x=torch.randn(1, 6, 4), keep=torch.ones(1, 6, dtype=torch.bool), **more(6)))
    assert error.message == f"a token dropped at site0 ({place_of('first = ops.prune')}) could be kept here again"
    assert error.fix == "write keep = earlier_keep & (score >= threshold)"
    assert refused(RevivedToken, toy(ByLowScore())).fix == error.fix
    agree(ByScore(), DEFAULT(toy(ByScore())))


class Strange(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return pool(torch.fft.rfft(ops.prune(x, keep), dim=-1).real, keep)


class StrangeBefore(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return pool(ops.prune(x.flip(2), keep), keep)


def test_case_6_an_op_without_a_rule_is_refused_behind_a_site_only(toy: Toy, agree: Agree, refused: Refused) -> None:
    error = refused(UnknownOp, toy(Strange()))
    assert error.message == "no axis rule for aten.fft_rfft.default, and its input runs over pruned tokens"
    assert error.fix == "add a rule with its sample (docs/add-an-op.md), or move the op before the first site"
    agree(StrangeBefore(), DEFAULT(toy(StrangeBefore())))


class TwoSequences(nn.Module):
    def forward(self, x: Tensor, keep: Tensor, memory: Tensor, known: Tensor) -> Tensor:
        return pool(ops.prune(x, keep), keep) + pool(ops.prune(memory, known), known)


class Sideways(nn.Module):
    """A mask over all tokens prunes tokens that are already fewer, without being nested on them."""

    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> Tensor:
        y = ops.prune(ops.prune(x, keep & more), keep)
        return pool(y, keep & more)


def test_two_sequences_are_refused(toy: Toy, refused: Refused) -> None:
    mask = torch.ones(1, 6, dtype=torch.bool)
    error = refused(
        TokenMismatch, toy(TwoSequences(), x=torch.randn(1, 6, 4), keep=mask, memory=torch.randn(1, 6, 4), known=mask)
    )
    assert error.message == "sites prune two unrelated token axes"
    assert error.fix == "prune one sequence per program; export the encoders apart"


def test_sites_in_the_wrong_order_are_refused(toy: Toy, refused: Refused) -> None:
    refused(RevivedToken, toy(Sideways(), x=torch.randn(1, 6, 4), keep=torch.ones(1, 6, dtype=torch.bool), **more(6)))


class Dead(nn.Module):
    """Keys may all be masked, and the row of a dropped query is read."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        logits = x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)
        return (logits.softmax(-1) @ x)[:, 0]


class Decided(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        logits = x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)
        score = (logits.softmax(-1) @ x).sum(-1)
        later = keep & (score > 0.0)
        return pool(ops.prune(x, later, score), later)


def test_case_7_a_softmax_without_keys_must_not_be_read(toy: Toy, refused: Refused) -> None:
    error = refused(UnmaskedFold, toy(Dead()))
    assert error.message.startswith("output 'output' may read a softmax row whose keys were all dropped by site0 (test_place.py:")
    assert error.fix == "keep a prefix token (keep = keep | first), or multiply the softmax by the keep mask of its queries"


class Infinite(nn.Module):
    """An infinite mask gives NaN where every key is gone: a product with 0 does not hide it, a ``where`` does."""

    def __init__(self, select: bool) -> None:
        super().__init__()
        self.select = select

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = (x @ x.transpose(1, 2)).masked_fill(~keep.unsqueeze(1), float("-inf")).softmax(-1)
        rows = p @ torch.where(keep.unsqueeze(-1), x, 0.0)
        y = torch.where(keep.unsqueeze(-1), rows, 0.0) if self.select else rows * keep.unsqueeze(-1)
        return y.sum(1)


def test_case_7_nan_is_hidden_by_where_only(toy: Toy, agree: Agree, refused: Refused) -> None:
    agree(Infinite(select=True), DEFAULT(toy(Infinite(select=True))))
    assert refused(UnmaskedFold, toy(Infinite(select=False))).fix


class AttendFirst(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(keep.shape[1]) == 0)
        x = ops.prune(x, keep)
        return ((x @ x.transpose(1, 2)).masked_fill(~keep.unsqueeze(1), float("-inf")).softmax(-1) @ x)[:, 0]


def test_what_the_proof_takes_for_granted_is_recorded(toy: Toy, agree: Agree, place_of: PlaceOf) -> None:
    finite = "activations are finite: 0 * x is 0"
    line = place_of("y = (logits.softmax(-1) @ x) * keep.unsqueeze(-1)")
    assert PLACE(toy(Attention())).assumptions == (
        finite,
        f"{line} (): masked keys lie 104 below the largest logit of their row; they do where living logits spread less than 9896 about 0",
    )
    program = DEFAULT(toy(AttendFirst()))
    assert program.assumptions == (finite,)
    agree(AttendFirst(), program)


class Restored(nn.Module):
    """Full length again; what was dropped holds its last state, or what an earlier mask would take from the gone."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late

    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> Tensor:
        y = ops.prune(x, keep)
        last = keep & more
        y = ops.prune(y * 2, last)
        return ops.restore(y, last if self.late else keep, x)


def test_case_8_restore_takes_no_dropped_row(toy: Toy, refused: Refused) -> None:
    inputs = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool), "more": torch.ones(1, 6, dtype=torch.bool)}
    error = refused(RevivedToken, toy(Restored(late=False), **inputs))
    assert re.fullmatch(r"restore may take a token from rows where site1 \(.*\) dropped it", error.message)
    assert error.fix == "pass the keep mask of the last site before it"
    Place()(Mark()(Canonicalize()(toy(Restored(late=True), **inputs))))
