"""The line an operation is reported at: the user's, also where it stands in a helper."""

import json
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.proxy import TracerBase

from tpcompile import frames, ops
from tpcompile.capture import capture, tracing
from tpcompile.frames import Frame, innermost, parse
from tpcompile.program import where_of

STDLIB = Path(sysconfig.get_path("stdlib")).as_posix()
ENV = "/env/lib/python3.12/site-packages"
MODEL = ("/home/user/model.py", "forward")


def trace(*frames: tuple[str, str]) -> str:
    """A stack trace's text, as torch records it; the lines are numbered from 1."""
    return "\n".join(f'  File "{file}", line {i}, in {name}\n    source {i}' for i, (file, name) in enumerate(frames, 1)).strip()


@pytest.mark.parametrize(
    ("stack", "line"),
    [
        ([MODEL], 1),
        ([MODEL, ("/home/user/model.py", "average"), ("/home/user/tools.py", "mean")], 3),
        ([MODEL, (f"{frames.TORCH}nn/modules/linear.py", "forward")], 1),
        ([MODEL, ("/elsewhere/site-packages/torch/nn/functional.py", "forward")], 1),
        ([MODEL, (f"{STDLIB}/functools.py", "wrapper")], 1),
        ([MODEL, ("<eval_with_key>.7", "forward")], 1),
        ([MODEL, ("<frozen importlib>", "load")], 1),
        ([MODEL, (Path(ops.__file__).as_posix(), "prune")], 1),
        ([MODEL, (f"{ENV}/einops/einops.py", "rearrange"), (f"{ENV}/einops/_backends.py", "reshape")], 1),
        ([MODEL, (f"{ENV}/einops/layers/torch.py", "forward"), (f"{ENV}/einops/einops.py", "rearrange")], 3),
        ([MODEL, (f"{ENV}/transformers/bert.py", "forward"), (f"{ENV}/transformers/sdpa.py", "attention")], 3),
        ([(f"{ENV}/einops/einops.py", "rearrange")], 1),
        ([("/home/user/torch/model.py", "forward"), ("/home/user/torch/tools.py", "mean")], 2),
        ([(f"{frames.TORCH}nn/modules/container.py", "forward"), (f"{frames.TORCH}nn/modules/linear.py", "forward")], 2),
        ([("<stdin>", "forward"), ("<ipython-input-3>", "mean")], 2),
    ],
)
def test_the_innermost_line_outside_libraries(stack: list[tuple[str, str]], line: int) -> None:
    assert innermost(trace(*stack)) == Frame(stack[line - 1][0], line, stack[line - 1][1], f"source {line}")


def test_a_comprehension_goes_by_the_name_of_its_function() -> None:
    found = innermost(trace(MODEL, ("/home/user/model.py", "<listcomp>")))
    assert found == Frame(MODEL[0], 2, "forward", "source 2")


def test_no_frames_are_no_line() -> None:
    assert innermost("") is None
    assert parse('File "a.py", line 3, in forward\nFile "b.py", line 4, in f\n    x = 1') == [
        Frame("a.py", 3, "forward", ""),
        Frame("b.py", 4, "f", "x = 1"),
    ]


def test_torch_is_as_it_was_after_a_trace() -> None:
    before = TracerBase._filter_traceback_frames
    with pytest.raises(KeyError), tracing(), tracing():
        raise KeyError
    assert TracerBase._filter_traceback_frames is before


def doubled(x: Tensor) -> Tensor:
    return x * 2.0


class Helped(nn.Module):
    """Every operation stands outside forward, but for the last two."""

    def forward(self, x: Tensor) -> Tensor:
        x = doubled(x)
        x = (lambda y: y + 1.0)(x)
        x = partial(self.shifted, by=3.0)(x)
        x = torch.stack([y.exp() for y in (x, json.loads("1") + x)]).sum(0)
        return ops.prune(x, x.sum(-1) > 0.0)

    def shifted(self, x: Tensor, by: float) -> Tensor:
        return x - by


def test_operations_in_helpers_keep_their_own_lines() -> None:
    helped = capture(Helped().eval(), {"x": torch.randn(1, 12, 16)})
    found = [where_of(node) for node in helped.graph.nodes if node.op == "call_function"]
    assert {where.short.partition(":")[0] for where in found} == {"test_frames.py"}
    rows = dict.fromkeys((where.function, where.source) for where in found)
    assert list(rows) == [
        ("doubled", "return x * 2.0"),
        ("<lambda>", "x = (lambda y: y + 1.0)(x)"),
        ("shifted", "return x - by"),
        ("forward", 'x = torch.stack([y.exp() for y in (x, json.loads("1") + x)]).sum(0)'),
        ("forward", "return ops.prune(x, x.sum(-1) > 0.0)"),
    ]


def test_a_model_of_torch_modules_only_has_their_lines() -> None:
    plain = capture(nn.Sequential(nn.ReLU()).eval(), {"input": torch.randn(1, 12, 16)})
    (where,) = [where_of(node) for node in plain.graph.nodes if node.op == "call_function"]
    assert str(where).endswith("in forward:  return F.relu(input, inplace=self.inplace)   module 0")
