"""placed -> placed: the numbered cases of ``passes/optimize/narrow.py``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.flops import evaluate
from tpcompile.passes import Canonicalize, Narrow, Pipeline, pipeline
from tpcompile.passes.cost import polynomial, traffic
from tpcompile.passes.optimize.narrow import Trim
from tpcompile.program import Program

Toy = Callable[..., Program]
Show = Callable[[Program], str]
Agree = Callable[..., None]
aten = torch.ops.aten

PLAIN = pipeline(optimize=False)
PLACED = Pipeline(PLAIN.passes[:4])
NARROWED = Pipeline((*PLACED.passes, Narrow()))
SIZES = {"t0": 64, "t1": 32, "t2": 16}


def changed(show: Show, before: Program, after: Program) -> str:
    """Lines that are new."""
    old = set(show(before).splitlines())
    return "\n".join(line for line in show(after).splitlines() if line not in old)


def work(program: Program) -> float:
    return evaluate(polynomial(program), SIZES)


class Head(nn.Module):
    """The block behind a site; the head reads the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.up, self.down, self.ln = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) == 0)
        y = ops.prune(x, keep)
        logits = self.query(y) @ y.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)
        y = y + logits.softmax(-1) @ y
        return (y + self.down(torch.relu(self.up(self.ln(y)))))[:, 0]


def test_case_1_the_last_block_is_computed_for_the_row_that_is_read(toy: Toy, show: Show, agree: Agree) -> None:
    model = Head()
    placed, program = PLACED(toy(model)), NARROWED(toy(model))
    assert_expected_inline(
        changed(show, placed, program),
        """\
%slice_tensor: f32[1, 1, 4] = aten.slice.Tensor(%prune, 1, 0, 1)
%linear_default: f32[1, 1, 4] = aten.linear.default(%slice_tensor, %p_captured_query_weight, %p_captured_query_bias)
%matmul_default: f32[1, 1, t1] = aten.matmul.default(%linear_default, %transpose)
%add_tensor: f32[1, 1, t1] = aten.add.Tensor(%matmul_default, %unsqueeze)
%softmax_int: f32[1, 1, t1] = aten.softmax.int(%add_tensor, -1)
%matmul_default_1: f32[1, 1, 4] = aten.matmul.default(%softmax_int, %prune)
%add_tensor_1: f32[1, 1, 4] = aten.add.Tensor(%slice_tensor, %matmul_default_1)
%layer_norm_default: f32[1, 1, 4] = aten.layer_norm.default(%add_tensor_1, [4], %p_captured_ln_weight, %p_captured_ln_bias, 1e-05, False)
%linear_default_1: f32[1, 1, 8] = aten.linear.default(%layer_norm_default, %p_captured_up_weight, %p_captured_up_bias)
%relu_default: f32[1, 1, 8] = aten.relu.default(%linear_default_1)
%linear_default_2: f32[1, 1, 4] = aten.linear.default(%relu_default, %p_captured_down_weight, %p_captured_down_bias)
%add_tensor_2: f32[1, 1, 4] = aten.add.Tensor(%add_tensor_1, %linear_default_2)
%squeeze_dim: f32[1, 4] = aten.squeeze.dim(%add_tensor_2, 1)
return (%squeeze_dim)""",
    )
    assert_expected_inline(
        changed(show, program, placed),
        """\
%linear: f32[1, t1, 4] = aten.linear.default(%prune, %p_captured_query_weight, %p_captured_query_bias)
%matmul: f32[1, t1, t1] = aten.matmul.default(%linear, %transpose)
%add_21: f32[1, t1, t1] = aten.add.Tensor(%matmul, %unsqueeze)
%softmax: f32[1, t1, t1] = aten.softmax.int(%add_21, -1)
%matmul_1: f32[1, t1, 4] = aten.matmul.default(%softmax, %prune)
%add_31: f32[1, t1, 4] = aten.add.Tensor(%prune, %matmul_1)
%layer_norm: f32[1, t1, 4] = aten.layer_norm.default(%add_31, [4], %p_captured_ln_weight, %p_captured_ln_bias, 1e-05, False)
%linear_1: f32[1, t1, 8] = aten.linear.default(%layer_norm, %p_captured_up_weight, %p_captured_up_bias)
%relu: f32[1, t1, 8] = aten.relu.default(%linear_1)
%linear_2: f32[1, t1, 4] = aten.linear.default(%relu, %p_captured_down_weight, %p_captured_down_bias)
%add_47: f32[1, t1, 4] = aten.add.Tensor(%add_31, %linear_2)
%select: f32[1, 4] = aten.select.int(%add_47, 1, 0)
return (%select)""",
    )
    agree(model, program)
    agree(model, pipeline()(toy(model)))
    rows, maps = SIZES["t1"] - 1, 2 * 2 * SIZES["t1"] * 4
    linear = 2 * (4 * 4 + 4 * 8 + 8 * 4)
    assert work(placed) - work(program) == rows * (linear + maps)


class Scored(nn.Module):
    """The attention row of the first token decides; the map of all others is needed by those that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        logits = self.query(x) @ self.key(x).transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)
        probs = logits.softmax(-1)
        score = probs[:, 0]
        later = keep & (score >= 0.1)
        y = ops.prune(self.out(probs @ x) + x, later, score)
        return (y * later.unsqueeze(-1)).sum(1)


def test_case_2_a_decision_by_one_row_leaves_the_map_to_the_survivors(toy: Toy, show: Show, agree: Agree) -> None:
    model = Scored()
    placed, program = PLACED(toy(model)), NARROWED(toy(model))
    assert_expected_inline(
        changed(show, placed, program),
        """\
%slice_tensor: f32[1, 1, 4] = aten.slice.Tensor(%x, 1, 0, 1)
%linear_default: f32[1, 1, 4] = aten.linear.default(%slice_tensor, %p_captured_query_weight, %p_captured_query_bias)
%matmul_default: f32[1, 1, t0] = aten.matmul.default(%linear_default, %transpose)
%add_tensor: f32[1, 1, t0] = aten.add.Tensor(%matmul_default, %unsqueeze)
%softmax_int: f32[1, 1, t0] = aten.softmax.int(%add_tensor, -1)
%squeeze_dim: f32[1, t0] = aten.squeeze.dim(%softmax_int, 1)
%ge: bool[1, t0] = aten.ge.Scalar(%squeeze_dim, 0.1)
%prune: f32[1, t1, 4] = tpcompile.prune.default(%add_34, %and_1, %squeeze_dim)""",
    )
    agree(model, program)
    whole, without = pipeline()(toy(model)), Pipeline([p for p in pipeline().passes if p.name != "narrow"])(toy(model))
    agree(model, whole)
    kept = SIZES["t0"] - SIZES["t1"]
    maps, query, row = 2 * 2 * SIZES["t0"] * 4, 2 * 4 * 4, 2 * (4 * 4 + 4 * SIZES["t0"])
    assert work(PLAIN(toy(model))) - work(whole) == kept * (maps + 2 * query) - row
    assert work(without) > work(whole)


class Qkv(nn.Module):
    """Queries and keys decide; values are needed by nobody who is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(1, -1, 3, 4).permute(2, 0, 1, 3).unbind(0)
        probs = (q @ k.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1)
        later = keep & (probs[:, 0] >= 0.1)
        y = ops.prune(probs @ v + x, later)
        return (y * later.unsqueeze(-1)).sum(1)


def test_case_3_one_projection_of_three_parts(toy: Toy, show: Show, agree: Agree) -> None:
    placed, program = PLACED(toy(Qkv())), NARROWED(toy(Qkv()))
    assert_expected_inline(
        changed(show, placed, program),
        """\
%slice_tensor: f32[1, 1, 4] = aten.slice.Tensor(%x, 1, 0, 1)
%slice_tensor_1: f32[4, 4] = aten.slice.Tensor(%p_captured_qkv_weight, 0, 0, 4)
%slice_tensor_2: f32[4] = aten.slice.Tensor(%p_captured_qkv_bias, 0, 0, 4)
%linear_default: f32[1, 1, 4] = aten.linear.default(%slice_tensor, %slice_tensor_1, %slice_tensor_2)
%slice_tensor_3: f32[4, 4] = aten.slice.Tensor(%p_captured_qkv_weight, 0, 4, 8)
%slice_tensor_4: f32[4] = aten.slice.Tensor(%p_captured_qkv_bias, 0, 4, 8)
%linear_default_1: f32[1, t0, 4] = aten.linear.default(%x, %slice_tensor_3, %slice_tensor_4)
%slice_tensor_5: f32[4, 4] = aten.slice.Tensor(%p_captured_qkv_weight, 0, 8, 12)
%slice_tensor_6: f32[4] = aten.slice.Tensor(%p_captured_qkv_bias, 0, 8, 12)
%linear_default_2: f32[1, t0, 4] = aten.linear.default(%x, %slice_tensor_5, %slice_tensor_6)
%linear_default_3: f32[1, t0, 4] = aten.linear.default(%x, %slice_tensor_1, %slice_tensor_2)
%reshape_default_4: f32[1, 1, 4] = aten.reshape.default(%linear_default, [1, 1, 4])
%permute_default_4: f32[1, 1, 4] = aten.permute.default(%reshape_default_4, [0, 1, 2])
%reshape_default_5: f32[1, t0, 4] = aten.reshape.default(%linear_default_3, [1, -1, 4])
%permute_default_5: f32[1, t0, 4] = aten.permute.default(%reshape_default_5, [0, 1, 2])
%reshape_default_6: f32[1, t0, 4] = aten.reshape.default(%linear_default_1, [1, -1, 4])
%permute_default_6: f32[1, t0, 4] = aten.permute.default(%reshape_default_6, [0, 1, 2])
%reshape_default_7: f32[1, t0, 4] = aten.reshape.default(%linear_default_2, [1, -1, 4])
%permute_default_7: f32[1, t0, 4] = aten.permute.default(%reshape_default_7, [0, 1, 2])
%transpose: f32[1, 4, t0] = aten.transpose.int(%permute_default_6, 1, 2)
%matmul_default: f32[1, 1, t0] = aten.matmul.default(%permute_default_4, %transpose)
%matmul: f32[1, t0, t0] = aten.matmul.default(%permute_default_5, %transpose)
%add_tensor: f32[1, 1, t0] = aten.add.Tensor(%matmul_default, %unsqueeze)
%softmax_int: f32[1, 1, t0] = aten.softmax.int(%add_tensor, -1)
%squeeze_dim: f32[1, t0] = aten.squeeze.dim(%softmax_int, 1)
%ge: bool[1, t0] = aten.ge.Scalar(%squeeze_dim, 0.1)
%matmul_1: f32[1, t0, 4] = aten.matmul.default(%softmax, %permute_default_7)""",
    )
    agree(model := Qkv(), NARROWED(toy(model)))
    agree(model, pipeline()(toy(model)))


class Overlap(nn.Module):
    """Nearly all of the map decides, and all of it is read: to compute both would cost more than it saves."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        probs = (x @ x.transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1)
        later = keep & (probs[:, 0:15].sum(1) >= 0.1)
        return (ops.prune(probs @ x, later) * later.unsqueeze(-1)).sum(1)


class Ends(nn.Module):
    """Slices from the back and to the end, which no window describes, and a row that is read twice."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = torch.relu(x)
        z = ops.prune(y + y, keep)
        return (z * keep.unsqueeze(-1)).sum(1) + y[:, -1] * y[:, 1:].sum(1) + (y[:, 0] + y[:, :1].sum(1))


@pytest.mark.parametrize("model", [Overlap(), Ends()], ids=lambda model: type(model).__name__)
def test_what_would_cost_more_or_is_no_window_stays(toy: Toy, agree: Agree, model: nn.Module) -> None:
    given: dict[str, Any] = {"x": torch.randn(1, 16, 4), "keep": torch.ones(1, 16, dtype=torch.bool)}
    program = NARROWED(toy(model, dynamic=False, **given))
    assert "narrow: 0 results in windows" in program.report
    agree(model, pipeline()(toy(model, dynamic=False, **given)), lengths=(16, 16))


@pytest.mark.parametrize("made", [Head, Scored])
def test_each_sample_by_its_own_rows(made: type[nn.Module]) -> None:
    model, generator = made().eval(), torch.Generator().manual_seed(3)
    x, keep = torch.randn(3, 7, 4, generator=generator), torch.rand(3, 7, generator=generator) > 0.4
    keep[:, 0] = True
    captured = capture(model, {"x": x, "keep": keep}, {"x": {0: "b", 1: "n"}, "keep": {0: "b", 1: "n"}}, {"n": (2, 64)})
    program = pipeline("ragged")(captured)
    torch.testing.assert_close(program(x=x, keep=keep)["output"], model(x, keep), rtol=0, atol=1e-5)


class Dense(nn.Module):
    """A dense model with fused attention; its head reads the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.up(y + x)[:, 0]


def test_the_dense_baseline_is_trimmed_alike(toy: Toy, show: Show) -> None:
    model = Dense()
    captured = Canonicalize("whole")(toy(model, x=torch.randn(1, 6, 4)))
    program = Trim()(captured)
    text = (
        show(program)
        .replace("scaled_dot_product_attention_default", "sdpa")
        .replace("scaled_dot_product_attention.default", "sdpa")
    )
    assert_expected_inline(
        text,
        """\
program @ captured
input %x: f32[1, n, 4]
%slice_tensor: f32[1, 1, 4] = aten.slice.Tensor(%x, 1, 0, 1)
%slice_tensor_1: f32[4, 4] = aten.slice.Tensor(%p_captured_qkv_weight, 0, 0, 4)
%slice_tensor_2: f32[4] = aten.slice.Tensor(%p_captured_qkv_bias, 0, 0, 4)
%linear_default: f32[1, 1, 4] = aten.linear.default(%slice_tensor, %slice_tensor_1, %slice_tensor_2)
%slice_tensor_3: f32[4, 4] = aten.slice.Tensor(%p_captured_qkv_weight, 0, 8, 12)
%slice_tensor_4: f32[4] = aten.slice.Tensor(%p_captured_qkv_bias, 0, 8, 12)
%linear_default_1: f32[1, n, 4] = aten.linear.default(%x, %slice_tensor_3, %slice_tensor_4)
%slice_tensor_5: f32[4, 4] = aten.slice.Tensor(%p_captured_qkv_weight, 0, 4, 8)
%slice_tensor_6: f32[4] = aten.slice.Tensor(%p_captured_qkv_bias, 0, 4, 8)
%linear_default_2: f32[1, n, 4] = aten.linear.default(%x, %slice_tensor_5, %slice_tensor_6)
%reshape_default_3: f32[1, 1, 2, 2] = aten.reshape.default(%linear_default, [1, 1, 2, 2])
%permute_default_3: f32[1, 2, 1, 2] = aten.permute.default(%reshape_default_3, [0, 2, 1, 3])
%reshape_default_4: f32[1, n, 2, 2] = aten.reshape.default(%linear_default_2, [1, -1, 2, 2])
%permute_default_4: f32[1, 2, n, 2] = aten.permute.default(%reshape_default_4, [0, 2, 1, 3])
%reshape_default_5: f32[1, n, 2, 2] = aten.reshape.default(%linear_default_1, [1, -1, 2, 2])
%permute_default_5: f32[1, 2, n, 2] = aten.permute.default(%reshape_default_5, [0, 2, 1, 3])
%sdpa: f32[1, 2, 1, 2] = aten.sdpa(%permute_default_3, %permute_default_4, %permute_default_5)
%transpose_int: f32[1, 1, 2, 2] = aten.transpose.int(%sdpa, 1, 2)
%reshape_default_6: f32[1, 1, 4] = aten.reshape.default(%transpose_int, [1, 1, 4])
%add_tensor: f32[1, 1, 4] = aten.add.Tensor(%reshape_default_6, %slice_tensor)
%linear_default_3: f32[1, 1, 4] = aten.linear.default(%add_tensor, %p_captured_up_weight, %p_captured_up_bias)
%squeeze_dim: f32[1, 4] = aten.squeeze.dim(%linear_default_3, 1)
return (%squeeze_dim)""",
    )
    for length in (2, 9):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(program(x=x)["output"], model(x), rtol=0, atol=1e-6)
    assert evaluate(traffic(program), SIZES) < evaluate(traffic(captured), SIZES)
