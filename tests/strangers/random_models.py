"""Small transformers put together at random from the ways people hide tokens."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from random_masks import Masks
from random_recipes import BEFORE, BEHIND, LONGEST, MIDDLE, PADDING, Recipe
from torch import Tensor, nn

from tpcompile import ops


@dataclass
class Run:
    """One run in eager: outputs, and per site the decision and how far the closest score is from falling on the other side."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    keep: list[Tensor] = field(default_factory=list)
    score: list[Tensor | None] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)


class Norm(nn.Module):
    """A norm over channels, from the library or by hand."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.module = kind, nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "module":
            return self.module(x)
        if self.kind == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.module.weight
        mean = x.mean(dim=-1, keepdim=True)
        var = (x - mean).pow(2).mean(dim=-1, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.module.weight + self.module.bias


class Block(nn.Module):
    """The parts of a layer."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        c, h = recipe.width, recipe.heads
        self.recipe, self.masks, self.last = recipe, Masks(recipe), False
        self.qkv = nn.ModuleList([nn.Linear(c, 3 * c)] if recipe.qkv == "fused" else [nn.Linear(c, c) for _ in range(3)])
        self.out, self.up, self.down = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.norm1, self.norm2 = Norm(c, recipe.kind), Norm(c, recipe.kind)
        self.bias = nn.Parameter(torch.randn(h, LONGEST + 4, LONGEST + 4)) if recipe.position == "bias" else None
        self.table = nn.Parameter(torch.randn(1, LONGEST + 4, c)) if recipe.position == "table" else None
        self.near = nn.Embedding(9, h) if recipe.position == "buckets" else None
        self.register_buffer("inverse", 100.0 ** (-torch.arange(c // h // 2) / (c // h // 2)))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values ``[B, H, N, C / H]``."""
        b, n, c = x.shape
        h = self.recipe.heads
        if self.recipe.qkv == "fused" and self.recipe.spelling % 2:
            q, k, v = self.qkv[0](x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        parts = self.qkv[0](x).chunk(3, dim=-1) if self.recipe.qkv == "fused" else [part(x) for part in self.qkv]
        q, k, v = (part.view(b, n, h, c // h).transpose(1, 2) for part in parts)
        return q, k, v

    def attend(self, x: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        """What attention adds ``[B, N, C]``, and the probabilities ``[B, H, N, N]`` where there are any."""
        if self.table is not None:
            x = x + self.table[:, : x.shape[1]]
        q, k, v = self.split(x)
        if self.recipe.position == "rotary":
            q, k = self.rotated(q), self.rotated(k)
        y, probs = self._fused(q, k, v, mask) if self.recipe.attention.startswith("sdpa") else self._plain(q, k, v, mask)
        alive = self.masks.alive(mask)
        if self.recipe.hide == "attended":
            y = y * self.masks.weight(mask)[:, None, :, None]
        elif self.recipe.hide == "where":
            y = torch.where(alive[:, None, :, None], y, 0.0)
        elif self.recipe.hide == "filled":
            y = y.masked_fill(~alive[:, None, :, None], 0.0)
        b, n, c = x.shape
        return self.out(self.masks.pick(lambda: y.transpose(1, 2).reshape(b, n, c), lambda: y.transpose(1, 2).flatten(2))), probs

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, None]:
        if self.recipe.attention == "sdpa_bool":
            hidden = self.masks.alive(mask)[:, None, None, :]
            hidden = hidden if self.recipe.structure == "none" else self.seen(hidden)
        else:
            hidden = self.masks.added(mask)[:, None, None, :]
            hidden = self.biased(hidden)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden), None

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        scale = q.shape[-1] ** -0.5
        logits = self.masks.pick(
            lambda: q @ k.transpose(-1, -2), lambda: torch.einsum("bhid,bhjd->bhij", q, k), lambda: torch.matmul(q, k.mT)
        )
        first = self.recipe.scale == "first"
        logits = logits * scale if first else logits
        logits = self.biased(logits)
        probs = self.weights(logits, mask, 1.0 if first else scale)
        if self.recipe.hide == "probs":
            probs = probs * self.masks.weight(mask)[:, None, :, None]
        return self.masks.pick(lambda: probs @ v, lambda: torch.einsum("bhij,bhjd->bhid", probs, v)), probs

    def weights(self, logits: Tensor, mask: Any, scale: float) -> Tensor:
        """Attention over living keys, as the recipe writes it."""
        low, r = self.masks.low, self.recipe
        alive, weight = self.masks.alive(mask)[:, None, None, :], self.masks.weight(mask)[:, None, None, :]
        if r.structure != "none":
            alive = self.seen(alive)
            weight = alive.float()
        if r.attention == "policy":
            return self.policy(logits * scale, weight)
        if r.attention == "renormed":
            probs = (logits * scale).softmax(-1) * weight
            return probs if r.flaw == "unscaled" else probs / probs.sum(-1, keepdim=True)
        if r.attention == "where":
            return F.softmax(torch.where(alive, logits, low) * scale, dim=-1)
        if r.attention == "add":
            added = self.masks.added(mask)[:, None, None, :] if r.structure == "none" else torch.where(alive, 0.0, low)
            return ((logits + added) * scale).softmax(-1)
        probs = (self.filled(logits, alive) * scale).softmax(-1)
        return probs * weight if r.attention == "zeroed" else probs

    def filled(self, logits: Tensor, alive: Tensor) -> Tensor:
        """Logits ``[B, H, N, N]`` with the low number at dead keys ``[B, 1, 1, N]``."""
        if self.recipe.flaw == "forgets" and self.last:
            return logits
        if self.recipe.flaw == "queries":
            return logits.masked_fill(~alive.mT, self.masks.low)
        dead = ~(alive & alive.mT) if self.recipe.attention == "outer" else ~alive
        return logits.masked_fill(dead, self.masks.low)

    def policy(self, logits: Tensor, weight: Tensor) -> Tensor:
        """Exponentials times the mask, over their sum."""
        exps = (logits - logits.max(dim=-1, keepdim=True).values).exp() * weight
        if self.recipe.flaw == "eps":
            return (exps + 1e-6 / logits.shape[-1]) / (exps.sum(-1, keepdim=True) + 1e-6)
        return exps / exps.sum(-1, keepdim=True)

    def seen(self, alive: Tensor) -> Tensor:
        """Living keys ``[B, 1, 1, N]`` that each query sees: those before it, those near it, or all and itself."""
        place = torch.arange(alive.shape[-1], device=alive.device)
        match self.recipe.structure:
            case "causal":
                return alive & (place[None, :] <= place[:, None])
            case "window":
                return alive & ((place[None, :] - place[:, None]).abs() <= 3)
        return alive | torch.eye(alive.shape[-1], dtype=torch.bool, device=alive.device)

    def rotated(self, x: Tensor) -> Tensor:
        """RoPE on ``[B, H, N, D]``; the frequencies are a buffer, or computed."""
        half = x.shape[3] // 2
        step = torch.arange(half, device=x.device) / half
        inverse = self.masks.pick(lambda: self.inverse, lambda: torch.exp(step * -math.log(100.0)), lambda: 1.0 / 100.0**step)
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * inverse[None, :]
        left, right = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)

    def biased(self, logits: Tensor) -> Tensor:
        """Logits, or a mask, with what depends on positions."""
        n = logits.shape[-1]
        place = torch.arange(n, device=logits.device)
        if self.bias is not None:
            return logits + self.bias[:, :n, :n]
        if self.near is not None:
            return logits + self.near((place[None, :] - place[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
        if self.recipe.position == "distance":
            return logits - 0.2 * (place[None, :] - place[:, None]).abs()
        return logits

    def feed(self, x: Tensor) -> Tensor:
        """What the feed-forward adds ``[B, N, C]``."""
        up = self.up(x)
        return self.down(self.masks.pick(lambda: F.gelu(up), lambda: F.relu(up), lambda: F.silu(up), lambda: torch.tanh(up)))


class Model(nn.Module):
    """What a recipe says. Inputs: ``x [B, N, C]``; ``mask`` bool ``[B, N]`` where it is padded; ``keep0``, ... bool ``[B, N]`` per site."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        c = recipe.width
        self.recipe, self.masks = recipe, Masks(recipe)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.depth))
        self.front = nn.Parameter(torch.randn(1, recipe.joined, c)) if recipe.joined else None
        self.place = nn.Parameter(torch.randn(1, LONGEST, c)) if recipe.position == "input" else None
        wide = {
            "linear": nn.Linear(c, 1),
            "mlp": nn.Sequential(nn.Linear(c, 6), nn.GELU(), nn.Linear(6, 1)),
            "argmax": nn.Linear(c, 2),
        }
        self.gates = nn.ModuleList(wide[recipe.score] for _ in recipe.sites) if recipe.score in wide else None
        self.limits = [-math.inf] * len(recipe.sites)
        self.query, self.head = nn.Linear(c, 1), nn.Linear(c, 3)
        self.blocks[-1].last = True

    def forward(self, x: Tensor, mask: Tensor | None = None, **keep: Tensor) -> dict[str, Tensor]:
        return self.run(x, mask, keep).outputs

    def run(self, x: Tensor, given: Tensor | None, keep: Mapping[str, Tensor]) -> Run:
        """The outputs, and what was decided on the way."""
        run, r = Run(), self.recipe
        x = x if self.place is None else x + self.place[:, : x.shape[1]]
        x = x if self.front is None else torch.cat([self.front.expand(x.shape[0], -1, -1), x], dim=1)
        alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if given is None else self.fronted(given != 0)
        mask, probs = self.masks.of(alive), None
        bases: list[tuple[Tensor, Tensor]] = []
        for layer, block in enumerate(self.blocks):
            for place in (BEFORE, MIDDLE, BEHIND):
                if place == MIDDLE:
                    x, probs = self.attended(block, x, mask)
                elif place == BEHIND:
                    x = self.fed(block, x)
                if (layer, place) in r.sites:
                    base = x
                    x, mask = self.site(run, x, mask, probs, keep)
                    bases.append((self.masks.alive(mask), base))
            x = self.hidden(x, mask)
        for name in r.pool:
            run.outputs[name] = self.pooled(name, x, mask, bases)
        return run

    def attended(self, block: Any, x: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        if self.recipe.norm == "pre":
            y, probs = block.attend(block.norm1(x), mask)
            return x + y, probs
        y, probs = block.attend(x, mask)
        return (block.norm1(x + y) if self.recipe.norm == "post" else x + y), probs

    def fed(self, block: Any, x: Tensor) -> Tensor:
        if self.recipe.norm == "pre":
            return x + block.feed(block.norm2(x))
        y = x + block.feed(x)
        return block.norm2(y) if self.recipe.norm == "post" else y

    def hidden(self, x: Tensor, mask: Any) -> Tensor:
        if self.recipe.hide == "states":
            return x * self.masks.weight(mask).unsqueeze(-1)
        if self.recipe.hide == "states_filled":
            return x.masked_fill(~self.masks.alive(mask).unsqueeze(-1), 0.0)
        return x

    def fronted(self, keep: Tensor) -> Tensor:
        """Bool over the input's tokens -> bool over all; the learned front's are true."""
        p, b = self.recipe.joined, keep.shape[0]
        if not p:
            return keep
        match self.recipe.front:
            case "cat":
                return torch.cat([torch.ones(b, p, dtype=torch.bool, device=keep.device), keep], dim=1)
            case "pad":
                return F.pad(keep, (p, 0), value=True)
            case "or":
                wide = torch.cat([torch.zeros_like(keep[:, :1]).expand(-1, p), keep], dim=1)
                return wide | (torch.arange(wide.shape[1], device=keep.device) < p)
        wide = torch.ones(b, keep.shape[1] + p, dtype=torch.bool, device=keep.device)
        wide[:, p:] = keep
        return wide

    def safe(self, decision: Tensor) -> Tensor:
        """A decision over all tokens, true at the front."""
        p = self.recipe.prefix
        if not p:
            return decision
        place = torch.arange(decision.shape[1], device=decision.device)
        if self.recipe.spelling % 3 == 2:
            decision = decision.clone()
            decision[:, :p] = True
            return decision
        return self.masks.pick(lambda: decision | (place < p), lambda: torch.where(place < p, True, decision))

    def site(self, run: Run, x: Tensor, mask: Any, probs: Tensor | None, given: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Decide, and drop."""
        index = len(run.keep)
        score = self.scored(index, x, mask, probs)
        keep = self.fronted(given[f"keep{index}"]) if given else None
        if self.recipe.mode != "drawn":
            assert score is not None
            limit = self.limits[index]
            keep = score > limit if keep is None else keep & (score > limit)
            run.margin.append((score - limit).abs())
        assert keep is not None
        run.score.append(score)
        keep = self.safe(keep)
        mask = self.masks.grown(mask, keep)
        alive = self.masks.alive(mask)
        run.keep.append(alive)
        if self.recipe.mode == "found":
            return x, mask
        return ops.prune(x, alive, score), mask

    def scored(self, index: int, x: Tensor, mask: Any, probs: Tensor | None) -> Tensor | None:
        """Float ``[B, N]``."""
        match self.recipe.score:
            case "received":
                return x.norm(dim=-1) if probs is None else probs.mean(dim=(1, 2))
            case "class":
                return x.norm(dim=-1) if probs is None else probs[:, :, 0].mean(1)
            case "norm":
                return self.masks.pick(lambda: x.norm(dim=-1), lambda: x.abs().mean(-1), lambda: x.square().sum(-1))
            case "linear" | "mlp":
                assert self.gates is not None
                return torch.sigmoid(self.gates[index](x).squeeze(-1))
            case "argmax":
                assert self.gates is not None
                return self.gates[index](x).argmax(dim=-1).float()
        return None

    def pooled(self, name: str, x: Tensor, mask: Any, bases: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One output."""
        alive, weight = self.masks.alive(mask).unsqueeze(-1), self.masks.weight(mask).unsqueeze(-1)
        ways: dict[str, Callable[[], Tensor]] = {
            "mean": lambda: (x * weight).sum(1) / weight.sum(1).clamp(min=1.0),
            "product": lambda: torch.bmm(weight.mT, x).squeeze(1) / weight.sum(1).clamp(min=1e-9),
            "share": lambda: (x * weight).mean(1),
            "chosen": lambda: torch.where(alive, x, 0.0).sum(dim=1),
            "max": lambda: x.masked_fill(~alive, float("-inf")).amax(dim=1),
            "largest": lambda: torch.where(alive, x, -1e9).max(dim=1).values,
            "attention": lambda: (self.query(x).masked_fill(~alive, -1e9).softmax(dim=1) * x).sum(dim=1),
            "first": lambda: torch.tanh(x[:, 0]),
            "front": lambda: x[:, : self.recipe.prefix].mean(1),
            "ends": lambda: x[:, 0] + x[:, self.recipe.prefix - 1],
            "rows": lambda: self.head(self.rows(x, bases)),
            "zeros": lambda: self.restored(x, bases[-1][0], torch.zeros_like(bases[0][1])),
            "last_row": lambda: x[:, -1],
            "all": lambda: x.mean(1),
        }
        return ways[name]()

    def rows(self, x: Tensor, bases: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Every token, as it was when it fell ``[B, N, C]``."""
        for keep, base in reversed(bases):
            x = self.restored(x, keep, base)
        return x

    def restored(self, x: Tensor, keep: Tensor, base: Tensor) -> Tensor:
        """Living rows of one, other rows of another ``[B, N, C]``."""
        return torch.where(keep.unsqueeze(-1), x, base) if self.recipe.mode == "found" else ops.restore(x, keep, base)


def made(recipe: Recipe) -> Model:
    """The model with weights wide enough that attention is uneven, and limits that let about two thirds pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Model(recipe).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.2 if recipe.norm == "none" else 0.35)
        if recipe.mode != "drawn":
            for index in range(len(recipe.sites)):
                with torch.no_grad():
                    given = inputs(recipe, 1, 20)
                    score = model.run(given.pop("x"), given.pop("mask", None), given).score[index]
                assert score is not None
                model.limits[index] = 0.5 if recipe.score == "argmax" else float(score.quantile(0.35))
    return model


def inputs(recipe: Recipe, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs at which everything lives."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.ones(batch, length, dtype=torch.bool)
    found = {"x": torch.randn(batch, length, recipe.width, generator=generator)}
    found |= {"mask": alive.to(PADDING[recipe.padded])} if recipe.padded != "no" else {}
    return found if recipe.mode == "found" else found | {f"keep{i}": alive for i in range(len(recipe.sites))}
