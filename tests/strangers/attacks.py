"""Programs of a hostile review: each once made the compiler accept what gives another number. What it accepts must be equal."""

import torch
from torch import Tensor, nn

from tpcompile import ops


class Attack(nn.Module):
    """Projections of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def logits(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT / 3


class PrefixBool(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        g = torch.cat([torch.ones(1, 2, dtype=torch.bool), self.q(x)[:, 2:, 0] > 0], 1)
        h = torch.cat([torch.ones(1, 2, dtype=torch.bool), self.q(x)[:, 2:, 1] > 0], 1)
        m = (g + h).float()
        x = ops.prune(x, keep)
        return (x * keep[..., None] * m[..., None]).sum(1)


class PrefixInt(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        i = (x[:, :, 0].abs() * 1e7).long()
        i = torch.cat([torch.zeros(1, 2, dtype=torch.long), i[:, 2:]], 1)
        m = ((i * 1000003) % 17).float()
        x = ops.prune(x, keep)
        return (x * keep[..., None] * m[..., None]).sum(1)


class SubAlpha(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = torch.arange(x.shape[1])
        d = torch.sub(p[:, None], p[None], alpha=2)
        ok = (d >= 0)[None] & keep[:, None]
        a = torch.where(ok, self.logits(x), -1e4).softmax(-1)
        y = a @ self.v(x)
        return (y * keep[..., None]).sum(1)


class PlaceBool(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = torch.arange(x.shape[1]).bool()
        eye = p[:, None] == p[None]
        a = torch.where(eye[None] | keep[:, None], self.logits(x), float("-inf")).softmax(-1)
        y = a @ self.v(x)
        return (y * keep[..., None]).sum(1)


class PlaceCast(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = torch.arange(x.shape[1]).to(torch.bfloat16)
        eye = p[:, None] == p[None]
        a = torch.where(eye[None] | keep[:, None], self.logits(x), float("-inf")).softmax(-1)
        y = a @ self.v(x)
        return (y * keep[..., None]).sum(1)


class Rank(Attack):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        g = (self.q.weight[:4, :].abs() > 0.1).float()[None] * (self.t.abs() > 0.01).float()[None]
        s = self.t.softmax(-1)
        w = s * g
        w = w / w.sum(1, keepdim=True)
        return (x * keep[..., None]).sum(1) @ w[0].mT


class ExpandUp(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) == 0)
        x = ops.prune(x, keep)
        score = torch.tanh(self.logits(x))
        e = torch.exp(score) * keep[:, None].float()
        t = e.sum(-1, keepdim=True)
        w = e / t.expand(3, -1, -1)
        y = (w.sum(0, keepdim=True)) @ self.v(x)
        return (y * keep[..., None]).sum(1)


class SumInt2(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) == 0)
        x = ops.prune(x, keep)
        score = torch.tanh(self.logits(x))
        e = torch.exp(score + 1.5) * keep[:, None].float()
        w = e / (e.sum(-1, keepdim=True, dtype=torch.int64))
        y = w @ self.v(x)
        return (y * keep[..., None]).sum(1)


class NegZero(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        h = -1 - torch.sigmoid(x[..., 0])
        m = torch.neg(torch.ones(1, 1) / (h * keep))
        return m.amax(1, keepdim=True).atan()


class Int64(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        z = ((~keep).long() + 2**60) - 2**60
        return (x * z[..., None]).sum(1) + (x * keep[..., None]).sum(1)


class Low3(Attack):
    def forward(self, x: Tensor, k1: Tensor, k2: Tensor, k3: Tensor, flag: Tensor) -> Tensor:
        k2 = k2 & k1
        k3 = k3 & k2
        x = ops.prune(x, k1)
        b = torch.where(k3, 0.0, torch.where(k2, -900.0, torch.where(k1, torch.where(flag, -1e9, -1500.0), -1e9)))
        y = (self.logits(x) + b[:, None]).softmax(-1) @ self.v(x)
        o = (y * k1[..., None]).sum(1)
        z = ops.prune(y, k2)
        z = ops.prune(z * 2, k3)
        return o + (z * k3[..., None]).sum(1)


class Cse(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        k8 = keep.to(torch.uint8)
        a = k8 * 1
        b = k8 * 1.0
        x = ops.prune(x, keep)
        return (x * (keep[..., None])).sum(1) + a.sum() + (b - 2).sum()


class PrefixEmb(Attack):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(5, 8)
        self.c = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        ids = (x[:, :, 0].sigmoid() * 5).long().clamp(0, 4)
        ids = torch.where(torch.arange(ids.shape[1]) == 0, -100, ids)
        e = torch.cat([self.c, self.e(ids[:, 1:])], 1)
        x = ops.prune(x + e, keep)
        return (x * keep[..., None]).sum(1)


class DiagDoubt(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = (self.logits(x) + (~keep)[:, None] * -1e4).softmax(-1)
        d = p.transpose(1, 2).diagonal(dim1=1, dim2=2)
        return d.sum(1, keepdim=True)


class SizeSign(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) == 0)
        x = ops.prune(x, keep)
        y = torch.relu(x) * (3 - x.shape[1]) - 0.0
        return (y * keep[..., None]).amax(1)


class SizeSign2(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) == 0)
        x = ops.prune(x, keep)
        y = torch.sigmoid(x) + (2 - x.shape[1])
        return (y * keep[..., None]).amax(1)


class AnyU8(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        a = (x > 5).to(torch.uint8).any(-1)
        a = (~a).float()
        x = ops.prune(x, keep)
        return (x * keep[..., None] * a[..., None]).sum(1)


class Lerp(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) == 0)
        x = ops.prune(x, keep)
        score = self.logits(x)
        score = torch.lerp(torch.full_like(score, -1e8), score, keep[:, None].float())
        y = score.softmax(-1) @ self.v(x)
        return (y * keep[..., None]).sum(1)


class EitherU8(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        k = keep.to(torch.uint8)
        e = (x[..., 0] > 0).to(torch.uint8)
        m = k + (1.0 - k) * e
        x = ops.prune(x, keep)
        return (x * keep[..., None] * (m - 2)[..., None]).sum(1)


class VarCorr(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = x + torch.var(x, dim=1, correction=3, keepdim=True).nan_to_num(posinf=3.0)
        x = ops.prune(x, keep)
        return (x * keep[..., None]).sum(1)


class FullDtype(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        z = torch.full((1, 1, 1), -5000.0, dtype=torch.bool)
        y = torch.where(keep[:, None], self.logits(x), z).softmax(-1) @ self.v(x)
        return (y * keep[..., None]).sum(1)


class Mutual(Attack):
    """mutual attention p * p^T."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = (self.logits(x) + (~keep)[:, None] * -1e4).softmax(-1)
        return (p * p.transpose(1, 2)).sum((1, 2))[:, None]


class MulInf(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        d = (keep.float() * float("inf")) < 0.5
        y = self.logits(x).masked_fill(d[:, None], -1e9).softmax(-1) @ self.v(x)
        return (y * keep[..., None]).sum(1)


class LogScore2(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        s = torch.log(torch.relu(self.q(x)[..., 0]))
        k = s > -5.0
        x = ops.prune(x, k)
        z = (s * k.float()) < 0.5
        y = self.logits(x).masked_fill((z & ~k)[:, None], -1e9).softmax(-1) @ self.v(x)
        return (y * k[..., None]).sum(1)


class PosAdd3(Attack):
    """revive: claimed >= 1, so > .5."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        one = torch.sigmoid(x[..., 0]) + (x.shape[1] - 8)
        big = one > 0.5
        y = self.logits(x).masked_fill((~keep & big)[:, None], -1e9).softmax(-1) @ self.v(x)
        return (y * keep[..., None]).sum(1)


class ExpUnshifted(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(x.shape[1]) == 0)
        x = ops.prune(x, keep)
        e = torch.exp(self.logits(x)) * keep[:, None].float()
        y = (e / e.sum(-1, keepdim=True)) @ self.v(x)
        return (y * keep[..., None]).sum(1)


class KeyZeroCmp(Attack):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        p = (self.logits(x) + (~keep)[:, None] * -1e4).softmax(-1)
        m = (p > 0).transpose(1, 2) & (p > 0)
        return m.float().sum((1, 2))[:, None]
