"""Masked models as people write them: each hides dropped tokens in its own way, and none has heard of a compiler."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS = 16, 2
HEAD = DIM // HEADS


class Attention(nn.Module):
    """Projections and heads; what hides keys is the model's own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, HEADS, HEAD).transpose(1, 2) for part in (self.q, self.k, self.v))
        return q, k, v

    def join(self, y: Tensor) -> Tensor:
        b, _, n, _ = y.shape
        return self.o(y.transpose(1, 2).reshape(b, n, DIM))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class ReceivedAttention(nn.Module):
    """LTP-like: the mean attention a token receives against a threshold; additive -1e4; post-norm; masked mean."""

    def __init__(self, depth: int = 2, threshold: float = 0.09) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(depth))
        self.mlp = nn.ModuleList(MLP() for _ in range(depth))
        self.norm1 = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.norm2 = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for attention, mlp, norm1, norm2 in zip(self.attention, self.mlp, self.norm1, self.norm2, strict=True):
            q, k, v = attention.heads(x)
            hidden = (1.0 - alive.to(x.dtype))[:, None, None, :] * -10000.0
            probs = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(HEAD) + hidden, dim=-1)
            probs = probs * alive[:, None, :, None]
            x = norm1(x + attention.join(probs @ v))
            score = probs.mean(dim=(1, 2))
            alive = alive & (score > self.threshold)
            x = norm2(x + mlp(x))
        weight = alive.unsqueeze(-1).to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class Gate(nn.Module):
    """Pre-norm with a class token; a small MLP scores patches; a float policy goes from stage to stage; -inf; the first row is read."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, DIM))
        self.attention = nn.ModuleList(Attention() for _ in range(depth))
        self.mlp = nn.ModuleList(MLP() for _ in range(depth))
        self.norm1 = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.norm2 = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.gate = nn.ModuleList(nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, 1)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = torch.cat([self.cls.expand(b, -1, -1), x], dim=1)
        first = torch.zeros(x.shape[1], device=x.device)
        first[0] = 1.0
        policy = torch.ones(b, x.shape[1], 1, device=x.device)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            if i % 2 == 1:
                decision = (self.gate[i](x) > 0).to(x.dtype)
                decision = torch.maximum(decision, first[None, :, None])
                policy = policy * decision
            q, k, v = attention.heads(self.norm1[i](x))
            logits = (q @ k.transpose(-2, -1)) * HEAD**-0.5
            logits = logits.masked_fill(policy.squeeze(-1)[:, None, None, :] == 0, float("-inf"))
            x = x + attention.join(logits.softmax(-1) @ v)
            x = x + mlp(self.norm2[i](x))
        return x[:, 0]


class Flash(nn.Module):
    """Scores are norms; a boolean mask goes into scaled_dot_product_attention; masked max pooling."""

    def __init__(self, depth: int = 2, least: float = 3.6) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(depth))
        self.mlp = nn.ModuleList(MLP() for _ in range(depth))
        self.norm = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for attention, mlp, norm in zip(self.attention, self.mlp, self.norm, strict=True):
            q, k, v = attention.heads(norm(x))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
            x = x + attention.join(torch.nan_to_num(y)) * keep.unsqueeze(-1)
            x = x + mlp(x)
            big = x.norm(dim=-1) >= self.least
            big[:, 0] = True
            keep = torch.logical_and(keep, big)
        return x.masked_fill(~keep.unsqueeze(-1), float("-inf")).amax(dim=1)


class Dead(nn.Module):
    """Keeps a mask of the *dropped*, grown by `|`; a position bias [H, N, N]; masks by where; attention pooling at the end."""

    def __init__(self, depth: int = 2, longest: int = 40) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(depth))
        self.mlp = nn.ModuleList(MLP() for _ in range(depth))
        self.norm = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(depth))
        self.bias = nn.Parameter(torch.randn(HEADS, longest, longest))
        self.score = nn.Linear(DIM, 1)
        self.query = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        dead = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        for attention, mlp, norm in zip(self.attention, self.mlp, self.norm, strict=True):
            q, k, v = attention.heads(x)
            logits = q @ k.mT * HEAD**-0.5 + self.bias[:, :n, :n]
            logits = torch.where(dead[:, None, None, :], torch.finfo(logits.dtype).min, logits)
            x = norm(x + attention.join(logits.softmax(-1) @ v))
            x = x + mlp(x)
            low = torch.sigmoid(self.score(x)).squeeze(-1) < 0.45
            low = low & (torch.arange(n, device=x.device) > 0)
            dead = dead | low
        pool = self.query(x).masked_fill(dead.unsqueeze(-1), -1e9).softmax(dim=1)
        return (pool * x).sum(dim=1)
