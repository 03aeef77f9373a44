"""Masked models over patches, and readers of a pruned memory: registers, policies, position biases, a fixed number of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS = 16, 4
HEAD = DIM // HEADS


class Attend(nn.Module):
    """One matrix for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)

    def split(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)

    def merge(self, y: Tensor) -> Tensor:
        return self.proj(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], DIM))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attend()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.SiLU(), nn.Linear(2 * DIM, DIM))


class Vision(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.cls = nn.Parameter(torch.randn(1, 1, DIM))

    def body(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]


class Registers(Vision):
    """A class token and three registers stand in front and always live; a boolean mask goes into fused attention; two rows are read."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.registers = nn.Parameter(torch.randn(1, 3, DIM))
        self.gate = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = torch.cat([self.cls.expand(b, -1, -1), self.registers.expand(b, -1, -1), x], dim=1)
        prefix = torch.arange(x.shape[1], device=x.device) < 4
        keep = torch.ones(b, x.shape[1], dtype=torch.bool, device=x.device)
        for layer in self.body():
            keep = keep & (prefix | (self.gate(x)[..., 0] > 0))
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
            x = x + layer.attn.merge(y)
            x = x + layer.mlp(layer.norm2(x))
        return x[:, 0] + x[:, 1]


class JoinedMask(Vision):
    """The decision is made for patches only; ones for the class token are laid in front of it."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.gate = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = torch.cat([self.cls.expand(b, -1, -1), x], dim=1)
        policy = torch.ones(b, x.shape[1], 1, device=x.device)
        for layer in self.body():
            hard = (torch.sigmoid(self.gate(x[:, 1:])) > 0.5).to(x.dtype)
            policy = policy * torch.cat([torch.ones(b, 1, 1, device=x.device), hard], dim=1)
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            logits = (q @ k.mT) * HEAD**-0.5 + torch.where(policy > 0, 0.0, -1e9).mT[:, None]
            x = x + layer.attn.merge(logits.softmax(-1) @ v)
            x = x + layer.mlp(layer.norm2(x))
        return x[:, 0]


class Policy(Vision):
    """softmax with a policy and without eps: exponentials times the mask, over their sum; the largest logit is subtracted first."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.gate = nn.Linear(DIM, 2)

    def attention(self, logits: Tensor, policy: Tensor) -> Tensor:
        logits = logits - logits.max(dim=-1, keepdim=True).values
        weights = logits.exp() * policy.mT[:, None]
        return weights / weights.sum(dim=-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        first = (torch.arange(x.shape[1], device=x.device) == 0).to(x.dtype)[None, :, None]
        policy = torch.ones(x.shape[0], x.shape[1], 1, device=x.device)
        for layer in self.body():
            hard = (self.gate(x).argmax(dim=-1, keepdim=True) == 0).to(x.dtype)
            policy = policy * torch.maximum(hard, first)
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            x = x + layer.attn.merge(self.attention(q @ k.mT * HEAD**-0.5, policy) @ v)
            x = x + layer.mlp(layer.norm2(x))
        return x[:, 0]


class HardGate(Vision):
    """Two gates per token; the first column of the hard decisions is the policy."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.gate = nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        first = (torch.arange(x.shape[1], device=x.device) == 0).to(x.dtype)[None, :, None]
        policy = torch.ones(x.shape[0], x.shape[1], 1, device=x.device)
        for layer in self.body():
            score = self.gate(x).softmax(-1)
            hard = (score > 0.5).to(x.dtype)[..., 0:1]
            policy = policy * (hard + first - hard * first)
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            logits = (q @ k.mT * HEAD**-0.5).masked_fill((policy < 0.5).mT[:, None], -1e4)
            x = x + layer.attn.merge(logits.softmax(-1) @ v)
            x = x + layer.mlp(layer.norm2(x))
        return x[:, 0]


class Fixed(Vision):
    """An image of 16 patches, so that tokens are as many as channels; the mask is written out N times; masked mean over patches."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.patch = nn.Conv2d(3, DIM, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 16, DIM))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.place
        keep = torch.ones(x.shape[0], 16, device=x.device)
        for layer in self.body():
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            rows = keep.unsqueeze(1).repeat(1, 16, 1).unsqueeze(1).expand(-1, HEADS, -1, -1)
            p = (q @ k.mT * HEAD**-0.5).masked_fill(rows < 0.5, -1e4).softmax(-1) * keep[:, None, :, None]
            x = x + layer.attn.merge(p @ v)
            x = (x + layer.mlp(layer.norm2(x))) * keep.unsqueeze(-1)
            keep = keep * (p.mean((1, 2)) > 0.045).to(x.dtype)
        return (x * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)


class Thresholds(Vision):
    """A learned threshold per layer on the attention that the class token pays; masks multiply states and hide keys with -inf."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.limits = nn.ParameterList(nn.Parameter(torch.tensor(0.04)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        first = torch.arange(x.shape[1], device=x.device) == 0
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for layer, limit in zip(self.body(), self.limits, strict=True):
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            p = (q @ k.mT * HEAD**-0.5).masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1)
            x = x + layer.attn.merge(p @ v)
            x = x + layer.mlp(layer.norm2(x))
            keep = keep & ((p[:, :, 0].mean(1) >= limit) | first)
            x = x * keep.unsqueeze(-1)
        return x[:, 0]


class Distance(Vision):
    """A penalty on distance between positions, from `arange`; the score is a mean of states; masked mean with the count of the living."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        far = (place[None, :] - place[:, None]).abs().clamp(max=8) * -0.2
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for layer in self.body():
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            logits = (q @ k.mT * HEAD**-0.5 + far).masked_fill(keep[:, None, None, :].logical_not(), -1e4)
            x = x + layer.attn.merge(logits.softmax(-1) @ v) * keep.unsqueeze(-1)
            x = x + layer.mlp(layer.norm2(x))
            keep = keep & (x.mean(-1) > -0.1)
        pooled = (x * keep.unsqueeze(-1)).sum(1)
        return pooled / keep.sum(1, keepdim=True).clamp(min=1)


class Memory(Vision):
    """Learned queries read a memory whose tokens fall by a gate; the queries are never pruned."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.queries = nn.Parameter(torch.randn(1, 5, DIM))
        self.gate = nn.Linear(DIM, 1)
        self.read, self.key, self.value = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.cat([torch.ones_like(x[:, :1, 0]), (self.gate(x[:, 1:]).squeeze(-1) > 0).to(x.dtype)], dim=1)
        for layer in self.body():
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            p = (q @ k.mT * HEAD**-0.5 + (1 - keep)[:, None, None, :] * -1e4).softmax(-1)
            x = x + layer.attn.merge(p @ v)
            x = x + layer.mlp(layer.norm2(x))
        logits = self.read(self.queries) @ self.key(x).mT / 4 + (1 - keep).unsqueeze(1) * -1e9
        return logits.softmax(-1) @ self.value(x)


class Columns(Vision):
    """Attention over all keys, then columns of dropped keys set to zero and the rest scaled to sum to one."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        first = torch.arange(x.shape[1], device=x.device) == 0
        keep = first | (x.norm(dim=-1) > 3.5)
        for layer in self.body():
            q, k, v = layer.attn.split(layer.norm1(x)).unbind(0)
            p = (q @ k.mT * HEAD**-0.5).softmax(-1) * keep[:, None, None, :]
            x = x + layer.attn.merge(p / p.sum(-1, keepdim=True) @ v)
            x = x + layer.mlp(layer.norm2(x))
        return x[:, 0]
