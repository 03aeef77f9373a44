"""A block as methods write it: attention, a decision from its scores, a row-wise map behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.flops import evaluate
from tpcompile.passes.cost import polynomial
from tpcompile.program import Program

FULL, LEFT = 16, 8


class Block(nn.Module):
    """``probs`` over all queries decide; what the attention gives meets the residual stream, and only then is it pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        probs = (x @ self.key(x).transpose(1, 2) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1) * keep.unsqueeze(-1)
        alive = keep & (probs.sum(1) >= 0.5)
        rows = self.norm(self.out(probs @ x) + x)
        y = ops.prune(rows, alive)
        return (y * alive.unsqueeze(-1)).sum(1)


@pytest.fixture
def block() -> nn.Module:
    """The block, in eval mode."""
    return Block().eval()


@pytest.fixture
def work() -> Callable[[Program], float]:
    """FLOPs of a program at 16 tokens, 8 behind every site."""

    def count(program: Program) -> float:
        sizes = {f"t{level}": LEFT if level else FULL for level in range(len(program.sites) + 1)}
        return evaluate(polynomial(program), sizes)

    return count
