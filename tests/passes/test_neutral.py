"""compact -> compact: an op one of whose operands changes nothing is its other operand."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.passes import DEFAULT, Lower
from tpcompile.program import Program

aten = torch.ops.aten


def calls(program: Program, *targets: torch._ops.OpOverload) -> int:
    return sum(len(program.graph.find_nodes(op="call_function", target=target)) for target in targets)


class Early(nn.Module):
    """Masks in front of the first site hide nothing: a bool one, an additive one, one of zeros and ones."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        alive = torch.ones_like(x[:, :, 0], dtype=torch.bool)
        p = (x @ x.transpose(1, 2) + torch.where(alive, 0.0, -1e4).unsqueeze(1)).softmax(-1)
        x = (p @ x).masked_fill(~alive.unsqueeze(-1), 0.0) * alive.to(x.dtype).unsqueeze(-1)
        x = ops.prune(x, keep & alive)
        return (x * keep.unsqueeze(-1)).sum(1)


def test_a_mask_before_the_first_site_goes(
    toy: Callable[..., Program], show: Callable[[Program], str], agree: Callable[..., None]
) -> None:
    program = DEFAULT(toy(Early()))
    assert_expected_inline(
        "\n".join(show(program).splitlines()[3:]),
        """\
input %keep: bool[1, t0]
%sym_size_int: SymInt = aten.sym_size.int(%x, 1)
%transpose: f32[1, 4, t0] = aten.transpose.int(%x, 1, 2)
%arange_default: i64[n] = aten.arange.default(%sym_size_int)
%unsqueeze_default: i64[1, n] = aten.unsqueeze.default(%arange_default, 0)
%lt_scalar: bool[1, n] = aten.lt.Scalar(%unsqueeze_default, 1)
%compact_default: tuple = tpcompile.compact.default(%x, %keep, %lt_scalar, None)
%getitem: f32[1, t1, 4] = getitem(%compact_default, 0)
%getitem_2: i64[1, u0] = getitem(%compact_default, 2)
%select_int: i64[u0] = aten.select.int(%getitem_2, 0, 0)
%matmul: f32[1, t1, t0] = aten.matmul.default(%getitem, %transpose)
%softmax: f32[1, t1, t0] = aten.softmax.int(%matmul, -1)
%matmul_1: f32[1, t1, 4] = aten.matmul.default(%softmax, %x)
%index_select_default_1: bool[1, u0] = aten.index_select.default(%keep, 1, %select_int)
%unsqueeze_3: bool[1, t1, 1] = aten.unsqueeze.default(%index_select_default_1, -1)
%mul_45: f32[1, t1, 4] = aten.mul.Tensor(%matmul_1, %unsqueeze_3)
%sum_1: f32[1, 4] = aten.sum.dim_IntList(%mul_45, [1])
return (%sum_1)""",
    )
    agree(Early(), program)


class Kept(nn.Module):
    """A float of the keep mask, made before the site, which a decision reads too; and what position 0 holds of it."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        first = (torch.arange(x.shape[1]) < 1).unsqueeze(0)
        keep = keep | first
        weight = keep.to(x.dtype)
        x = ops.prune(x, keep)
        x = x * weight.unsqueeze(-1) + (x[:, 0] * weight[:, :1]).unsqueeze(1)
        later = keep & ((x.sum(-1) * weight > 0) | first)
        x = ops.prune(x, later)
        return (x * weight.unsqueeze(-1) * later.unsqueeze(-1)).sum(1)


def test_what_is_fetched_of_a_keep_mask_goes_where_nothing_else_is_stored(
    toy: Callable[..., Program], agree: Callable[..., None]
) -> None:
    compact = DEFAULT(toy(Kept()))
    exact = Lower(exact=True)(compact)
    assert calls(compact, aten.mul.Tensor) == 4
    assert calls(exact, aten.mul.Tensor) == 0
    agree(Kept(), exact)


class Plain(nn.Module):
    """What looks neutral and is not: a factor of its own, whole numbers, a shape that grows, a mask of some tokens only."""

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        zero = torch.zeros_like(x)
        x = ops.prune(x, keep)
        whole = (torch.arange(4) & torch.ones(4, dtype=torch.int64)).to(x.dtype)
        weight = keep.unsqueeze(-1)
        return {
            "alpha": (torch.add(zero, x, alpha=2.0) * weight).sum(1),
            "whole": (x * weight).sum(1) * whole,
            "grown": ((x * weight).sum(1, keepdim=True) + torch.zeros(1, 3, 4)).sum(1),
        }


@pytest.mark.parametrize("exact", [False, True])
def test_what_changes_something_stays(toy: Callable[..., Program], agree: Callable[..., None], exact: bool) -> None:
    program = Lower(exact=exact)(DEFAULT(toy(Plain())))
    assert calls(program, aten.add.Tensor, aten.add.Scalar) >= 2
    agree(Plain(), program)


class Told(nn.Module):
    """Without its masks, what the second site reports is an expression that was there before: one of the two is left."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) < 1).unsqueeze(0)
        x = ops.prune(x, keep)
        extra = torch.where((keep & (x.sum(-1) > 0)).unsqueeze(-1), x, 0.0).sum(1)
        score = (x * keep.unsqueeze(-1).to(x.dtype)).sum(-1)
        later = keep & (score > 0)
        x = ops.prune(x, later, score)
        return torch.where(later.unsqueeze(-1), x, 0.0).sum(1) + extra


def test_what_a_site_names_is_what_is_left(toy: Callable[..., Program], agree: Callable[..., None]) -> None:
    program = Lower(exact=True)(DEFAULT(toy(Told())))
    names = {node.name for node in program.graph.nodes}
    assert all(set(site.taps.values()) <= names for site in program.sites)
    assert set(program.trace(x=torch.ones(1, 5, 4), keep=torch.ones(1, 5, dtype=torch.bool)).taps) >= {
        "site1.keep",
        "site1.score",
    }
    agree(Told(), program)


class Wide(nn.Module):
    """A bias of as many rows as channels beside tokens: whether it is as long as they are is nobody's to ask."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.front, self.bias = front, nn.Parameter(torch.ones(1, 4))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = x + (torch.zeros_like(x) + self.bias) if self.front else x
        keep = keep & (x.sum(-1) > -9) | (torch.arange(x.shape[1]) < 1).unsqueeze(0)
        x = ops.prune(x, keep)
        x = x if self.front else x + keep.unsqueeze(-1).to(x.dtype) * self.bias
        return (x * keep.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("length", [4, 6])
def test_sizes_are_not_fixed_by_looking_at_them(
    toy: Callable[..., Program], agree: Callable[..., None], front: bool, length: int
) -> None:
    model = Wide(front)
    program = Lower(exact=True)(DEFAULT(toy(model, length=length)))
    assert [spec.shape for spec in program.inputs] == [(1, "n", 4), (1, "n")]
    agree(model, program)
