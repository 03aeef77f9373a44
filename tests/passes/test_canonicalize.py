"""captured -> captured: the numbered cases of ``passes/canonicalize.py``."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
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


def test_case_5_equal_expressions_are_computed_once(toy: Toy, show: Show, agree: Agree) -> None:
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


class Attends(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=keep.unsqueeze(1))


def test_case_4_attention_is_products_and_a_softmax(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Attends()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%prune: f32[1, n, 4] = tpcompile.prune.default(%x, %keep)
%unsqueeze: bool[1, 1, n] = aten.unsqueeze.default(%keep, 1)
%transpose_int: f32[1, 4, n] = aten.transpose.int(%prune, -2, -1)
%matmul_default: f32[1, n, n] = aten.matmul.default(%prune, %transpose_int)
%mul_tensor: f32[1, n, n] = aten.mul.Tensor(%matmul_default, 0.5)
%where_scalar_other: f32[1, n, n] = aten.where.ScalarOther(%unsqueeze, %mul_tensor, -inf)
%_safe_softmax_default: f32[1, n, n] = aten._safe_softmax.default(%where_scalar_other, -1)
%matmul_default_1: f32[1, n, 4] = aten.matmul.default(%_safe_softmax_default, %prune)
return (%matmul_default_1)""",
    )
    agree(Attends(), program)


class Equations(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        heads = x.view(1, -1, 2, 2)
        return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", heads, heads), heads)


def test_case_4_an_equation_is_a_matmul(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Equations()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%view: f32[1, n, 2, 2] = aten.reshape.default(%x, [1, -1, 2, 2])
%permute_default: f32[1, 2, n, 2] = aten.permute.default(%view, [0, 2, 1, 3])
%permute_default_1: f32[1, 2, 2, n] = aten.permute.default(%view, [0, 2, 3, 1])
%matmul_default: f32[1, 2, n, n] = aten.matmul.default(%permute_default, %permute_default_1)
%matmul_default_1: f32[1, 2, n, 2] = aten.matmul.default(%matmul_default, %permute_default)
%permute_default_3: f32[1, n, 2, 2] = aten.permute.default(%matmul_default_1, [0, 2, 1, 3])
return (%permute_default_3)""",
    )
    agree(Equations(), program)


class Assigned(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y, mask = x.clone(), torch.zeros_like(keep, dtype=torch.float32)
        y[~keep] = 0
        mask[y[..., 0] < 0] = -1e4
        y[:, 0] = 1.0
        first, second = y.split([1, 3], -1)
        return torch.cat([second, first], -1) + mask.unsqueeze(-1) + y.std(-1, keepdim=True) + y.max(-1, keepdim=True).values


def test_case_4_assignments_splits_and_spreads(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Assigned()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%zeros_like: f32[1, n] = aten.zeros_like.default(%keep, dtype=torch.float32, pin_memory=False)
%bitwise_not: bool[1, n] = aten.bitwise_not.default(%keep)
%unsqueeze_default: bool[1, n, 1] = aten.unsqueeze.default(%bitwise_not, -1)
%where_self: f32[1, n, 4] = aten.where.self(%unsqueeze_default, %c_captured_lifted_tensor_0, %x)
%select_1: f32[1, n] = aten.select.int(%where_self, 2, 0)
%lt: bool[1, n] = aten.lt.Scalar(%select_1, 0)
%where_self_1: f32[1, n] = aten.where.self(%lt, %c_captured_lifted_tensor_1, %zeros_like)
%expand_default: f32[1, 4] = aten.expand.default(%c_captured_lifted_tensor_2, [1, 4])
%sym_size_int: SymInt = aten.sym_size.int(%where_self, 1)
%arange_default: i64[n] = aten.arange.default(%sym_size_int)
%unsqueeze_default_1: i64[n, 1] = aten.unsqueeze.default(%arange_default, -1)
%eq_scalar: bool[n, 1] = aten.eq.Scalar(%unsqueeze_default_1, 0)
%unsqueeze_default_2: f32[1, 1, 4] = aten.unsqueeze.default(%expand_default, 1)
%where_self_2: f32[1, n, 4] = aten.where.self(%eq_scalar, %unsqueeze_default_2, %where_self)
%slice_tensor: f32[1, n, 3] = aten.slice.Tensor(%where_self_2, 2, 1, 4)
%slice_tensor_1: f32[1, n, 1] = aten.slice.Tensor(%where_self_2, 2, 0, 1)
%cat: f32[1, n, 4] = aten.cat.default([%slice_tensor, %slice_tensor_1], -1)
%unsqueeze_1: f32[1, n, 1] = aten.unsqueeze.default(%where_self_1, -1)
%add_37: f32[1, n, 4] = aten.add.Tensor(%cat, %unsqueeze_1)
%sum_dim_int_list: f32[1, n, 1] = aten.sum.dim_IntList(%where_self_2, [2], True)
%div_tensor: f32[1, n, 1] = aten.div.Tensor(%sum_dim_int_list, 4)
%sub_tensor: f32[1, n, 4] = aten.sub.Tensor(%where_self_2, %div_tensor)
%mul_tensor: f32[1, n, 4] = aten.mul.Tensor(%sub_tensor, %sub_tensor)
%sum_dim_int_list_1: f32[1, n, 1] = aten.sum.dim_IntList(%mul_tensor, [2], True)
%div_tensor_1: f32[1, n, 1] = aten.div.Tensor(%sum_dim_int_list_1, 3)
%sqrt_default: f32[1, n, 1] = aten.sqrt.default(%div_tensor_1)
%add_44: f32[1, n, 4] = aten.add.Tensor(%add_37, %sqrt_default)
%amax_default: f32[1, n, 1] = aten.amax.default(%where_self_2, [-1], True)
%add_54: f32[1, n, 4] = aten.add.Tensor(%add_44, %amax_default)
return (%add_54)""",
    )
    agree(Assigned(), program)


class Blocks(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        a = torch.baddbmm(x, x, torch.eye(4).unsqueeze(0), alpha=0.5)
        a = nn.functional.pad(a, (1, 0), value=2.0)[..., :4] + x.new_full((1, 1, 4), 3.0)
        return a.repeat(1, 1, 1) + keep.unsqueeze(-1).repeat(1, 1, 4) * torch.lerp(x, a, 0.5)


def test_case_4_eyes_edges_and_repeats(toy: Toy, show: Show, agree: Agree) -> None:
    program = Canonicalize()(toy(Blocks()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%arange_default: i64[4] = aten.arange.default(4)
%unsqueeze_default: i64[4, 1] = aten.unsqueeze.default(%arange_default, 1)
%unsqueeze_default_1: i64[1, 4] = aten.unsqueeze.default(%arange_default, 0)
%eq_tensor: bool[4, 4] = aten.eq.Tensor(%unsqueeze_default, %unsqueeze_default_1)
%_to_copy_default: f32[4, 4] = aten._to_copy.default(%eq_tensor, dtype=torch.float32)
%unsqueeze: f32[1, 4, 4] = aten.unsqueeze.default(%_to_copy_default, 0)
%bmm_default: f32[1, n, 4] = aten.bmm.default(%x, %unsqueeze)
%mul_tensor: f32[1, n, 4] = aten.mul.Tensor(%bmm_default, 0.5)
%add_tensor: f32[1, n, 4] = aten.add.Tensor(%mul_tensor, %x)
%slice_tensor: f32[1, n, 1] = aten.slice.Tensor(%add_tensor, 2, 0, 1)
%full_like_default: f32[1, n, 1] = aten.full_like.default(%slice_tensor, 2.0)
%expand_default: f32[1, n, 1] = aten.expand.default(%full_like_default, [-1, -1, 1])
%cat_default: f32[1, n, 5] = aten.cat.default([%expand_default, %add_tensor], 2)
%slice_1: f32[1, n, 4] = aten.slice.Tensor(%cat_default, 2, 0, 4)
%full_default: f32[1, 1, 4] = aten.full.default([1, 1, 4], 3.0, dtype=torch.float32)
%add_9: f32[1, n, 4] = aten.add.Tensor(%slice_1, %full_default)
%unsqueeze_1: bool[1, n, 1] = aten.unsqueeze.default(%keep, -1)
%expand_default_1: bool[1, n, 4] = aten.expand.default(%unsqueeze_1, [-1, -1, 4])
%sub_tensor: f32[1, n, 4] = aten.sub.Tensor(%add_9, %x)
%mul_tensor_1: f32[1, n, 4] = aten.mul.Tensor(%sub_tensor, 0.5)
%sub_tensor_1: f32[1, n, 4] = aten.sub.Tensor(%add_9, %mul_tensor_1)
%mul_21: f32[1, n, 4] = aten.mul.Tensor(%expand_default_1, %sub_tensor_1)
%add_28: f32[1, n, 4] = aten.add.Tensor(%add_9, %mul_21)
return (%add_28)""",
    )
    agree(Blocks(), program)
