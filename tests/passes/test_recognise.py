"""Sites nobody marked: what is found, where it goes, and what is said when nothing can be."""

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.errors import MarkError, RigidAxis, UnmaskedFold, UsageError
from tpcompile.ops import PRUNE
from tpcompile.passes import Canonicalize, Mark, Recognise, pipeline
from tpcompile.program import Program


class Layer(nn.Module):
    """Single-head attention under an additive mask, a residual, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(8, dim=-1)
        x = x + (q @ k.transpose(1, 2) + hidden[:, None]).softmax(-1) @ v
        return x + self.down(torch.relu(self.up(x)))


class Stranger(nn.Module):
    """A gate drops tokens between two layers; position 0 always lives.

    Args:
        held: how the mask is held: ``bool``, ``float`` or ``dead``.
        end: ``first`` row, masked ``mean``, plain ``average`` (unsound), or the ``last`` row (unsound).
    """

    def __init__(self, held: str = "bool", end: str = "mean") -> None:
        super().__init__()
        self.held, self.end = held, end
        self.one, self.two = Layer(), Layer()
        self.gate = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.arange(x.shape[1]) == 0
        x = self.one(x, torch.zeros(x.shape[:2]))
        score = self.gate(x).squeeze(-1)
        if self.held == "dead":
            dead = (score < 0) & ~first
            hidden, weight = dead.float() * -1e9, (~dead).float()
        else:
            keep = (score >= 0) | first
            weight = keep.float()
            hidden = (1 - weight) * -1e4 if self.held == "float" else torch.where(keep, 0.0, float("-inf"))
        x = self.two(x, hidden)
        match self.end:
            case "mean":
                return (x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
            case "first":
                return x[:, 0]
            case "last":
                return x[:, -1]
        return x.mean(1)  # nothing hides the dropped rows here


def captured(model: nn.Module) -> Program:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return capture(model.eval(), {"x": torch.randn(1, 7, 8)}, {"x": {1: "n"}}, {"n": (2, 40)})


@pytest.mark.parametrize("held", ["bool", "float", "dead"])
@pytest.mark.parametrize("end", ["mean", "first"])
def test_cases_1_to_6_a_mask_in_any_form_is_a_site(held: str, end: str) -> None:
    model = Stranger(held, end)
    program = pipeline()(captured(model))
    assert len(program.sites) == 1
    (line,) = [text for text in program.report if text.startswith("recognised")]
    assert "test_recognise.py:" in line
    dropped = 0
    for length in range(2, 30):
        x = torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length))
        trace = program.trace(x=x)
        with torch.no_grad():
            want = model(x)
        assert (trace.outputs["output"] - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
        dropped += length - int(trace.keep[0].sum())
    assert dropped > 100


def test_case_4_the_second_layer_runs_on_what_is_left() -> None:
    program = pipeline()(captured(Stranger()))
    wide = [str(node.meta["val"].shape[1]) for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [size[0] for size in wide] == ["s", "s", "s", "s", "u", "u", "u"]  # layer one and the gate are full, layer two is not


@pytest.mark.parametrize(
    ("end", "kind", "line"), [("average", UnmaskedFold, "return x.mean(1)"), ("last", RigidAxis, "return x[:, -1]")]
)
def test_case_7_the_refusal_names_what_stands_in_the_way(end: str, kind: type[Exception], line: str) -> None:
    with pytest.raises(kind) as caught:
        pipeline()(captured(Stranger(end=end)))
    assert caught.value.where.source.startswith(line)  # type: ignore[attr-defined]
    assert caught.value.during == "recognise, after canonicalize"  # type: ignore[attr-defined]


def test_case_8_a_marked_model_is_left_alone() -> None:
    program = Recognise()(Canonicalize()(captured(Stranger())))
    assert sum(node.target is PRUNE for node in program.graph.nodes) == 1
    again = Recognise()(program)
    assert [node.name for node in again.graph.nodes] == [node.name for node in program.graph.nodes]


def test_a_model_without_a_mask_is_dense() -> None:
    with pytest.raises(MarkError, match="the model has no prune site"):
        pipeline()(capture(nn.Linear(8, 8).eval(), {"input": torch.randn(1, 6, 8)}))


class Unproved(nn.Module):
    """The mask goes through a table that happens to be the identity: nothing on the graph says so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(6))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (torch.ops.tpcompile.prune(x, keep) * (keep.float() @ self.table)[..., None]).sum(1)


def test_assume_masked_is_explicit_and_recorded() -> None:
    inputs = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool)}
    program = capture(Unproved().eval(), inputs)
    with pytest.raises(UnmaskedFold):
        pipeline()(program)
    trusted = pipeline(assume_masked=("site0",))(program)
    assert [text for text in trusted.assumptions if "as the caller says" in text]
    assert "place{assume_masked=site0}" in trusted.history
    with pytest.raises(UsageError, match="assume_masked names no site: site7"):
        pipeline(assume_masked=("site7",))(program)


def test_the_stages_are_in_order() -> None:
    marked = Mark()(Recognise()(Canonicalize()(captured(Stranger()))))
    assert [site.name for site in marked.sites] == ["site0"]
