"""Marked sites that the model's own masks do not bear out; ``HERE`` marks the line at which that shows."""

import torch
from torch import Tensor, nn

from tpcompile import ops

DIM = 16


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 1)

    def logits(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT / 4

    def decide(self, x: Tensor) -> Tensor:
        return (self.gate(x).squeeze(-1) > 0) | (torch.arange(x.shape[1], device=x.device) == 0)

    def pool(self, x: Tensor, keep: Tensor) -> Tensor:
        return (x * keep.unsqueeze(-1)).sum(1)


class AttentionForgets(Marked):
    """Every row that is read attends to dropped keys."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        p = self.logits(x).softmax(-1)  # HERE
        return self.pool(p @ self.v(x), keep)


class QueriesOnly(Marked):
    """The mask lies along queries, not along keys."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        p = self.logits(x).masked_fill(~keep.unsqueeze(2), -1e9).softmax(-1)  # HERE
        return self.pool(p @ self.v(x), keep)


class Revived(Marked):
    """The second decision forgets the first."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        y = torch.tanh(x)
        again = self.decide(y)
        y = ops.prune(y, again)  # HERE
        return self.pool(y, keep & again)


class RevivedByOr(Marked):
    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        again = keep | self.decide(torch.tanh(x))
        x = ops.prune(x, again)  # HERE
        return self.pool(x, keep)


class RevivedByLowScore(Marked):
    """A dropped token's score is 0, and 0 passes."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        score = x.norm(dim=-1) * keep
        again = score < 4.0
        x = ops.prune(x, again)  # HERE
        return self.pool(x, keep & again)


class NobodyLeft(Marked):
    """Every key may be masked, and the first row is read all the same: it then averages dropped keys."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.gate(x).squeeze(-1) > 0
        x = ops.prune(x, keep)
        p = self.logits(x).masked_fill(~keep.unsqueeze(1), -1e4).softmax(-1)
        return (p @ self.v(x))[:, 0]  # HERE


class NobodyLeftToPool(Marked):
    def forward(self, x: Tensor) -> Tensor:
        keep = self.gate(x).squeeze(-1) > 0
        x = ops.prune(x, keep)
        weights = (self.gate(x).squeeze(-1) - 1e4 * (1 - keep.float())).softmax(-1)
        return (weights.unsqueeze(1) @ x).squeeze(1)  # HERE


class PolicyWithEps(Marked):
    """Every dropped key keeps a share of eps over N."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        weights = self.logits(x).clamp(-20, 20).exp() * keep.unsqueeze(1)
        eps = 1e-6
        p = (weights + eps / x.shape[1]) / (weights.sum(-1, keepdim=True) + eps)
        return self.pool(p @ self.v(x), keep)  # HERE


class WeakMask(Marked):
    """Five below is not out of reach."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        p = (self.logits(x) - 5.0 * (~keep).float().unsqueeze(1)).softmax(-1)  # HERE
        return self.pool(p @ self.v(x), keep)


class MaskThenScale(Marked):
    """The mask is scaled away with the logits: -1e4 over 64 is within reach of them."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        p = (self.logits(x).masked_fill(~keep.unsqueeze(1), -1e4) / 64).softmax(-1)  # HERE
        return self.pool(p @ self.v(x), keep)


class SmallestOfZeroed(Marked):
    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        return (x * keep.unsqueeze(-1)).amin(1)  # HERE


class MeanDecides(Marked):
    """The threshold of the second decision is a mean over all rows."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        score = x.norm(dim=-1)
        limit = score.mean(dim=1, keepdim=True)  # HERE
        again = keep & (score > limit)
        return self.pool(ops.prune(x, again), again)


class ConstantK(Marked):
    """The two best of what is left, by position."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.decide(x)
        x = ops.prune(x, keep)
        limit = (x.norm(dim=-1) * keep).topk(2, dim=1).values[:, 1:2]  # HERE
        again = keep & (x.norm(dim=-1) >= limit)
        return self.pool(ops.prune(x, again), again)


class OtherColumn(Marked):
    """The last of two decisions drops, the first of them masks."""

    def forward(self, x: Tensor) -> Tensor:
        both = x[..., :2] > 0
        keep = both[..., -1]
        x = ops.prune(x, keep)
        return (x * both[..., 0:1]).sum(1)  # HERE


class OtherGate(Marked):
    """Behind the first of several decisions stands the rest of them; only one drops."""

    def forward(self, x: Tensor) -> Tensor:
        gates = (x > 0).float()
        keep = gates[..., DIM - 1 :].squeeze(-1) > 0.5
        x = ops.prune(x, keep)
        p = self.logits(x).masked_fill(gates[..., 0].unsqueeze(1) == 0, -1e9).softmax(-1)  # HERE
        return self.pool(p @ self.v(x), keep)


class OneIngredient(Marked):
    """What is dropped is hidden by one side of the conjunction only."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.decide(x), x[..., 0] > 0
        keep = a & b
        x = ops.prune(x, keep)
        return (x * a.unsqueeze(-1)).sum(1)  # HERE
