"""Models whose masks do not hide what they drop; ``HERE`` marks the line at which that shows. None has heard of a compiler."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM = 16


class Unsound(nn.Module):
    """A decision, and a layer row by row; what comes behind it is not sound."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(DIM, DIM), nn.Linear(DIM, 1)

    def decide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = (self.gate(x).squeeze(-1) > 0) | (torch.arange(x.shape[1], device=x.device) == 0)
        return F.gelu(self.up(x)) * keep.unsqueeze(-1) + x, keep

    def pool(self, x: Tensor, keep: Tensor) -> Tensor:
        return (x * keep.unsqueeze(-1)).sum(1)


class MeanOfAll(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.decide(x)
        return x.mean(1)  # HERE


class LargestOfZeroed(Unsound):
    """Every living value may be negative: then the zeros win."""

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        return (x * keep.unsqueeze(-1)).amax(1)  # HERE


class PoolForgets(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        weights = self.gate(x).softmax(1)  # HERE
        return (weights * x * keep.unsqueeze(-1)).sum(1)


class Neighbours(Unsound):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = self.conv((x * keep.unsqueeze(-1)).mT).mT  # HERE
        return self.pool(x, keep)


class Running(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = (x * keep.unsqueeze(-1)).cumsum(1)  # HERE
        return x.square().sum(1)


class RawRows(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.decide(x)
        return F.gelu(x)  # HERE


class LastRow(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.decide(x)
        return x[:, -1]  # HERE


class SecondRow(Unsound):
    """A step of two: positions 0, 2, 4, ..."""

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = (x * keep.unsqueeze(-1))[:, ::2]  # HERE
        return x.sum(1)


class BestIndex(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        return x.sum(-1).masked_fill(~keep, -1e9).argmax(1)  # HERE


class Sorted(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        ordered = (x * keep.unsqueeze(-1)).sort(dim=1).values  # HERE
        return ordered.square().sum(1)


class Spread(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        return (x * keep.unsqueeze(-1)).var(1)  # HERE


class Grouped(Unsound):
    """Channels are normalised with all tokens of their group."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = self.norm((x * keep.unsqueeze(-1)).mT).mT  # HERE
        return self.pool(x, keep)


class NormOverTokens(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = F.layer_norm((x * keep.unsqueeze(-1)).mT, (x.shape[1],)).mT  # HERE
        return self.pool(x, keep)


class BatchStatistics(Unsound):
    """Without running statistics the norm takes those of the tokens it sees, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = self.norm((x * keep.unsqueeze(-1)).mT).mT  # HERE
        return self.pool(x, keep)


class BestThree(Unsound):
    """The three tokens with the highest scores; fewer may live."""

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        score = x.sum(-1).masked_fill(~keep, -1e9)
        best = score.topk(3, dim=1).indices  # HERE
        return x.gather(1, best.unsqueeze(-1).expand(-1, -1, DIM)).sum(1)


class Counted(Unsound):
    """How many rows there are, as a number."""

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        count = torch.ones_like(x[..., 0]).sum(1, keepdim=True)  # HERE
        return self.pool(x, keep) / count


class Mirrored(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = x + x.flip(1)  # HERE
        return self.pool(x, keep)


class Shifted(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = x + x.roll(1, 1)  # HERE
        return self.pool(x, keep)


class Median(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        return (x * keep.unsqueeze(-1)).median(1).values  # HERE


class Halves(Unsound):
    """Neighbours are summed in pairs: where a pair begins depends on what was dropped before it."""

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = F.avg_pool1d((x * keep.unsqueeze(-1)).mT, 2, 1).mT  # HERE
        return x.square().sum(1)


class InHelper(Unsound):
    """The operation stands in a method that forward calls."""

    def average(self, rows: Tensor) -> Tensor:
        return rows.mean(1)  # HERE

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.decide(x)
        return self.average(x)


class Gumbel(Unsound):
    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        noise = -torch.log(-torch.log(torch.rand_like(x[..., :1])))  # HERE
        return self.pool(x + noise, keep)


class Dropped(Unsound):
    """Dropout that does not ask for the mode."""

    def forward(self, x: Tensor) -> Tensor:
        x, keep = self.decide(x)
        x = F.dropout(x, 0.1, training=True)  # HERE
        return self.pool(x, keep)


class OtherGate(Unsound):
    """Two gates per token: the second drops rows, the first is what pools."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.two(x) > 0
        dead = ~gates[..., -1]
        x = self.up(x.masked_fill(dead.unsqueeze(-1), 0.0))
        return (torch.tanh(x) * gates[..., 0:1]).sum(1)  # HERE
