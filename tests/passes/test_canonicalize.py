"""captured -> captured: the numbered cases of ``passes/canonicalize.py``."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile.errors import NotDeterministic
from tpcompile.passes import Canonicalize
from tpcompile.program import Program

Toy = Callable[..., Program]
Show = Callable[[Program], str]
Agree = Callable[..., None]


class Copies(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = x.clone().detach().contiguous().to(torch.float32)
        return nn.functional.dropout(y, 0.5, self.training) * keep.to(torch.float32).unsqueeze(-1)


def test_case_1_copies_vanish(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Copies()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%_to_copy: f32[1, n] = aten._to_copy.default(%keep, dtype=torch.float32)
%unsqueeze: f32[1, n, 1] = aten.unsqueeze.default(%_to_copy, -1)
%mul_13: f32[1, n, 4] = aten.mul.Tensor(%x, %unsqueeze)
return (%mul_13)""",
    )
    agree(Copies(), program)


class Heads(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)
        return heads.transpose(1, 2).reshape(x.shape) * keep.unsqueeze(-1)


def test_case_2_reshapes_have_constant_sizes(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Heads()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%view: f32[1, n, 2, 2] = aten.reshape.default(%x, [1, -1, 2, 2])
%transpose: f32[1, 2, n, 2] = aten.transpose.int(%view, 1, 2)
%transpose_1: f32[1, n, 2, 2] = aten.transpose.int(%transpose, 1, 2)
%view_1: f32[1, n, 4] = aten.reshape.default(%transpose_1, [1, -1, 4])
%unsqueeze: bool[1, n, 1] = aten.unsqueeze.default(%keep, -1)
%mul_17: f32[1, n, 4] = aten.mul.Tensor(%view_1, %unsqueeze)
return (%mul_17)""",
    )
    agree(Heads(), program)


class Square(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        n = x.shape[1]
        pairs = (x @ x.transpose(1, 2)).reshape(1, 1, n, n)
        return pairs.sum((1, 2, 3)) + keep.sum(1)


def test_case_2_two_dynamic_sizes_stay(toy: Toy, agree: Agree) -> None:
    program = Canonicalize()(toy(Square()))
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    assert [isinstance(s, int) for s in node.args[1]] == [True, True, False, False]
    agree(Square(), program)


class Mean(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.where(keep.unsqueeze(-1), x, 0.0)
        return hidden.mean(1), hidden.mean(-1, keepdim=True).sum(1), hidden.mean((1, 2))


def test_case_3_a_mean_is_a_sum_over_a_count(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Mean()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%unsqueeze: bool[1, n, 1] = aten.unsqueeze.default(%keep, -1)
%where: f32[1, n, 4] = aten.where.ScalarOther(%unsqueeze, %x, 0.0)
%sum_dim_int_list: f32[1, 4] = aten.sum.dim_IntList(%where, [1], False, dtype=torch.float32)
%sym_size_int: SymInt = aten.sym_size.int(%where, 1)
%div_tensor: f32[1, 4] = aten.div.Tensor(%sum_dim_int_list, %sym_size_int)
%sum_dim_int_list_1: f32[1, n, 1] = aten.sum.dim_IntList(%where, [2], True, dtype=torch.float32)
%div_tensor_1: f32[1, n, 1] = aten.div.Tensor(%sum_dim_int_list_1, 4)
%sum_1: f32[1, 1] = aten.sum.dim_IntList(%div_tensor_1, [1])
%sum_dim_int_list_2: f32[1] = aten.sum.dim_IntList(%where, [1, 2], False, dtype=torch.float32)
%mul: SymInt = mul(%sym_size_int, 4)
%div_tensor_2: f32[1] = aten.div.Tensor(%sum_dim_int_list_2, %mul)
return (%div_tensor, %sum_1, %div_tensor_2)""",
    )
    agree(Mean(), program)


def test_case_3_a_fixed_count_is_a_number(toy: Toy, agree: Agree) -> None:
    program = Canonicalize()(toy(Mean(), dynamic=False))
    divisors = [n.args[1] for n in program.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor)]
    assert divisors == [6, 4, 24]
    agree(Mean(), program, lengths=(6,))


class Twice(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return x * keep.unsqueeze(-1) + x * keep.unsqueeze(-1)


def test_case_4_equal_expressions_are_computed_once(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Twice()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%unsqueeze: bool[1, n, 1] = aten.unsqueeze.default(%keep, -1)
%mul_1: f32[1, n, 4] = aten.mul.Tensor(%x, %unsqueeze)
%add_12: f32[1, n, 4] = aten.add.Tensor(%mul_1, %mul_1)
return (%add_12)""",
    )
    agree(Twice(), program)


class Noise(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (x + torch.rand_like(x)) * keep.unsqueeze(-1)


class Dropped(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True) * keep.unsqueeze(-1)


@pytest.mark.parametrize(("model", "op"), [(Noise(), "aten.rand_like.default"), (Dropped(), "aten.native_dropout.default")])
def test_random_ops_are_refused(toy: Toy, model: nn.Module, op: str) -> None:
    with pytest.raises(NotDeterministic) as caught:
        Canonicalize()(toy(model))
    error = caught.value
    assert error.message == f"{op} draws random numbers: masked and gathered runs would differ"
    assert error.fix == "call model.eval(), or replace sampling by its deterministic form"
    assert error.where is not None
    assert error.where.file == __file__
    assert "rand_like" in error.where.source or "dropout" in error.where.source
