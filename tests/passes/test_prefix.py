"""Joins of a prefix with rows that were computed without it."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile.passes import Canonicalize
from tpcompile.program import Program

Toy = Callable[..., Program]


class Patches(nn.Module):
    """Ones for the class token in front of a decision on the rest."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[:, :1, 0]), (x[:, 1:].sum(-1) > 0).float()], 1) + keep * 0


def test_a_join_becomes_a_selection_by_position(toy: Toy, show: Callable[[Program], str], agree: Callable[..., None]) -> None:
    program = Canonicalize()(toy(Patches()))
    assert_expected_inline(
        show(program),
        """\
program @ captured
input %x: f32[1, n, 4]
input %keep: bool[1, n]
%slice_1: f32[1, 1, 4] = aten.slice.Tensor(%x, 1, 0, 1)
%select: f32[1, 1] = aten.select.int(%slice_1, 2, 0)
%ones_like: f32[1, 1] = aten.ones_like.default(%select, pin_memory=False)
%sum_dim_int_list: f32[1, n] = aten.sum.dim_IntList(%x, [-1])
%gt_scalar: bool[1, n] = aten.gt.Scalar(%sum_dim_int_list, 0)
%_to_copy_default: f32[1, n] = aten._to_copy.default(%gt_scalar, dtype=torch.float32)
%sym_size_int: SymInt = aten.sym_size.int(%_to_copy_default, 1)
%arange_default: i64[n] = aten.arange.default(%sym_size_int)
%lt_scalar: bool[n] = aten.lt.Scalar(%arange_default, 1)
%where_self: f32[1, n] = aten.where.self(%lt_scalar, %ones_like, %_to_copy_default)
%mul_12: i64[1, n] = aten.mul.Tensor(%keep, 0)
%add_15: f32[1, n] = aten.add.Tensor(%where_self, %mul_12)
return (%add_15)""",
    )
    agree(Patches(), program)


class Joins(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.cls = kind, nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        match self.kind:
            case "row":
                joined = torch.cat([x[:, :1] * 2, torch.tanh(x[:, 1:])], 1)
            case "two ones":
                joined = torch.cat([torch.ones_like(x[:, :2]), torch.tanh(x[:, 2:])], 1)
            case "two rows":
                joined = torch.cat([x[:, :2] * 2, torch.tanh(x[:, 2:])], 1)
            case "another start":
                joined = torch.cat([x[:, :1], x[:, 2:]], 1)
            case "over rows":
                joined = torch.cat([x[:, :1], x[:, 1:].cumsum(1)], 1)
            case "dtype":
                joined = torch.cat([keep[:, :1, None].expand(-1, -1, 4), torch.tanh(x[:, 1:])], 1)
            case _:
                joined = torch.cat([self.cls, torch.tanh(x)], 1)
        return joined + keep.sum() * 0


@pytest.mark.parametrize(
    ("kind", "selects"),
    [
        ("row", True), ("two ones", True), ("two rows", False), ("another start", False), ("over rows", False), ("dtype", False),
        ("in front", False),
    ],
)  # fmt: skip
def test_other_joins_stay(toy: Toy, agree: Callable[..., None], kind: str, selects: bool) -> None:
    torch.manual_seed(0)
    model = Joins(kind)
    program = Canonicalize()(toy(model))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("aten.cat.default" not in targets) == selects
    agree(model, program, lengths=(3, 5, 9))


class Rotary(nn.Module):
    """Tokens behind a prefix are turned by a table that has no rows for it, as EVA has it; the prefix is left as it is."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.register_buffer("angles", torch.randn(9 - prefix, 4))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        angles = self.get_buffer("angles")
        turned = x[:, self.prefix :] * angles.cos() + x[:, self.prefix :].flip(-1) * angles.sin()
        return torch.cat([x[:, : self.prefix], turned], 1) + keep.unsqueeze(-1) * 0


@pytest.mark.parametrize("prefix", [1, 3])
def test_a_table_without_the_prefix_gets_rows_for_it(toy: Toy, agree: Callable[..., None], prefix: int) -> None:
    model = Rotary(prefix)
    program = Canonicalize()(toy(model, length=9, dynamic=False))
    joins = [node for node in program.graph.nodes if str(node.target) == "aten.cat.default"]
    assert all(str(node.args[0][0].target) == "aten.full.default" for node in joins), "only tables are joined"
    agree(model, program, lengths=(9, 9))
