"""Tiny masked models through the passes: capture, print without places, compare with eager."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture, name_outputs
from tpcompile.errors import AxisError
from tpcompile.passes import DEFAULT
from tpcompile.program import Program

Show = Callable[[Program], str]


def example(length: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Hidden states ``x`` and a random ``keep`` (position 0 among the kept)."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(1, length, generator=generator) > 0.5
    keep[0, 0] = True
    return {"x": torch.randn(1, length, width, generator=generator), "keep": keep}


@pytest.fixture
def toy() -> Callable[..., Program]:
    """``toy(model)``: capture a model of ``x [1, n, 4]`` and ``keep [1, n]``, or of the inputs given; dim 1 is dynamic."""

    def make(model: nn.Module, *, length: int = 6, dynamic: bool = True, **inputs: Tensor) -> Program:
        given = inputs or example(length, 4)
        dims = {name: {1: "n"} for name, value in given.items() if value.dim() > 1} if dynamic else {}
        return capture(model.eval(), given, dims, {"n": (2, 64)})

    return make


@pytest.fixture
def show() -> Show:
    """``show(program)``: its text without the places at the line ends."""

    def text(program: Program) -> str:
        plain = re.sub(r" +# .*$", "", str(program), flags=re.MULTILINE)
        plain = re.sub(r"test_\w+\.py:\d+ *", "HERE", plain).replace("%inputs_", "%")
        plain = re.sub(r"\bs\d+\b", "n", plain)  # torch's name for the dynamic size
        return plain

    return text


@pytest.fixture
def agree() -> Callable[..., None]:
    """``agree(model, program)``: both give the same for several lengths and masks; more inputs come from ``more(length)``."""

    def check(
        model: nn.Module, program: Program, more: Callable[[int], dict[str, Tensor]] | None = None, lengths: Any = (2, 5, 9, 9)
    ) -> None:
        for seed, length in enumerate(lengths):
            inputs = example(length, 4, seed) | (more(length) if more else {})
            with torch.no_grad():
                want = name_outputs(model.eval()(**inputs))
            got = program(**inputs)
            assert got.keys() == want.keys()
            for name, value in want.items():
                bound = 1e-5 * max(1.0, value.double().abs().max().item())
                torch.testing.assert_close(got[name], value, rtol=0, atol=bound)

    return check


@pytest.fixture
def refused() -> Callable[[type[AxisError], Program], AxisError]:
    """``refused(kind, program)``: the refusal of a program, from the whole pipeline."""

    def refuse(kind: type[AxisError], program: Program) -> AxisError:
        with pytest.raises(kind) as caught:
            DEFAULT(program)
        assert caught.value.during == "place, after canonicalize, recognise, mark"
        return caught.value

    return refuse


@pytest.fixture
def place_of(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """``place_of(source)``: ``test_place.py:88`` of the one line of the test's file that starts with ``source``."""

    def find(source: str) -> str:
        lines = request.path.read_text(encoding="utf-8").splitlines()
        (line,) = [i for i, text in enumerate(lines, 1) if text.strip().startswith(source)]
        return f"{request.path.name}:{line}"

    return find


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
