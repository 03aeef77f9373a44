"""A keep mask that shows a constant count stores that count; one that does not keeps its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.backends import backends, runnable
from tpcompile.capture import capture
from tpcompile.errors import UnmaskedFold
from tpcompile.onnx.emit import emit
from tpcompile.passes import DEFAULT, Lower, pipeline
from tpcompile.program import Program
from tpcompile.rows import Rows

Decide = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(alive, score, first) to what stays."""

SITES = (6, 3)


class Model(nn.Module):
    """Attention, a decision, attention: twice; the first row is read."""

    def __init__(self, decide: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.decide, self.inner = decide, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        alive = torch.ones_like(x[:, :, 0], dtype=torch.bool)
        first = torch.arange(x.shape[1]) < 1
        for count in SITES:
            logits = x @ self.inner(x).mT + torch.where(alive, 0.0, -1e4)[:, None, :]
            weights = logits.softmax(-1) * alive[:, :, None]
            x = x + weights @ x
            score = weights.sum(1)
            alive = alive & self.decide(alive, score, first, count)
            x = ops.prune(x, alive, score)
        return {"y": x[:, 0]}


def ranked(alive: Tensor, score: Tensor, first: Tensor) -> Tensor:
    return ops.rank(torch.where(alive, torch.where(first, -1.0, score), float("-inf")))


def fixed(alive: Tensor, score: Tensor, first: Tensor, count: int) -> Tensor:
    return (ranked(alive, score, first) < count - 1) | first


def lowered(decide: Callable[[Tensor, Tensor, Tensor, int], Tensor], batch: int = 1) -> tuple[nn.Module, Program]:
    model = Model(decide).eval()
    return model, pipeline("one" if batch == 1 else "ragged")(capture(model, {"x": torch.randn(batch, 10, 8)}))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_rank_below_a_number_is_a_constant_count(batch: int) -> None:
    model, program = lowered(fixed, batch)
    assert program.rows == (Rows(limit=6), Rows(limit=3))
    assert [site.most for site in program.sites] == [6, 3]
    for _ in range(5):
        x = torch.randn(batch, 10, 8)
        trace = program.trace(x=x)
        torch.testing.assert_close(trace.outputs["y"], model(x)["y"], rtol=0, atol=1e-5)
        assert [tuple(index.shape) for index in trace.index if index is not None] == [(batch, 6), (batch, 3)]
    graph = emit(program).model.graph
    assert "NonZero" not in {node.op_type for node in graph}
    behind = program.node("matmul_2").meta["val"]
    assert tuple(behind.shape) == (batch, 6, 6)


def test_a_ladder_and_counts_find_constant_sites() -> None:
    _, program = lowered(fixed)
    assert Lower(buckets="4").run(program).rows == (Rows(limit=6), Rows(limit=3))
    assert Lower(counts="5+2").run(program).rows == (Rows(limit=5), Rows(limit=2))


@pytest.mark.parametrize(
    ("decide", "counts"),
    [
        (lambda a, s, f, k: ranked(a, s, f) <= k, [8, 5]),  # the first row may fall: it is stored beside the others
        (lambda a, s, f, k: (ranked(a, s, f) < 4.5) | f, [6, 6]),
        (lambda a, s, f, k: (ranked(a, s, f) < k) & (s > 0.5), [7, 4]),
        (lambda a, s, f, k: (ranked(a, s, f) < k) | (s > 0.5), [None, None]),
        (lambda a, s, f, k: ~(ranked(a, s, f) < k), [None, None]),
        (lambda a, s, f, k: ranked(a, s, f) + 1 < k, [None, None]),
        (lambda a, s, f, k: ranked(a, s, f) < a.sum(1, keepdim=True) * 0.5, [None, None]),
    ],
)
def test_other_masks(decide: Callable[[Tensor, Tensor, Tensor, int], Tensor], counts: list[int | None]) -> None:
    model, program = lowered(decide)
    assert [site.most for site in program.sites] == counts
    for _ in range(5):
        x = torch.randn(1, 10, 8)
        torch.testing.assert_close(program(x=x)["y"], model(x)["y"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dead", [-1e4, 0.0])
def test_ranks_among_dropped_tokens_are_refused(dead: float) -> None:
    model = Model(lambda a, s, f, k: ops.rank(torch.where(a, s, dead)) < k).eval()
    with pytest.raises(UnmaskedFold, match=r"tpcompile\.rank\.default combines over tokens that site0"):
        DEFAULT(capture(model, {"x": torch.randn(1, 10, 8)}))


class Ranks(nn.Module):
    """Ranks as they are."""

    def forward(self, score: Tensor) -> dict[str, Tensor]:
        return {"rank": ops.rank(score)}


@pytest.mark.parametrize("target", runnable())
def test_equal_scores_stand_in_order_in_every_engine(target: str, tmp_path: Path) -> None:
    score = torch.tensor([[1.0, 3.0, 1.0, 3.0, float("-inf"), 0.0, float("-inf")], [0.0] * 7])
    want = torch.tensor([[2, 0, 3, 1, 5, 4, 6], [*range(7)]])
    assert torch.equal(ops.rank(score), want)
    emit(capture(Ranks().eval(), {"score": score})).save(tmp_path / "model.onnx")
    backends()[target].build(tmp_path / "model.onnx", tmp_path, "fp32")
    with backends()[target].open(tmp_path) as session:
        assert session.run({"score": score.numpy()})["rank"].tolist() == want.tolist()
