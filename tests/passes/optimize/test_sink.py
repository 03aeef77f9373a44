"""placed -> placed: the numbered cases of ``passes/optimize/sink.py``, seen in the gathered program."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.passes import Cleanup, Compact, Pipeline, Sink, pipeline
from tpcompile.program import Program

Toy = Callable[..., Program]
Show = Callable[[Program], str]
Agree = Callable[..., None]
Work = Callable[[Program], float]

PLAIN = pipeline(optimize=False)


def sunk(program: Program, batch: str = "one", **options: Any) -> Program:
    """The gathered program of a captured one, sunk."""
    steps = pipeline(batch, optimize=False).passes
    return Pipeline((*steps[:4], Sink(**options), Compact(), Cleanup()))(program)


def body(show: Show, program: Program) -> str:
    """The text from the decision on."""
    return "%alive" + show(program).partition("%and_1")[2]


def test_case_1_rows_are_fetched_before_row_wise_work(toy: Toy, show: Show, agree: Agree, work: Work, block: nn.Module) -> None:
    plain, program = PLAIN(toy(block)), sunk(toy(block), balance=0.1)
    assert_expected_inline(
        body(show, plain),
        """\
%alive: bool[1, t0] = aten.__and__.Tensor(%keep, %ge)
%matmul_1: f32[1, t0, 4] = aten.matmul.default(%mul_21, %x)
%linear_1: f32[1, t0, 4] = aten.linear.default(%matmul_1, %p_captured_out_weight, %p_captured_out_bias)
%add_37: f32[1, t0, 4] = aten.add.Tensor(%linear_1, %x)
%layer_norm: f32[1, t0, 4] = aten.layer_norm.default(%add_37, [4], %p_captured_norm_weight, %p_captured_norm_bias, 1e-05, False)
%arange_default: i64[n] = aten.arange.default(%sym_size_int)
%unsqueeze_default: i64[1, n] = aten.unsqueeze.default(%arange_default, 0)
%lt_scalar: bool[1, n] = aten.lt.Scalar(%unsqueeze_default, 1)
%compact_default: tuple = tpcompile.compact.default(%layer_norm, %and_1, %lt_scalar, None)
%getitem: f32[1, t1, 4] = getitem(%compact_default, 0)
%getitem_1: bool[1, u0] = getitem(%compact_default, 1)
%getitem_2: i64[1, u0] = getitem(%compact_default, 2)
%unsqueeze_2: bool[1, t1, 1] = aten.unsqueeze.default(%getitem_1, -1)
%mul_45: f32[1, t1, 4] = aten.mul.Tensor(%getitem, %unsqueeze_2)
%sum_2: f32[1, 4] = aten.sum.dim_IntList(%mul_45, [1])
return (%sum_2)""",
    )
    assert_expected_inline(
        body(show, program),
        """\
%alive: bool[1, t0] = aten.__and__.Tensor(%keep, %ge)
%arange_default: i64[n] = aten.arange.default(%sym_size_int)
%unsqueeze_default: i64[1, n] = aten.unsqueeze.default(%arange_default, 0)
%lt_scalar: bool[1, n] = aten.lt.Scalar(%unsqueeze_default, 1)
%compact_default: tuple = tpcompile.compact.default(%x, %and_1, %lt_scalar, None)
%getitem: f32[1, t1, 4] = getitem(%compact_default, 0)
%getitem_1: bool[1, u0] = getitem(%compact_default, 1)
%getitem_2: i64[1, u0] = getitem(%compact_default, 2)
%select_int: i64[u0] = aten.select.int(%getitem_2, 0, 0)
%index_select_default: f32[1, u0, n] = aten.index_select.default(%mul_21, 1, %select_int)
%matmul_1: f32[1, t1, 4] = aten.matmul.default(%index_select_default, %x)
%linear_1: f32[1, t1, 4] = aten.linear.default(%matmul_1, %p_captured_out_weight, %p_captured_out_bias)
%add_37: f32[1, t1, 4] = aten.add.Tensor(%linear_1, %getitem)
%layer_norm: f32[1, t1, 4] = aten.layer_norm.default(%add_37, [4], %p_captured_norm_weight, %p_captured_norm_bias, 1e-05, False)
%unsqueeze_2: bool[1, t1, 1] = aten.unsqueeze.default(%getitem_1, -1)
%mul_45: f32[1, t1, 4] = aten.mul.Tensor(%layer_norm, %unsqueeze_2)
%sum_2: f32[1, 4] = aten.sum.dim_IntList(%mul_45, [1])
return (%sum_2)""",
    )
    agree(block, program)
    values, output = 2 * 16 * 4, 2 * 4 * 4
    assert work(plain) - work(program) == (16 - 8) * (values + output)


def test_case_2_fetching_must_pay(toy: Toy, show: Show, agree: Agree, block: nn.Module) -> None:
    program = sunk(toy(block))
    _, product = program.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    assert program.placements[product.name].dims == {1: 0}
    assert program.report[-1] == "sink: 3 results on a newer set, 1 left where fetching their rows costs more than it saves"
    agree(block, program)


class Watched(nn.Module):
    """What a site would compute for survivors only, a later decision reads whole."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        rows = self.out(x)
        alive = keep & (rows.sum(-1) > rows.sum(-1).amax(1, keepdim=True) - 1.0)
        return (ops.prune(rows, alive) * alive.unsqueeze(-1)).sum(1)


class Read(nn.Module):
    """A fold over the full set reads the rows too."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        rows = self.out(x)
        return (ops.prune(rows, keep) * keep.unsqueeze(-1)).sum(1) + rows.amax(1)


@pytest.mark.parametrize("model", [Watched(), Read()], ids=["decision", "fold"])
def test_case_3_what_others_read_stays(toy: Toy, agree: Agree, model: nn.Module) -> None:
    program = sunk(toy(model))
    (linear,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert program.placements[linear.name].dims == {1: 0}
    agree(model, program)


class Asked(nn.Module):
    """Decided beforehand, so that a map of attention could be computed for the queries of the survivors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        rows = (self.query(x) @ x.transpose(1, 2)).softmax(-1) @ x
        return (ops.prune(self.out(rows), keep) * keep.unsqueeze(-1)).sum(1)


def sets(program: Program) -> dict[str, list[int]]:
    """The sets that the result of each product, and of each linear layer, runs over."""
    nodes = [n for n in program.graph.nodes if n.target in (torch.ops.aten.matmul.default, torch.ops.aten.linear.default)]
    return {n.name: sorted(program.placements[n.name].dims.values()) for n in nodes}


def test_case_4_a_map_is_fetched_by_rows_and_columns_or_not_at_all(toy: Toy, agree: Agree) -> None:
    model = Asked()
    free, square = (sunk(toy(model), balance=0.1, square=one) for one in (False, True))
    assert sets(free) == {"linear": [1], "matmul": [0, 1], "matmul_1": [1], "linear_1": [1]}
    assert sets(square) == {"linear": [0], "matmul": [0, 0], "matmul_1": [0], "linear_1": [1]}
    agree(model, square)


def test_case_4_what_runs_over_one_set_still_sinks(toy: Toy, agree: Agree, block: nn.Module) -> None:
    program = sunk(toy(block), balance=0.1, square=True)
    assert list(sets(program).values())[-2:] == [[0], [1]], "the product with the values stays, the output projection does not"
    agree(block, program)


class Chain(nn.Module):
    """Two sites, decided before anything is computed: work moves behind the site it stands before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> Tensor:
        y = ops.prune(self.first(x), keep)
        later = keep & more
        return (ops.prune(self.second(y), later) * later.unsqueeze(-1)).sum(1)


def test_rows_sink_through_several_sites(toy: Toy, agree: Agree) -> None:
    given = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool), "more": torch.ones(1, 6, dtype=torch.bool)}
    model = Chain().eval()
    program = sunk(toy(model, **given))
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [program.placements[n.name].dims for n in linears] == [{1: 1}, {1: 2}]
    agree(model, program, lambda n: {"more": torch.arange(n).unsqueeze(0) % 3 != 1})


def test_each_sample_sinks_by_its_own_positions(block: nn.Module) -> None:
    given = {"x": torch.randn(3, 9, 4), "keep": torch.rand(3, 9) > 0.3}
    captured = capture(block, given, {name: {0: "batch", 1: "n"} for name in given}, {"n": (2, 64)})
    program = sunk(captured, "ragged", keep=0.5)
    for samples, length in ((1, 5), (2, 9), (4, 12)):
        inputs = {"x": torch.randn(samples, length, 4), "keep": torch.rand(samples, length) > 0.3}
        torch.testing.assert_close(program(**inputs)["output"], block(**inputs), rtol=0, atol=1e-5)
