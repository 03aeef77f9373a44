"""compact -> compact: how many rows the sites store; what the program computes stays."""

import re
from collections.abc import Callable

import hypothesis.strategies as st
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.errors import EmitError, UsageError
from tpcompile.onnx.emit import emit
from tpcompile.passes import DEFAULT, PASSES, Lower, Pipeline, pipeline
from tpcompile.program import Program
from tpcompile.rows import MIN_COUNT, Rows

GATE = settings(max_examples=25, derandomize=True, deadline=None, database=None)
LENGTH, WIDTH = 10, 4


class Model(nn.Module):
    """Two sites by a score each, attention under a mask, a residual stream over both, an output at full length.

    With ``counts`` it is the masked form of a constant count: each keep mask is cut down, by hand, to what finds room.
    """

    counts: tuple[int, int] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, keep: Tensor, score: Tensor) -> dict[str, Tensor]:
        skip = x
        first = best(keep, score, self.counts[0]) if self.counts else keep
        x = ops.prune(x, first, score)
        p = (x @ x.transpose(1, 2)).masked_fill(~first.unsqueeze(1), -1e4).softmax(-1) * first.unsqueeze(2)
        x = self.inner(p @ x)
        base, later = x, x.sum(-1)
        second = first & (later > 0)
        second = best(second, later, self.counts[1]) if self.counts else second
        x = ops.prune(x, second, later)
        p = (x @ x.transpose(1, 2)).masked_fill(~second.unsqueeze(1), -1e4).softmax(-1) * second.unsqueeze(2)
        x = x + p @ x + skip
        weight = second.unsqueeze(-1).to(x.dtype)
        full = ops.restore(ops.restore(x, second, base), first, skip)
        return {
            "mean": (x * weight).sum(1) / weight.sum(1).clamp(min=1.0),
            "first": torch.tanh(x[:, 0]),
            "tokens": self.head(full),
        }


def best(keep: Tensor, score: Tensor, count: int) -> Tensor:
    """``keep`` without what finds no room: position 0 takes a slot, kept or not, then the highest scores do."""
    found = torch.zeros_like(keep)
    for b, row in enumerate(keep):
        order = sorted(torch.nonzero(row).flatten().tolist(), key=lambda i: (i != 0, -score[b, i].item(), i))
        found[b, order[: count - (not row[0])]] = True
    return found


def inputs(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep, score = torch.rand(batch, length, generator=generator) > 0.3, torch.randn(batch, length, generator=generator)
    return {"x": torch.randn(batch, length, WIDTH, generator=generator), "keep": keep, "score": score}


@pytest.fixture(scope="module", params=["one", "ragged", "fixed"])
def lowered(request: pytest.FixtureRequest) -> tuple[Model, Program, str]:
    """The model, its compact program, and the batch policy: the length dynamic, batch and length, or neither."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model().eval()
    example = inputs(1 if request.param == "one" else 3, LENGTH)
    dims = {"one": {1: "n"}, "ragged": {0: "batch", 1: "n"}, "fixed": {}}[request.param]
    captured = capture(model, example, dict.fromkeys(example, dims), {"n": (2, 64)})
    return model, pipeline("one" if request.param == "one" else "ragged")(captured), request.param


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), name


@pytest.mark.parametrize("buckets", ["2", "3", "4+7", "64"])
def test_case_1_any_ladder_is_exact(lowered: tuple[Model, Program, str], buckets: str) -> None:
    model, compact, policy = lowered
    program = Lower(buckets=buckets)(compact)
    ladder = tuple(map(int, buckets.split("+")))
    assert program.rows == (Rows(ladder), Rows(ladder))
    for seed, length in enumerate((LENGTH,) * 4 if policy == "fixed" else (2, 5, 10, 23)):
        given_inputs = inputs(3 if policy != "one" else 1, length, seed)
        with torch.no_grad():
            want = model(**given_inputs)
        trace, exact = program.trace(**given_inputs), compact.trace(**given_inputs)
        close(trace.outputs, want)
        for site, (index, least) in enumerate(zip(trace.index, exact.index, strict=True)):
            assert index is not None
            assert least is not None
            entering = trace.keep[site].shape[1]
            assert index.shape[1] == min(entering, Rows(ladder).rung(least.shape[1]))


@pytest.mark.parametrize("counts", ["10+10", "6+4", "3+2", "2+2"])
def test_case_2_a_constant_count_is_the_model_under_the_masks_that_fit(lowered: tuple[Model, Program, str], counts: str) -> None:
    model, compact, policy = lowered
    program = Lower(counts=counts)(compact)
    first, second = map(int, counts.split("+"))
    assert program.rows == (Rows(limit=first), Rows(limit=second))
    limited = Model()
    limited.load_state_dict(model.state_dict())
    limited.counts, overflow = (first, second), 0
    for seed in range(6):
        drawn = inputs(3 if policy != "one" else 1, LENGTH, seed)
        with torch.no_grad():
            want = limited(**drawn)
        trace = program.trace(**drawn)
        close(trace.outputs, want)
        assert [None if index is None else index.shape[1] for index in trace.index] == [first, min(first, second)]
        overflow += int((trace.keep[0].sum(1) > first).sum())
    assert (overflow > 0) == (first < 8)


def test_case_2_fixed_tokens_make_every_size_a_number(lowered: tuple[Model, Program, str]) -> None:
    program = Lower(counts="6+4")(lowered[1])
    symbols = [
        size
        for node in program.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor)
        for size in value.shape
        if not isinstance(size, int)
    ]
    assert (not symbols) == (lowered[2] == "fixed")


@given(keep=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), ladder=st.sampled_from(["2", "3+5", "8"]))
@GATE
def test_a_ladder_is_exact_for_any_mask(keep: list[bool], ladder: str) -> None:
    model, program = _one(ladder)
    drawn = {**inputs(1, LENGTH), "keep": torch.tensor([keep])}
    with torch.no_grad():
        close(program(**drawn), model(**drawn))


def _one(ladder: str, made: dict[str, tuple[Model, Program]] = {}) -> tuple[Model, Program]:  # noqa: B006  a cache over examples
    if ladder not in made:
        model = Model().eval()
        example = inputs(1, LENGTH)
        made[ladder] = model, Lower(buckets=ladder)(DEFAULT(capture(model, example, {name: {1: "n"} for name in example}, {})))
    return made[ladder]


class Small(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        return (x * keep.unsqueeze(-1)).sum(1)


def test_only_the_site_changes(toy: Callable[..., Program], show: Callable[[Program], str]) -> None:
    compact = DEFAULT(toy(Small()))
    before, after = (sizes(show(program)).splitlines() for program in (compact, Lower(buckets="16")(compact)))
    assert_expected_inline(
        "\n".join(line for line in after if line not in before),
        """\
%compact_default: tuple = tpcompile.compact.default(%x, %keep, %lt_scalar, None, [16], 0)""",
    )
    assert sizes(show(Lower()(compact))) == sizes(show(compact))


class Prefix(nn.Module):
    """Position 0 never falls, and attention hides the others in three ways."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) < 1).unsqueeze(0)
        x = ops.prune(x, keep)
        hidden = torch.zeros_like(x[:, :, 0]).masked_fill(~keep, -1e4).unsqueeze(1)
        p = (x @ x.transpose(1, 2) + hidden).softmax(-1) * keep.unsqueeze(2)
        later = keep & (x.sum(-1) > 0) | (torch.arange(x.shape[1]) < 1).unsqueeze(0) & keep
        x = ops.prune(p @ x + x, later)
        return (x * later.unsqueeze(-1)).sum(1) / later.sum(1, keepdim=True)


def test_case_4_what_masks_nothing_goes(
    toy: Callable[..., Program], show: Callable[[Program], str], agree: Callable[..., None]
) -> None:
    program = Lower(exact=True)(DEFAULT(toy(Prefix())))
    assert program.rows == (Rows(exact=True), Rows(exact=True))
    assert_expected_inline(
        sizes("\n".join(show(program).splitlines()[5:])),
        """\
%sym_size_int: SymInt = aten.sym_size.int(%x, 1)
%arange: i64[t0] = aten.arange.default(%sym_size_int, device=cpu, pin_memory=False)
%lt: bool[t0] = aten.lt.Scalar(%arange, 1)
%unsqueeze: bool[1, t0] = aten.unsqueeze.default(%lt, 0)
%or_1: bool[1, t0] = aten.__or__.Tensor(%keep, %unsqueeze)
%compact_default: tuple = tpcompile.compact.default(%x, %or_1, %or_1, None, None, 0, True)
%getitem: f32[1, t1, 4] = getitem(%compact_default, 0)
%getitem_2: i64[1, k] = getitem(%compact_default, 2)
%select_int: i64[k] = aten.select.int(%getitem_2, 0, 0)
%transpose: f32[1, 4, t1] = aten.transpose.int(%getitem, 1, 2)
%sum_1: f32[1, t1] = aten.sum.dim_IntList(%getitem, [-1])
%gt: bool[1, t1] = aten.gt.Scalar(%sum_1, 0)
%index_select_default: bool[1, k] = aten.index_select.default(%unsqueeze, 1, %select_int)
%or_2: bool[1, t1] = aten.__or__.Tensor(%gt, %index_select_default)
%compact_default_1: tuple = tpcompile.compact.default(%getitem, %or_2, %or_2, None, None, 0, True)
%getitem_3: f32[1, t2, 4] = getitem(%compact_default_1, 0)
%getitem_5: i64[1, k] = getitem(%compact_default_1, 2)
%matmul: f32[1, t2, t1] = aten.matmul.default(%getitem_3, %transpose)
%softmax: f32[1, t2, t1] = aten.softmax.int(%matmul, -1)
%matmul_default: f32[1, t2, 4] = aten.matmul.default(%softmax, %getitem)
%add_61: f32[1, t2, 4] = aten.add.Tensor(%matmul_default, %getitem_3)
%sum_2: f32[1, 4] = aten.sum.dim_IntList(%add_61, [1])
%sum_3: i64[1, 1] = aten.sum.dim_IntList(%or_2, [1], True)
%div: f32[1, 4] = aten.div.Tensor(%sum_2, %sum_3)
return (%div)""",
    )
    agree(Prefix(), program)


def test_case_4_stores_a_single_row(toy: Callable[..., Program]) -> None:
    program = Lower(exact=True)(DEFAULT(toy(Prefix())))
    given = {
        "x": torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(0)),
        "keep": torch.zeros(1, 7, dtype=torch.bool),
    }
    trace = program.trace(**given)
    assert [index.shape for index in trace.index if index is not None] == [(1, 1), (1, 1)]
    with torch.no_grad():
        close(trace.outputs, {"output": Prefix()(**given)})


class Remembered(nn.Module):
    """A memory holds two rows at least: it keeps its masks."""

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        keep = keep | (torch.arange(x.shape[1]) < 1).unsqueeze(0)
        return ops.memory(ops.prune(x, keep), keep)


def test_case_4_leaves_a_memory(toy: Callable[..., Program]) -> None:
    program = Lower(exact=True)(DEFAULT(toy(Remembered())))
    assert program.rows == (Rows(),)
    found = program(x=torch.randn(1, 7, WIDTH), keep=torch.zeros(1, 7, dtype=torch.bool))
    assert sorted(value.shape[1] for value in found.values()) == [MIN_COUNT, MIN_COUNT]


def test_case_4_is_no_stage(toy: Callable[..., Program]) -> None:
    with pytest.raises(EmitError) as caught:
        emit(Lower(exact=True)(DEFAULT(toy(Prefix()))), hosted=True)
    assert "a host stores two rows at least" in str(caught.value)


def test_case_4_of_one_row_in_a_runtime(toy: Callable[..., Program]) -> None:
    given = {
        "x": torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(0)),
        "keep": torch.zeros(1, 7, dtype=torch.bool),
    }
    model = emit(Lower(exact=True)(DEFAULT(toy(Prefix())))).model
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        close({"output": torch.from_numpy(found)}, {"output": Prefix()(**given)})


def test_case_4_leaves_what_may_fall(lowered: tuple[Model, Program, str]) -> None:
    """Position 0 is stored though dropped, or samples differ in count: masks hide what they hid."""
    _, compact, _ = lowered
    assert Lower(exact=True).run(compact) is compact


def test_case_2_all_that_reads_the_mask_reads_what_fits(toy: Callable[..., Program], show: Callable[[Program], str]) -> None:
    """The weights of the mean stand before the site in the program: they read what fits all the same, and so does the output."""
    after = show(Lower(counts="5")(DEFAULT(toy(Early()))))
    assert_expected_inline(
        sizes("\n".join(after.splitlines()[-12:])),
        """\
%fit_default: bool[1, n] = tpcompile.fit.default(%keep, %lt_scalar, %sum_2, 5)
%sum_1: i64[1, 1] = aten.sum.dim_IntList(%fit_default, [1], True)
%add: i64[1, 1] = aten.add.Tensor(%sum_1, 1)
%compact_default: tuple = tpcompile.compact.default(%x, %fit_default, %lt_scalar, %sum_2, [], 5)
%getitem: f32[1, t1, 4] = getitem(%compact_default, 0)
%getitem_1: bool[1, k] = getitem(%compact_default, 1)
%getitem_2: i64[1, k] = getitem(%compact_default, 2)
%unsqueeze: bool[1, t1, 1] = aten.unsqueeze.default(%getitem_1, -1)
%mul_6: f32[1, t1, 4] = aten.mul.Tensor(%getitem, %unsqueeze)
%sum_3: f32[1, 4] = aten.sum.dim_IntList(%mul_6, [1])
%div: f32[1, 4] = aten.div.Tensor(%sum_3, %add)
return (%div, %fit_default)""",
    )


class Early(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        count = keep.sum(1, keepdim=True) + 1
        x = ops.prune(x, keep, x.sum(-1))
        return (x * keep.unsqueeze(-1)).sum(1) / count, keep


def sizes(text: str) -> str:
    """The text with torch's numbers of data-dependent sizes left out: every run of the fake kernels counts on."""
    return re.sub(r"\bu\d+\b", "k", text)


def test_the_history_and_the_pipeline_tell(toy: Callable[..., Program]) -> None:
    text = "canonicalize,recognise,mark,place,compact,cleanup,lower{buckets=32+64}"
    parsed = Pipeline.parse(text, PASSES)
    assert str(parsed) == text
    assert ",".join(parsed(toy(Small())).history) == text


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Lower("16", "8"), "buckets and constant counts exclude each other\n  fix     give one of the two"),
        (
            Lower("16", exact=True),
            "what is stored exactly has no buckets and no constant counts\n  fix     give one of the three",
        ),
        (
            Lower("16+8"),
            "buckets: 16, 8 is no rising list of sizes from 2\n  fix     give sizes such as 16, or 32+64+128",
        ),
        (Lower(counts="8+4"), "counts 8, 4 do not fit 1 sites\n  fix     give a count of 2 or more for each site"),
        (Lower(counts="1"), "counts 1 do not fit 1 sites\n  fix     give a count of 2 or more for each site"),
    ],
)
def test_refusals(toy: Callable[..., Program], step: Lower, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        step(DEFAULT(toy(Small())))
    assert str(caught.value) == message
