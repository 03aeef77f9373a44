"""Wishes become plans; what does not belong together is refused before any work, and by exact text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.cli import main
from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.passes import DEFAULT
from tpcompile.plan import AUTO, LADDER, LADDERS, OTHERWISE, RULES, Plan, Wish, calibrate, candidates, settle
from tpcompile.program import Program

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lowering": "packed"}, "unknown lowering 'packed'\n  fix     use one of: auto, dynamic, bucketed, static"),
    ({"form": "chain"}, "unknown form 'chain'\n  fix     use one of: auto, single, staged"),
    (
        {"lowering": "dynamic", "buckets": (16,)},
        "lowering dynamic has no buckets\n  fix     ask for lowering bucketed, or leave the buckets out",
    ),
    ({"buckets": (1, 4)}, "buckets: 1, 4 is no rising list of sizes from 2\n  fix     give sizes such as 16, or 32,64,128"),
    (
        {"calibrate": "docstrings"},
        "lowering auto calibrates nothing\n  fix     ask for lowering static, or leave calibrate out",
    ),
    (
        {"lowering": "bucketed", "quantile": 0.9},
        "lowering bucketed has no quantile\n  fix     ask for lowering static, or leave the quantile out",
    ),
    (
        {"lowering": "static", "quantile": 0.0},
        "the static quantile is 0.0\n  fix     give a share above 0 and up to 1, such as 0.99",
    ),
    (
        {"tune": True, "buckets": (8,), "form": "single"},
        "lowering and form are given: nothing is left to tune\n  fix     leave one of them out, or tune",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_wish_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Wish(**fields)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--lowering", "packed"], "Invalid value for '--lowering': 'packed' is not one of"),
        (["--form", "chain"], "Invalid value for '--form': 'chain' is not one of"),
        (["--buckets", "16,x"], "Invalid value for '--buckets': '16,x' is no list of sizes, such as 16 or 32,64,128"),
        (["--buckets", "64,32"], "buckets: 64, 32 is no rising list of sizes from 2"),
        (["--lowering", "static", "--buckets", "16"], "lowering static has no buckets"),
        (["--calibrate", "docstrings"], "lowering auto calibrates nothing"),
        (["--static-quantile", "2", "--lowering", "static"], "the static quantile is 2.0"),
    ],
)
def test_the_command_line_refuses_before_it_works(options: list[str], text: str, tmp_path: Path) -> None:
    """The model does not exist: what is said is said before it is looked for."""
    line = ["export", "onnx", "-m", str(tmp_path / "none"), "-o", str(tmp_path / "out"), *options]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 2, done.output
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


class Model(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        return (x * keep.unsqueeze(-1)).sum(1)


@pytest.fixture(scope="module")
def program() -> Program:
    example = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool)}
    compact: Program = DEFAULT(capture(Model().eval(), example, {name: {1: "n"} for name in example}, {"n": (2, 64)}))
    return compact


def nothing() -> tuple[str, Sequence[Sample]]:
    raise AssertionError("no data is needed here")


def samples(*counts: int) -> list[Sample]:
    """A sample a count: that many of 40 tokens are kept."""
    rows = [{"x": np.ones((1, 40, 4), np.float32), "keep": np.arange(40)[None] < count} for count in counts]
    return [Sample("", row) for row in rows]


def test_auto_takes_the_rule_of_the_target(program: Program) -> None:
    for target in ("onnx", "openvino", "elsewhere"):
        plan = settle(AUTO, target, program, nothing)
        rule = RULES.get(target, OTHERWISE)
        assert plan == rule
        assert plan.reason == rule.reason
        assert plan.reason.startswith("rule: ")


def test_what_is_asked_for_is_taken(program: Program) -> None:
    assert settle(Wish("dynamic"), "openvino", program, nothing) == Plan("dynamic", "single", square=True)
    assert settle(Wish(buckets=(8, 16)), "onnx", program, nothing) == Plan("bucketed", "single", (8, 16))
    bucketed = settle(Wish("bucketed"), "onnx", program, nothing)
    assert bucketed == Plan("bucketed", "single", LADDER)
    assert bucketed.reason == "asked for"
    assert str(bucketed.step) == "lower{buckets=4+8+12+16}"


def test_constant_counts_come_from_data(program: Program) -> None:
    plan = settle(Wish("static"), "onnx", program, lambda: ("a.txt", samples(3, 17, 9)))
    assert plan == Plan("static", "single", counts=(17,))
    assert plan.reason == "asked for; the largest count of 3 samples of a.txt"
    assert str(plan.step) == "lower{counts=17}"
    assert not settle(Wish("static"), "openvino", program, lambda: ("a.txt", samples(3))).square, "constant counts are never new"
    half = settle(Wish("static", quantile=0.5), "onnx", program, lambda: ("a.txt", samples(3, 17, 9)))
    assert half.counts == (9,)
    assert half.reason == "asked for; the 0.5 quantile of the counts of 3 samples of a.txt"


def test_what_a_wish_leaves_open_is_tried_and_the_rule_comes_first(program: Program) -> None:
    def tried(wish: Wish, target: str = "onnx") -> list[tuple[str, str, tuple[int, ...]]]:
        found = candidates(wish, target, program, lambda: ("a.txt", samples(3, 17)))
        assert found[0] == settle(wish, target, program, lambda: ("a.txt", samples(3, 17)))
        return [(plan.lowering, plan.form, plan.buckets or plan.counts) for plan in found]

    everything = [
        ("dynamic", "single", ()), ("dynamic", "staged", ()), ("bucketed", "single", LADDER), ("bucketed", "staged", LADDER),
    ]  # fmt: skip
    assert tried(Wish(tune=True)) == everything
    finer = [("bucketed", "single", (4,)), ("bucketed", "single", (4, 8))]
    without = everything[0]  # once more, with maps fetched by rows
    assert tried(Wish(tune=True), "openvino") == [*everything, *finer, without]
    assert tried(Wish(tune=True, buckets=(4, 8))) == [("bucketed", "single", (4, 8)), ("bucketed", "staged", (4, 8))]
    assert tried(Wish(tune=True, form="staged")) == [("dynamic", "staged", ()), ("bucketed", "staged", LADDER)]
    assert tried(Wish("static", tune=True)) == [("static", "single", (17,)), ("static", "staged", (17,))]


def test_where_an_input_may_be_padded_its_length_has_the_ladder_of_the_counts(program: Program) -> None:
    found = candidates(Wish(tune=True, form="single"), "openvino", program, nothing, lambda: True)
    assert [(plan.buckets, plan.lengths, plan.square) for plan in found] == [
        ((), (), True), (LADDER, (), True), *((one, one, True) for one in LADDERS), ((), (), False),
    ]  # fmt: skip
    asked = candidates(Wish(tune=True, buckets=(8,)), "openvino", program, nothing, lambda: True)
    assert [plan.lengths for plan in asked if plan.lengths] == [(8,)]


def test_a_model_that_gathers_by_itself_is_one_graph() -> None:
    class Gathers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            index = torch.arange(2).unsqueeze(0)
            return ops.gathered(x[:, :2], x, index).sum(1)

    captured = capture(Gathers().eval(), {"x": torch.randn(1, 6, 4)}, {})
    alone: Program = DEFAULT(captured)
    assert candidates(Wish(tune=True), "onnx", alone, nothing) == [settle(AUTO, "onnx", alone, nothing)]
    with pytest.raises(UsageError) as caught:
        settle(Wish(form="staged"), "onnx", alone, nothing)
    assert str(caught.value) == (
        "a model that gathers by itself is one graph: it is not cut at its sites\n  fix     leave the form at auto"
    )


def test_a_quantile_takes_a_count_that_was_seen(program: Program) -> None:
    assert calibrate(program, samples(3, 17, 9, 30), 0.5) == (17,)  # of the two in the middle the larger one: half of them fit
    assert calibrate(program, samples(0), 1.0) == (2,)  # never below the least storage
