"""What a hostile review found is refused, or equal: no program gives another number than its masked form."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.errors import UnmaskedFold
from tpcompile.passes import pipeline

REFUSED = (
    "SubAlpha", "PlaceBool", "PlaceCast", "ExpandUp", "SumInt2", "NegZero", "Int64", "Low3", "DiagDoubt", "SizeSign", "SizeSign2",
    "FullDtype", "Mutual", "MulInf", "LogScore2", "PosAdd3", "ExpUnshifted", "KeyZeroCmp",
)  # fmt: skip
EQUAL = ("PrefixBool", "PrefixInt", "Rank", "Cse", "PrefixEmb", "AnyU8", "Lerp", "EitherU8", "VarCorr")


def attack(name: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location("strangers_attacks", Path(__file__).parent / "attacks.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    made: nn.Module = getattr(module, name)().eval()
    return made


def inputs(name: str, length: int, seed: int = 0) -> dict[str, Tensor]:
    """States, and masks: all, none, one, and random ones."""
    generator = torch.Generator().manual_seed(seed)
    names = ("k1", "k2", "k3", "flag") if name == "Low3" else ("keep",)
    given = {"x": torch.randn(1, length, 8, generator=generator) * (1.0, 30.0)[seed % 2]}
    for mask in names:
        share = (1.0, 0.0, 1 / length, 0.5, 0.5, 0.8)[seed % 6]
        given[mask] = torch.rand(1, length, generator=generator) < share
    return given


def traced(name: str, model: nn.Module) -> Any:
    example = inputs(name, 9)
    return pipeline()(capture(model, example, {key: {1: "n"} for key in example}, {"n": (2, 400)}))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_is_refused(name: str) -> None:
    with pytest.raises(UnmaskedFold):
        traced(name, attack(name))


@pytest.mark.filterwarnings("ignore:var\\(\\):UserWarning")  # torch on a variance of fewer rows than its correction
@pytest.mark.parametrize("name", EQUAL)
def test_what_is_accepted_is_equal(name: str) -> None:
    model = attack(name)
    program = traced(name, model)
    for seed in range(24):
        given = inputs(name, (2, 3, 9, 17)[seed % 4], seed)
        want = model(**given).detach()
        got = program(**given)["output"]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, want.abs().nan_to_num().max().item()), equal_nan=True)
