"""Masked models that never heard of this compiler, compiled without a hint: the gathered program gives what the masked one gives."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.passes import pipeline

HERE = Path(__file__).parent
WIDTH = 16
LENGTHS = (3, 5, 8, 12, 17)
SAMPLES = 50


def load(name: str) -> Any:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(f"strangers_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ZOO = {name: model for file in ("zoo", "zoo_text", "zoo_vision", "zoo_loops") for name, model in vars(load(file)).items()}


def states(length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(1, length, WIDTH)}


def padded(length: int) -> dict[str, Tensor]:
    mask = (torch.arange(length) < max(length - length % 4, 2)).long().unsqueeze(0)
    return states(length) | {"attention_mask": mask}


def image(length: int) -> dict[str, Tensor]:
    return {"image": torch.randn(1, 3, 16, 16)}


INPUTS: dict[str, Callable[[int], dict[str, Tensor]]] = {"Rotary": padded, "Fixed": image}
SOUND = (
    "ReceivedAttention", "Gate", "Flash", "Dead", "Rotary", "Assigned", "Where", "Skim", "Zeroed", "HandNorm", "Average", "Rounded",
    "Signed", "Registers", "JoinedMask", "Policy", "HardGate", "Fixed", "Thresholds", "Distance", "Memory", "Columns",
    "SelfLoop", "SelfKey", "Causal", "Window",
)  # fmt: skip


def model(name: str) -> nn.Module:
    """Weights wide enough that attention is uneven and counts vary."""
    made: nn.Module = ZOO[name]().eval()
    for weight in made.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.3)
    return made


@pytest.mark.parametrize("name", SOUND)
def test_a_stranger_is_compiled_without_a_hint(name: str) -> None:
    torch.manual_seed(0)
    masked, inputs = model(name), INPUTS.get(name, states)
    dynamic = {} if inputs is image else {key: {1: "n"} for key in inputs(12)}
    program = pipeline()(capture(masked, inputs(12), dynamic, {"n": (2, 40)} if dynamic else {}))
    assert program.sites
    counts = set[tuple[int, ...]]()
    for sample in range(SAMPLES):
        given = inputs(LENGTHS[sample % len(LENGTHS)])
        with torch.no_grad():
            want = masked(**given)
        traced = program.trace(**given)
        counts.add(tuple(int(keep.sum()) - keep.shape[1] for keep in traced.keep))
        bound = 1e-5 * max(1.0, want.double().abs().max().item())
        torch.testing.assert_close(traced.outputs["output"], want, rtol=0, atol=bound)
    assert min(map(sum, counts)) < 0, "nothing is ever dropped"
    assert len(counts) > 1, "counts do not vary"
