"""What the masks do not bear out is refused, at the user's line: never a program that gives another number."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tpcompile.capture import capture
from tpcompile.errors import MarkError, NotDeterministic, RevivedToken, RigidAxis, TpcompileError, UnmaskedFold
from tpcompile.passes import pipeline

HERE = Path(__file__).parent

UNMARKED: dict[str, type[TpcompileError]] = {
    "MeanOfAll": UnmaskedFold, "LargestOfZeroed": UnmaskedFold, "PoolForgets": UnmaskedFold, "Neighbours": RigidAxis,
    "Running": RigidAxis, "RawRows": RigidAxis, "LastRow": RigidAxis, "SecondRow": RigidAxis, "BestIndex": RigidAxis, "Sorted": RigidAxis,
    "Spread": UnmaskedFold, "Grouped": RigidAxis, "NormOverTokens": RigidAxis, "BatchStatistics": RigidAxis, "BestThree": RigidAxis,
    "Counted": UnmaskedFold, "Mirrored": RigidAxis, "Shifted": RigidAxis, "Median": RigidAxis, "Halves": RigidAxis,
    "InHelper": UnmaskedFold, "OtherGate": UnmaskedFold, "Gumbel": NotDeterministic, "Dropped": NotDeterministic,
}  # fmt: skip
MARKED: dict[str, type[TpcompileError]] = {
    "AttentionForgets": UnmaskedFold, "QueriesOnly": UnmaskedFold, "Revived": RevivedToken, "RevivedByOr": RevivedToken,
    "RevivedByLowScore": RevivedToken, "NobodyLeft": UnmaskedFold, "NobodyLeftToPool": UnmaskedFold, "PolicyWithEps": UnmaskedFold,
    "WeakMask": UnmaskedFold, "MaskThenScale": UnmaskedFold, "SmallestOfZeroed": UnmaskedFold, "MeanDecides": UnmaskedFold,
    "ConstantK": RigidAxis, "OtherColumn": UnmaskedFold, "OtherGate": UnmaskedFold, "OneIngredient": UnmaskedFold,
}  # fmt: skip


def load(name: str) -> Any:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(f"strangers_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = {"unsound.py": load("unsound"), "unsound_marked.py": load("unsound_marked")}


def line_of(file: str, name: str) -> int:
    """The line that ``HERE`` marks in a class."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    start = next(i for i, text in enumerate(lines) if text.startswith(f"class {name}("))
    return next(i for i, text in enumerate(lines[start:], start + 1) if text.endswith("# HERE"))


def cases(names: dict[str, type[TpcompileError]]) -> list[Any]:
    return [pytest.param(name, kind, id=name) for name, kind in names.items()]


def refused(file: str, name: str, kind: type[TpcompileError]) -> None:
    torch.manual_seed(0)
    model: nn.Module = getattr(FILES[file], name)().eval()
    with pytest.raises(TpcompileError) as caught:
        pipeline()(capture(model, {"x": torch.randn(1, 12, 16)}, {"x": {1: "n"}}, {"n": (4, 40)}))
    assert type(caught.value) is kind, str(caught.value)
    assert caught.value.where is not None
    assert (Path(caught.value.where.file).name, caught.value.where.line) == (file, line_of(file, name)), str(caught.value)


@pytest.mark.parametrize(("name", "kind"), cases(UNMARKED))
def test_a_stranger_is_refused_at_its_line(name: str, kind: type[TpcompileError]) -> None:
    refused("unsound.py", name, kind)


@pytest.mark.parametrize(("name", "kind"), cases(MARKED))
def test_a_marked_site_is_refused_at_its_line(name: str, kind: type[TpcompileError]) -> None:
    refused("unsound_marked.py", name, kind)


def test_training_mode_is_refused() -> None:
    model = FILES["unsound.py"].MeanOfAll().train()
    with pytest.raises(NotDeterministic, match="the model is in training mode"):
        capture(model, {"x": torch.randn(1, 12, 16)}, {"x": {1: "n"}}, {"n": (4, 40)})


class Dense(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x).sum(1)


def test_a_model_without_any_decision_has_no_site() -> None:
    with pytest.raises(MarkError):
        pipeline()(capture(Dense().eval(), {"x": torch.randn(1, 12, 16)}, {"x": {1: "n"}}, {"n": (4, 40)}))


class Unused(nn.Module):
    """A decision that reaches no hidden state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.tanh(x).sum(-1) > 0.0
        return x.sum(1) / keep.sum(1, keepdim=True).clamp(min=1)


def test_a_mask_that_hides_nothing_is_refused_where_dropped_rows_are_read() -> None:
    with pytest.raises(UnmaskedFold) as caught:
        pipeline()(capture(Unused().eval(), {"x": torch.randn(1, 12, 16)}, {"x": {1: "n"}}, {"n": (4, 40)}))
    assert caught.value.where is not None
    assert caught.value.where.source.startswith("return x.sum(1)")
