"""A token count that is a literal in the user's code, and equals every other size there is."""

import hypothesis.strategies as st
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.passes import DEFAULT

N = 8
"""Tokens, width, heads and head size: all 8, so that only factors tell them apart."""


class Literal(nn.Module):
    """Heads of 8 x 8 over 8 tokens of width 64, written with numbers as exports are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(N * N, 3 * N * N)
        self.out = nn.Linear(N * N, N * N)
        self.positions = nn.Parameter(torch.randn(1, N, N * N))
        self.bias = nn.Parameter(torch.randn(N, N, N))
        self.table = nn.Embedding(N, N * N)

    def attend(self, x: Tensor, alive: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, N, 3, N, N).permute(2, 0, 3, 1, 4).select(0, 0), *self._two(x)
        hidden = alive.view(1, 1, 1, N).expand(1, N, N, N)
        weights = (q @ k.transpose(2, 3) + self.bias).masked_fill(~hidden, -1e4).softmax(-1) * alive.view(1, 1, N, 1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(1, N, N * N))

    def _two(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self.qkv(x).view(1, N, 3, N, N)
        return both.select(2, 1).transpose(1, 2), both.select(2, 2).transpose(1, 2)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        alive = keep | ~keep
        x = self.attend(x.view(1, N, N * N), alive)
        x = ops.prune(x, keep)
        x = x + self.positions + self.table(torch.arange(N)).view(1, N, N * N)
        x = self.attend(x, keep)
        weight = keep.view(1, N, 1) / N
        late = (torch.arange(N) >= N // 2).view(1, N, 1)
        return {
            "mean": (x * weight).sum(1),
            "first": x[:, 0],
            "late": (x * weight * late).sum(1),
            "rows": (x * weight).abs().sum(1),
        }


torch.manual_seed(0)
MODEL = Literal().eval()
PROGRAM = DEFAULT(capture(MODEL, {"x": torch.randn(1, N, N * N), "keep": torch.ones(1, N, dtype=torch.bool)}))


@given(st.lists(st.booleans(), min_size=N, max_size=N), st.integers(0, 3))
@example([True] * N, 0)
@example([False] * N, 0)
@example([False] * (N - 1) + [True], 1)
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_gathered_equals_masked(keep: list[bool], seed: int) -> None:
    inputs = {"x": torch.randn(1, N, N * N, generator=torch.Generator().manual_seed(seed)), "keep": torch.tensor([keep])}
    with torch.no_grad():
        want = MODEL(**inputs)
    trace = PROGRAM.trace(**inputs)
    for name, value in want.items():
        assert (trace.outputs[name] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), name
    assert trace.index[0] is not None
    assert trace.index[0].shape[1] == max(2, sum(keep) + (not keep[0]))


def test_no_literal_of_the_count_is_left() -> None:
    """Behind the site no size argument and no tensor has the full count where tokens run."""
    site = PROGRAM.sites[0]
    behind = False
    for node in PROGRAM.graph.nodes:
        behind = behind or node.name == site.node
        placement = PROGRAM.placements.get(node.name)
        if behind and placement and isinstance(node.meta.get("val"), Tensor):
            for dim, level in placement.dims.items():
                assert level == 0 or not isinstance(node.meta["val"].shape[dim], int), node.format_node()
