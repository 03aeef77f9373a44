"""The law for whole models: gathered equals masked for any mask and length. Keep decisions are drawn, not computed."""

from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.passes import DEFAULT
from tpcompile.program import Program

WIDTH, HEADS, LONGEST = 8, 2, 20
NEG_INF = float("-inf")

GATE = settings(max_examples=12, derandomize=True, deadline=None, database=None)


class Block(nn.Module):
    """Attention under a key mask, rows of dropped queries zeroed, then a site and a feed-forward.

    Args:
        low: what masked logits become.
        zero: how dropped rows are zeroed: by a product or by a ``where``.
    """

    def __init__(self, low: float, zero: str) -> None:
        super().__init__()
        self.low, self.zero = low, zero
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, alive: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, HEADS, WIDTH // HEADS).transpose(1, 2) for part in self.qkv)
        logits = q @ k.transpose(-1, -2) / 2.0
        if self.low == NEG_INF:
            logits = logits.masked_fill(~alive[:, None, None, :], NEG_INF)
            v = torch.where(alive[:, None, :, None], v, 0.0)
        else:
            logits = logits + torch.where(alive, 0.0, self.low)[:, None, None, :]
        y = logits.softmax(-1) @ v
        rows = alive[:, None, :, None]
        y = torch.where(rows, y, 0.0) if self.zero == "where" else y * rows
        x = self.norm(x + self.out(y.transpose(1, 2).reshape(b, n, WIDTH)))
        alive = alive & keep
        x = ops.prune(x, alive)
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x)))), alive


class Model(nn.Module):
    """Two blocks and two heads: mean over what is alive, and the first row."""

    def __init__(self, low: float, zero: str) -> None:
        super().__init__()
        self.first, self.second = Block(low, zero), Block(low, zero)

    def forward(self, x: Tensor, keep1: Tensor, keep2: Tensor) -> dict[str, Tensor]:
        alive = keep1 | torch.logical_not(keep1)  # every token lives at first
        x, alive = self.first(x, alive, keep1)
        x, alive = self.second(x, alive, keep2)
        weight = alive.unsqueeze(-1).to(x.dtype)
        mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return {"mean": mean, "first": torch.tanh(x[:, 0]), "share": (x * weight).sum(1) / x.shape[1]}


VARIANTS = {"product": (-1e4, "product"), "where": (-1e4, "where"), "infinite": (NEG_INF, "where")}


@cache
def lowered(variant: str) -> tuple[Model, Program]:
    """A model and its gathered program; built once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Model(*VARIANTS[variant]).eval()
        mask = torch.ones(1, 6, dtype=torch.bool)
        inputs = {"x": torch.randn(1, 6, WIDTH), "keep1": mask, "keep2": mask}
        captured = capture(model, inputs, {name: {1: "n"} for name in inputs}, {"n": (2, LONGEST)})
    return model, DEFAULT(captured)


def masks(length: int) -> st.SearchStrategy[list[bool]]:
    """All, none but the prefix, none, one, or any."""
    one = st.integers(0, length - 1).map(lambda i: [j == i for j in range(length)])
    named = st.sampled_from([[True] * length, [j == 0 for j in range(length)], [False] * length])
    return st.one_of(named, one, st.lists(st.booleans(), min_size=length, max_size=length))


DRAWN = st.integers(2, LONGEST).flatmap(lambda n: st.tuples(masks(n), masks(n), st.integers(0, 9)))


@pytest.mark.parametrize("variant", VARIANTS)
@given(drawn=DRAWN)
@example(drawn=([False, False], [True, True], 0))
@example(drawn=([False] * 7, [False] * 7, 1))
@example(drawn=([True] * 20, [True] * 20, 2))
@example(drawn=([False, True, False, False, True], [True, False, False, True, True], 3))
@GATE
def test_gathered_equals_masked(variant: str, drawn: tuple[list[bool], list[bool], int]) -> None:
    model, program = lowered(variant)
    keep1, keep2 = (torch.tensor([row]) for row in drawn[:2])
    x = torch.randn(1, keep1.shape[1], WIDTH, generator=torch.Generator().manual_seed(drawn[2]))
    with torch.no_grad():
        masked = model(x=x, keep1=keep1, keep2=keep2)
    trace = program.trace(x=x, keep1=keep1, keep2=keep2)
    for name, want in masked.items():
        assert torch.isfinite(want).all()
        assert (trace.outputs[name] - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item()), name
    stored = torch.arange(x.shape[1])
    for kept, keep, index in zip((keep1, keep1 & keep2), trace.keep, trace.index, strict=True):
        assert index is not None
        want_kept = [i for i in range(x.shape[1]) if kept[0, i]]
        assert stored[keep[0]].tolist() == want_kept  # what the site decides, in original positions
        rows = stored[index[0]].tolist()
        assert len(rows) == max(2, len({0, *want_kept}))
        must = [i for i in rows if i == 0 or i in want_kept]
        assert must == sorted({0, *want_kept})  # in original order, in front of any filler
        assert rows[: len(must)] == must
        stored = stored[index[0]]
