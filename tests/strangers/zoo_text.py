"""Masked models over word vectors: padding masks, rotary positions, hand-written norms, states that stay where a token stopped."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS = 16, 2
HEAD = DIM // HEADS


class Block(nn.Module):
    """The parts of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(b, n, HEADS, HEAD).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    """Layers that call each other by index."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"block{i}", Block())
        self.depth = depth

    def blocks(self) -> list[Block]:
        return [block for block in self.children() if isinstance(block, Block)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Rotary(Stack):
    """RoPE, pre-norm, a padding mask of whole numbers; the keep mask is an int; the norm of a state decides; finfo.min; masked mean."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        n = x.shape[1]
        inv = 1.0 / (100 ** (torch.arange(0, HEAD, 2, device=x.device) / HEAD))
        angle = torch.arange(n, device=x.device)[:, None] * inv[None, :]
        cos, sin = (torch.cat([f(angle), f(angle)], dim=-1) for f in (torch.cos, torch.sin))
        keep = attention_mask
        first = (torch.arange(n, device=x.device) == 0).long()
        for block in self.blocks():
            q, k, v = block.split(block.norm1(x))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            hidden = (1 - keep[:, None, None, :]).to(x.dtype) * torch.finfo(x.dtype).min
            p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HEAD) + hidden, dim=-1)
            x = x + block.merge(p @ v)
            x = x + block.mlp(block.norm2(x))
            decision = torch.maximum((x.norm(dim=-1) > 6.0).long(), first)
            keep = keep * decision
        weight = keep.unsqueeze(-1).to(x.dtype)
        return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)


class Assigned(Stack):
    """LTP as people write it: an additive mask changed by assignment, a learned threshold, a branch on it; the first row is read."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.threshold = nn.Parameter(torch.tensor(0.08), requires_grad=False)

    def prune(self, mask: Tensor, probs: Tensor) -> Tensor:
        if self.threshold == 0:
            return mask
        score = probs.mean(dim=1).mean(dim=1)
        score[:, 0] = 1.0
        mask = mask.clone()
        mask[score < self.threshold] = -10000.0
        return mask

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], x.shape[1], device=x.device)
        for block in self.blocks():
            q, k, v = block.split(x)
            probs = (q @ k.mT * HEAD**-0.5 + mask[:, None, None, :]).softmax(dim=-1)
            x = block.norm1(x + block.merge(probs @ v))
            x = block.norm2(x + block.mlp(x))
            mask = self.prune(mask, probs)
        return x[:, 0]


class Where(Stack):
    """The additive mask itself is accumulated by `where`; a linear gate, `le`; attention pooling under the same mask."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.gate, self.query = nn.Linear(DIM, 1), nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], device=x.device)
        inner = torch.arange(x.shape[1], device=x.device) > 0
        for block in self.blocks():
            q, k, v = block.split(x)
            logits = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(HEAD)
            probs = F.softmax(logits + mask[:, None, None], dim=-1)
            x = block.norm1(x + block.merge(torch.einsum("bhij,bhjd->bhid", probs, v)))
            x = block.norm2(x + block.mlp(x))
            low = (self.gate(x).squeeze(-1) <= 0.1) & inner
            mask = torch.where(low, torch.full_like(mask, -1e9), mask)
        return ((self.query(x).squeeze(-1) + mask).softmax(dim=-1).unsqueeze(1) @ x).squeeze(1)


class Skim(Stack):
    """Argmax of two logits from a small predictor; token-level output: a token that stops keeps its last state."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.predict = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        skim = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        first = torch.arange(x.shape[1], device=x.device) == 0
        for block in self.blocks():
            skim = skim & ((self.predict(x).argmax(dim=-1) == 1) | first)
            q, k, v = block.split(block.norm1(x))
            p = (q @ k.mT * HEAD**-0.5).masked_fill(~skim[:, None, None, :], -1e9).softmax(-1)
            new = x + block.merge(p @ v)
            new = new + block.mlp(block.norm2(new))
            x = torch.where(skim.unsqueeze(-1), new, x)
        return x


class Zeroed(Stack):
    """Token-level output, zeros where a token was dropped; decisions by `ge` on the largest channel, accumulated by `minimum`."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[0], x.shape[1], 1, device=x.device)
        first = F.one_hot(torch.zeros(1, dtype=torch.long, device=x.device), 1).to(x.dtype)
        for block in self.blocks():
            q, k, v = block.split(block.norm1(x))
            p = (q @ k.mT * HEAD**-0.5 + (1.0 - keep.mT.unsqueeze(1)) * -1e4).softmax(-1)
            x = x + block.merge(p @ v) * keep
            x = x + block.mlp(block.norm2(x)) * keep
            big = (x.amax(dim=-1, keepdim=True) >= 1.2).to(x.dtype)
            big = torch.cat([first.expand(x.shape[0], 1, 1), big[:, 1:]], dim=1)
            keep = torch.minimum(keep, big)
            x = x * keep
        return x


class HandNorm(Stack):
    """Post-norm by mean, pow and sqrt; a boolean mask by assignment on the probabilities; the entropy-like score is an exponential."""

    def norm(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        var = (x - mean).pow(2).mean(dim=-1, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        dead = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        for block in self.blocks():
            q, k, v = block.split(x)
            gone = dead[:, None, None, :].expand(-1, HEADS, x.shape[1], -1)
            logits = (q @ k.mT * HEAD**-0.5).masked_fill(gone, float("-inf"))
            probs = logits.softmax(-1)
            probs = probs.clone()
            probs[gone] = 0.0
            x = self.norm(x + block.merge(probs @ v))
            x = self.norm(x + block.mlp(x))
            score = torch.exp(-x[..., 0].abs())
            score[:, 0] = 1.0
            dead = torch.logical_or(dead, score < 0.4)
        return x.masked_fill(dead.unsqueeze(-1), -1e9).max(dim=1).values


class Average(Stack):
    """The threshold is a share of the living tokens' mean score (PoWER-like); probabilities of dropped keys and queries are zero."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[:2], device=x.device)
        for block in self.blocks():
            q, k, v = block.split(x)
            seen = keep[:, None, :, None] * keep[:, None, None, :]
            p = (q @ k.mT * HEAD**-0.5 - 10000.0 * (1.0 - keep)[:, None, None, :]).softmax(-1) * seen
            x = block.norm1(x + block.merge(p @ v))
            x = block.norm2(x + block.mlp(x))
            score = p.sum(dim=(1, 2))
            mean = score.sum(dim=-1, keepdim=True) / keep.sum(dim=-1, keepdim=True).clamp(min=1.0)
            keep = keep * (score > 0.8 * mean).float()
        pooled = torch.bmm(keep.unsqueeze(1), x).squeeze(1)
        return pooled / keep.sum(dim=1, keepdim=True).clamp(min=1.0)


class Rounded(Stack):
    """A hard sigmoid by rounding is the keep mask, as a float."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.gate = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[:2], device=x.device)
        first = (torch.arange(x.shape[1], device=x.device) == 0).float()
        for block in self.blocks():
            q, k, v = block.split(block.norm1(x))
            p = (q @ k.mT * HEAD**-0.5).masked_fill(keep[:, None, None, :] == 0, -1e9).softmax(-1)
            x = x + block.merge(p @ v)
            x = x + block.mlp(block.norm2(x))
            keep = keep * torch.maximum(torch.round(torch.sigmoid(self.gate(x).squeeze(-1))), first)
        return x[:, 0]


class Signed(Stack):
    """The sign of what a gate lets through, 0 or 1, multiplies states and hides keys."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.gate = nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[0], x.shape[1], 1, device=x.device)
        for block in self.blocks():
            step = torch.sign(torch.relu(self.gate(x)))
            keep = keep * step
            q, k, v = block.split(block.norm1(x))
            bias = torch.log(keep.clamp(min=1e-30)).mT.unsqueeze(1)
            p = (q @ k.mT * HEAD**-0.5 + 1e3 * bias).softmax(-1) * keep.unsqueeze(1)
            x = x + block.merge(p @ v) * keep
            x = x + block.mlp(block.norm2(x)) * keep
        return (x * keep).sum(dim=1) / (keep.sum(dim=1) + 1e-6)
