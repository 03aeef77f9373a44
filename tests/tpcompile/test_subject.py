"""A traced program as a subject: it knows its example inputs and its dynamic dims."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tpcompile.errors import UsageError
from tpcompile.subject import subject_of


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + 2 * b


def traced() -> ExportedProgram:
    """``b`` comes first, and both share a dynamic dim."""
    n = Dim("n", min=2, max=40)
    inputs = {"b": torch.ones(1, 6), "a": torch.zeros(1, 6)}
    return torch.export.export(Add().eval(), (), inputs, dynamic_shapes={"b": {1: n}, "a": {1: n}})


def test_a_pt2_file_brings_its_inputs_and_dims(tmp_path: Path) -> None:
    torch.export.save(traced(), tmp_path / "add.pt2")
    subject = subject_of(tmp_path / "add.pt2", None, None, None, None)
    assert {name: float(value.sum()) for name, value in subject.inputs.items()} == {"b": 6.0, "a": 0.0}
    assert subject.dynamic == {"b": {1: "b_1"}, "a": {1: "b_1"}}


def test_what_the_caller_says_wins() -> None:
    inputs, dynamic = {"a": torch.ones(1, 3), "b": torch.ones(1, 3)}, {"a": {1: "seq"}, "b": {1: "seq"}}
    subject = subject_of(traced(), inputs, dynamic, None, None)
    assert (subject.inputs, subject.dynamic) == (inputs, dynamic)


def test_a_program_without_example_inputs_needs_them() -> None:
    program = traced()
    program.example_inputs = None
    with pytest.raises(UsageError) as caught:
        subject_of(program, None, None, None, None)
    assert str(caught.value) == "a module needs example inputs\n  fix     pass inputs={'input_ids': tensor, ...}"
