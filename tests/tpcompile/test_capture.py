import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture, name_outputs
from tpcompile.errors import CaptureError, NotDeterministic, TpcompileError
from tpcompile.program import Stage
from tpcompile.spec import TensorSpec
from tpcompile.untraceable import LOGS


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": a + 2 * b}


def pair(length: int = 6) -> dict[str, Tensor]:
    return {"a": torch.randn(1, length), "b": torch.randn(1, length)}


BOTH = {"a": {1: "n"}, "b": {1: "n"}}


def test_inputs_outputs_and_dims_are_named() -> None:
    program = capture(Add().eval(), pair(), BOTH, {"n": (2, 64)})
    assert program.stage is Stage.CAPTURED
    assert program.inputs == (TensorSpec("a", "float32", (1, "n")), TensorSpec("b", "float32", (1, "n")))
    assert program.output_names == ("sum",)
    assert program.dims == {"n": (2, 64)}
    inputs = pair(9)
    torch.testing.assert_close(program(**inputs)["sum"], inputs["a"] + 2 * inputs["b"])


def test_without_dynamic_dims_the_sizes_are_fixed() -> None:
    program = capture(Add().eval(), pair())
    assert program.inputs[0].shape == (1, 6)
    assert program.dims == {}


def test_one_tensor_given_twice_is_two_inputs() -> None:
    same = torch.ones(1, 6)
    program = capture(Add().eval(), {"a": same, "b": same}, BOTH)
    assert program(a=torch.ones(1, 3), b=torch.zeros(1, 3))["sum"].tolist() == [[1.0] * 3]


class Position(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a[:, 3]


class Sliced(nn.Module):
    """A position table of 40 rows, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 40))

    def forward(self, a: Tensor) -> Tensor:
        return a + self.table[:, : a.shape[1]]


@pytest.mark.parametrize(("model", "range_"), [(Position(), (4, 64)), (Sliced(), (2, 40))])
def test_a_range_the_model_narrows_is_reported(model: nn.Module, range_: tuple[int, int]) -> None:
    assert capture(model.eval(), {"a": torch.randn(1, 6)}, {"a": {1: "n"}}, {"n": (2, 64)}).dims == {"n": range_}


def test_an_exported_program_is_taken_as_it_is() -> None:
    inputs = pair()
    exported = torch.export.export(Add().eval(), (), inputs, strict=False)
    program = capture(exported, inputs)
    torch.testing.assert_close(program(**inputs)["output_0"], inputs["a"] + 2 * inputs["b"])
    with pytest.raises(CaptureError, match=r"^the program takes a, b, the example gives a"):
        capture(exported, {"a": inputs["a"]})


def test_training_mode_is_refused() -> None:
    with pytest.raises(NotDeterministic) as caught:
        capture(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), {"input": torch.randn(1, 2)})
    assert caught.value.message == "the model is in training mode: dropout and batch statistics would be compiled in"
    assert caught.value.fix == "call model.eval() first"
    part = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    part[1].train()
    text = f"NotDeterministic: {caught.value.message}"
    refused(part, {"input": torch.randn(1, 2)}, text, "module 1", "", "call model.eval() first")


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, a: Tensor) -> Tensor:
        self.calls.add_(1)
        return a + self.calls


class Scribbler(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a.add_(1)


CHANGED = "the model changes its own state while it runs: "
KEEP_OUT = "write y = x + 1 instead of x.add_(1), and keep state that changes out of forward"


@pytest.mark.parametrize(
    ("model", "name", "at"),
    [
        (nn.Sequential(nn.Identity(), Counter()), "1.calls", "self.calls.add_(1)   module 1"),
        (Scribbler(), "its input a", "return a.add_(1)"),
    ],
)
def test_state_that_changes_is_refused(model: nn.Module, name: str, at: str) -> None:
    given = "input" if isinstance(model, nn.Sequential) else "a"
    refused(model.eval(), {given: torch.randn(1, 6)}, f"NotDeterministic: {CHANGED}{name}", at, "capture", KEEP_OUT)


def refused(model: nn.Module, inputs: dict[str, Tensor], message: str, at: str, during: str, fix: str, **more: Any) -> None:
    """Capture is refused with exactly this text; ``at`` is a line of this file, whose number may change."""
    with pytest.raises(TpcompileError) as caught:
        capture(model, inputs, **more)
    shown = re.sub(r"test_capture\.py:\d+ in \w+:  ", "", f"{type(caught.value).__name__}: {caught.value}")
    rows = [message, f"  at      {at}", f"  during  {during}", f"  fix     {fix}"]
    assert shown.splitlines() == [row for row in rows if not row.endswith("  ")]
    assert not at.strip() or at.startswith("module ") or Path(caught.value.where.file) == Path(__file__)  # type: ignore[union-attr]


class Branches(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return self.choose(a)

    def choose(self, a: Tensor) -> Tensor:
        return a * 2 if a.mean() > 0.5 else a


class Misfit(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a + torch.ones(3)


class Six(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a.view(2, 3).sum(1)


class Mute(nn.Module):
    def forward(self, a: Tensor) -> int:
        return 3


GUARD = "Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).  (Size-like symbols: none)"
ASKED = "write it without a tensor's value in Python: torch.where for a branch, a mask for boolean indexing; -v shows torch's own error"
TRY = "run the model on the example inputs first; where that works, -v shows torch's own error"
BROADCAST = (
    "Attempting to broadcast a dimension of length 3 at -1! Mismatching argument at index 1 had torch.Size([3]); "
    "but expected shape should be broadcastable to [1, 6]"
)


def test_a_branch_on_values_is_refused_at_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Identity(), Branches()).eval()
    message = f"CaptureError: torch.export could not trace Sequential: {GUARD}"
    refused(model, {"input": torch.randn(1, 6)}, message, "return a * 2 if a.mean() > 0.5 else a   module 1", "capture", ASKED)
    assert capfd.readouterr() == ("", "")  # torch prints the graph so far, unless it is kept from it


def test_a_shape_that_does_not_fit_is_refused_at_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    message = f"CaptureError: torch.export could not trace Misfit: {BROADCAST}"
    refused(Misfit().eval(), {"a": torch.randn(1, 6)}, message, "return a + torch.ones(3)", "capture", TRY)
    assert capfd.readouterr() == ("", "")


def test_a_dynamic_size_that_becomes_a_constant_is_refused_at_its_line() -> None:
    message = "CaptureError: dim n of a is dynamic, but Six can only be traced with the size 6"
    fix = "write that line for any size (x.shape[1], or -1 in a view), or leave the dim out of dynamic"
    refused(
        Six().eval(), {"a": torch.randn(1, 6)}, message, "return a.view(2, 3).sum(1)", "capture", fix, dynamic={"a": {1: "n"}}
    )


def test_inputs_that_forward_does_not_take_are_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Add().eval(), {"a": torch.randn(1, 6)})
    assert str(caught.value) == (
        "the example inputs do not fit the forward of Add: missing a required argument: 'b'\n"
        "  fix     give each of its parameters by name: a, b"
    )


def test_a_forward_without_tensors_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Mute().eval(), {"a": torch.randn(1, 6)})
    assert str(caught.value) == (
        "the forward of Mute returns no tensor but int\n"
        "  fix     return a tensor, a tuple of tensors, or a mapping of names to tensors"
    )


def test_nothing_of_torch_is_left_changed() -> None:
    logs = [logging.getLogger(name) for name in LOGS]
    settings = torch.fx.experimental._config
    before = [list(log.filters) for log in logs], settings.print_specializations
    with pytest.raises(CaptureError):
        capture(Branches().eval(), {"a": torch.randn(1, 6)})
    assert ([list(log.filters) for log in logs], settings.print_specializations) == before


def test_unknown_dynamic_inputs_are_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Add().eval(), pair(), {"c": {1: "n"}})
    assert str(caught.value) == "dynamic dims name inputs that were not given: c\n  fix     inputs are a, b"


def test_dims_of_one_name_share_a_size() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Add().eval(), {"a": torch.randn(1, 6), "b": torch.randn(1, 1)}, BOTH)
    assert str(caught.value) == (
        "dim n is 6 in the inputs before b, and 1 there\n  fix     give the dims of one name one size, or name them apart"
    )
    with pytest.raises(CaptureError) as caught:
        capture(Add().eval(), pair(), {"a": {2: "n"}})
    assert str(caught.value) == "a has no dim 2 to call n\n  fix     its shape is [1, 6]: count dims from 0"


APART = "name them apart: what lies in a tuple or a mapping has its name behind a dot"
PICK = "switch it off (use_cache=False), or wrap the model in a module that returns the tensors you want"


@dataclass
class Both:
    """An output of tensors by name."""

    states: Tensor
    maps: tuple[Tensor, ...] | None


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (torch.zeros(1), ["output"]),
        ((torch.zeros(1), None, torch.ones(1)), ["output_0", "output_2"]),
        ({"a": torch.zeros(1), "b": None}, ["a"]),
        ({"a": torch.zeros(1), "states": (torch.ones(1), None, [torch.ones(1)])}, ["a", "states.0", "states.2.0"]),
        ((torch.zeros(1), {"a": torch.zeros(1), "b": ()}), ["output_0", "output_1.a"]),
        (Both(torch.zeros(1), (torch.ones(1),)), ["states", "maps.0"]),
        ([Both(torch.zeros(1), None)], ["output_0.states"]),
    ],
)
def test_outputs_are_named(result: Any, names: list[str]) -> None:
    assert list(name_outputs(result)) == names


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"cache": (torch.zeros(1), object())}, f"the forward returns cache.1, which is no tensor but object\n  fix     {PICK}"),
        ((torch.zeros(1), 3), f"the forward returns output_1, which is no tensor but int\n  fix     {PICK}"),
        (
            {"a": (torch.zeros(1),), "a.0": torch.zeros(1)},
            f"the forward returns two tensors named a.0\n  fix     {APART}",
        ),
        ({"site0": {"keep": torch.zeros(1)}}, "site0.keep, which the forward returns, is a tap's name\n  fix     name it otherwise"),
    ],
)
def test_what_is_no_tensor_is_refused(result: Any, text: str) -> None:
    with pytest.raises(CaptureError) as caught:
        name_outputs(result)
    assert str(caught.value) == text


class Nested(nn.Module):
    def __init__(self, *more: Any) -> None:
        super().__init__()
        self.more = more

    def forward(self, a: Tensor) -> dict[str, Any]:
        return {"sum": a + 1, "states": (a * 2, None, [a * 3]), "none": None, "more": self.more}


def test_nested_outputs_are_captured() -> None:
    a = torch.randn(1, 6)
    program = capture(Nested().eval(), {"a": a}, {"a": {1: "n"}})
    assert program.output_names == ("sum", "states.0", "states.2.0")
    torch.testing.assert_close(program(a=a)["states.2.0"], a * 3)
    refused(Nested(3).eval(), {"a": a}, "CaptureError: the forward returns more.0, which is no tensor but int", "", "", PICK)


def test_a_traced_program_gives_its_tensors_alone() -> None:
    a = torch.randn(1, 6)
    program = capture(torch.export.export(Nested(), (), {"a": a}), {"a": a})
    assert program.output_names == ("output_0", "output_1", "output_3")
    torch.testing.assert_close(program(a=a)["output_3"], a * 3)
    with pytest.raises(CaptureError, match="the forward returns output_5, which is no tensor but int"):
        capture(torch.export.export(Nested(3), (), {"a": a}), {"a": a})


class Minus(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first - second


def test_a_traced_program_binds_its_inputs_by_name() -> None:
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])
    exported = torch.export.export(Minus(), (), {"first": first, "second": second})
    program = capture(exported, {"second": second, "first": first})
    assert [spec.name for spec in program.inputs] == ["first", "second"]
    torch.testing.assert_close(program(first=first, second=second)["output_0"], first - second)
    with pytest.raises(CaptureError, match="the program takes first, second, the example gives first"):
        capture(exported, {"first": first})


class Compound(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.glu(torch.tile(x, (1, 1, 2))) + nn.functional.cosine_similarity(x, x + 1, -1).unsqueeze(-1)
        return nn.functional.layer_norm(nn.functional.gelu(y * x.norm(dim=-1, keepdim=True)), (4,)).softmax(-1)


def test_compound_ops_are_written_out_and_what_engines_fuse_stays() -> None:
    x = torch.randn(1, 6, 4)
    model = Compound().eval()
    program = capture(model, {"x": x}, {"x": {1: "n"}})
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"aten.gelu.default", "aten.layer_norm.default", "aten.softmax.int"} <= targets
    assert not targets & {"aten.glu.default", "aten.cosine_similarity.default", "aten.tile.default"}
    torch.testing.assert_close(program(x=x)["output"], model(x), rtol=0, atol=1e-6)
