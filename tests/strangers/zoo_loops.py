"""Masks under which a token always sees itself, or only what stands before it: policies with self loops, causal attention, windows."""

import math

import torch
from torch import Tensor, nn

DIM, HEADS = 16, 2
HEAD = DIM // HEADS


class Layer(nn.Module):
    """A pre-norm layer whose attention weights are the model's affair."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        return (q @ k.transpose(-2, -1)) / math.sqrt(HEAD), v

    def behind(self, x: Tensor, y: Tensor) -> Tensor:
        b, _, n, _ = y.shape
        x = x + self.out(y.transpose(1, 2).reshape(b, n, DIM))
        return x + self.mlp(self.norm2(x))


class Looped(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.gate = nn.Linear(DIM, 1)

    def body(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def pool(self, x: Tensor, keep: Tensor) -> Tensor:
        weight = keep.to(x.dtype).unsqueeze(-1)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class SelfLoop(Looped):
    """DynamicViT's policy without eps: exponentials times the policy, to which an identity matrix is added; nothing is pinned."""

    def weights(self, logits: Tensor, policy: Tensor) -> Tensor:
        n = logits.shape[-1]
        seen = policy.reshape(policy.shape[0], 1, 1, n)
        eye = torch.eye(n, dtype=seen.dtype, device=seen.device).view(1, 1, n, n)
        seen = seen + (1.0 - seen) * eye
        top = torch.max(logits, dim=-1, keepdim=True)[0]
        weights = torch.exp(logits - top) * seen
        return weights / weights.sum(dim=-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        policy = torch.ones(x.shape[0], x.shape[1], 1, device=x.device)
        for layer in self.body():
            policy = policy * (self.gate(x) > 0).to(x.dtype)
            logits, v = layer.logits(x)
            x = layer.behind(x, self.weights(logits, policy) @ v)
        return self.pool(x, policy.squeeze(-1) > 0)


class SelfKey(Looped):
    """A boolean mask with the diagonal always open, -inf elsewhere; a masked mean."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        for layer in self.body():
            keep = keep & (self.gate(x).squeeze(-1) > 0)
            logits, v = layer.logits(x)
            open_ = keep[:, None, None, :] | own
            x = layer.behind(x, logits.masked_fill(~open_, float("-inf")).softmax(-1) @ v)
        return self.pool(x, keep)


class Causal(Looped):
    """Each token sees the living before it; the first always lives and is read."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        before = place[None, :] <= place[:, None]
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for layer in self.body():
            keep = keep & ((self.gate(x).squeeze(-1) > 0) | (place == 0))
            logits, v = layer.logits(x)
            x = layer.behind(x, logits.masked_fill(~(before & keep[:, None, None, :]), float("-inf")).softmax(-1) @ v)
        return self.pool(x, keep)


class Window(Looped):
    """Each token sees the living near it, and itself; additive -1e4; states of the dropped are set to zero; the living are averaged."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        near = (place[None, :] - place[:, None]).abs() <= 3
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for layer in self.body():
            keep = keep & (self.gate(x).squeeze(-1) > 0)
            logits, v = layer.logits(x)
            hidden = torch.where(near & keep[:, None, None, :], 0.0, -1e4)
            y = (logits + hidden).softmax(-1) * keep[:, None, :, None]
            x = layer.behind(x, y @ v) * keep.unsqueeze(-1)
        return self.pool(x, keep)
