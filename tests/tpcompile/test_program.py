from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.errors import StageError, Where
from tpcompile.passes import DEFAULT
from tpcompile.program import Program, Stage, where_of


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        score = x.sum(-1)
        rows = self.linear(ops.prune(x, keep, score))
        return {"sum": (rows * keep.unsqueeze(-1)).sum(1), "n": keep.sum(1)}


@pytest.fixture(scope="module")
def model() -> Pool:
    torch.manual_seed(0)
    return Pool().eval()


@pytest.fixture(scope="module")
def captured(model: Pool) -> Program:
    inputs = {"x": torch.randn(1, 6, 4), "keep": torch.ones(1, 6, dtype=torch.bool)}
    return capture(model, inputs, {name: {1: "n"} for name in inputs})


def example(length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(1, length, 4), "keep": torch.arange(length).unsqueeze(0) % 2 == 0}


def test_a_program_runs_by_name(model: Pool, captured: Program) -> None:
    inputs = example(7)
    outputs = captured(**inputs)
    assert list(outputs) == ["sum", "n"]
    torch.testing.assert_close(outputs, model(**inputs))
    assert not outputs["sum"].requires_grad


@pytest.mark.parametrize("names", [("x",), ("x", "keep", "more"), ()])
def test_wrong_input_names_are_refused(captured: Program, names: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        captured(**{name: torch.zeros(1, 6) for name in names})
    assert str(caught.value) == f"inputs are x, keep; got {', '.join(names) or 'none'}"


def test_a_trace_shows_what_each_site_decided(captured: Program) -> None:
    program, inputs = DEFAULT(captured), example(7)
    trace = program.trace(**inputs)
    assert torch.equal(trace.keep[0], inputs["keep"])
    assert trace.score == (None,)  # nothing reads it: it is computed in masked form only
    assert trace.index[0] is not None
    assert trace.index[0].tolist() == [[0, 2, 4, 6]]
    assert captured.trace(**inputs).keep == ()


def test_a_draft_leaves_the_program_alone(captured: Program) -> None:
    before, draft = str(captured), captured.draft()
    (node,) = draft.graph.find_nodes(op="call_function", target=ops.PRUNE)
    node.replace_all_uses_with(node.args[0])
    after = captured.adopt(draft)
    assert str(captured) == before
    assert "prune" not in str(after)
    assert after.constants()["p_captured_linear_weight"].data_ptr() == captured.constants()["p_captured_linear_weight"].data_ptr()


def test_an_unknown_node_is_our_bug(captured: Program) -> None:
    with pytest.raises(StageError, match=r"^no node 'gone' in the graph"):
        captured.node("gone")


def test_a_place_is_the_users_innermost_line(captured: Program) -> None:
    (node,) = captured.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    where = where_of(node)
    assert (where.file, where.function, where.module) == (__file__, "forward", "linear")
    assert where.source == "rows = self.linear(ops.prune(x, keep, score))"


def test_a_node_without_a_trace_has_no_place() -> None:
    node = fx.Graph().placeholder("x")
    assert where_of(node) == Where()
    node.meta["stack_trace"] = 'File "/a/torch/nn/x.py", line 3, in f\n    deep()\nFile "/b/my.py", line 4, in g'
    assert where_of(node) == Where("/b/my.py", 4, "", "", "g")


def test_stages_are_ordered(captured: Program) -> None:
    assert Stage.CAPTURED < Stage.MARKED < Stage.PLACED < Stage.COMPACT
    assert replace(captured, stage=Stage.MARKED).stage is Stage.MARKED
