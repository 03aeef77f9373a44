"""JMP, Zero-TPrune and eTPS have no official code that runs: each stands here once more, a token at a time, in numpy and float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf, softmax
from torch import Tensor, nn

from tpcompile import models

Tiny = Callable[..., Any]
Array = NDArray[np.float64]


class Vit:
    """The parts of ``tiny_vit``, for one image: no batch, no torch."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def linear(self, name: str, x: Array) -> Array:
        y: Array = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return y

    def norm(self, name: str, x: Array) -> Array:
        y: Array = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return y * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, image: Array) -> Array:
        kernel = self.weights["patch_embed.proj.weight"]
        corners = [(row, column) for row in range(0, image.shape[1], 4) for column in range(0, image.shape[2], 4)]
        rows = [(kernel * image[:, row : row + 4, column : column + 4]).sum((1, 2, 3)) for row, column in corners]
        patches = np.stack(rows) + self.weights["patch_embed.proj.bias"]
        return np.concatenate([self.weights["cls_token"][0], patches]) + self.weights["pos_embed"][0]

    def attend(self, block: int, x: Array, heads: int = 3) -> tuple[Array, Array, Array]:
        """``x [N, C]`` behind the attention, the attention ``[H, N, N]``, the keys of all heads ``[N, C]``."""
        query, key, value = np.split(self.linear(f"blocks.{block}.attn.qkv", self.norm(f"blocks.{block}.norm1", x)), 3, axis=1)
        parts = [np.split(part, heads, axis=1) for part in (query, key, value)]
        attention = np.stack([softmax(q @ k.T / math.sqrt(q.shape[1]), axis=1) for q, k, _ in zip(*parts, strict=True)])
        context = np.concatenate([a @ v for a, v in zip(attention, parts[2], strict=True)], axis=1)
        return x + self.linear(f"blocks.{block}.attn.proj", context), attention, key

    def feed(self, block: int, x: Array) -> Array:
        inner = self.linear(f"blocks.{block}.mlp.fc1", self.norm(f"blocks.{block}.norm2", x))
        return x + self.linear(f"blocks.{block}.mlp.fc2", inner * (1 + erf(inner / math.sqrt(2))) / 2)

    def head(self, x: Array) -> Array:
        return self.linear("head", self.norm("norm", x)[0])


def ranked(attention: Array) -> list[int]:
    """The patches by what CLS pays them, ``[H, N, N]``, the mean over heads; the greatest first."""
    importance = attention.mean(0)[0, 1:]
    return sorted(range(1, len(importance) + 1), key=lambda token: -importance[token - 1])


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def jmp(vit: Vit, image: Array, tau: float) -> Array:
    """The abstract's choice on EViT's frame (methods.md, section 5): at blocks 0 and 2, half of the tokens are critical."""
    x = vit.embed(image)
    for block in range(3):
        x, attention, _ = vit.attend(block, x)
        if block != 1:
            order = ranked(attention)
            critical, others = order[: math.ceil(0.5 * len(order))], order[math.ceil(0.5 * len(order)) :]
            host = {i: max(critical, key=lambda j: cosine(x[i], x[j])) for i in others}
            merge = np.mean([cosine(x[i], x[j]) for i, j in host.items()]) > tau
            guests = {j: [i for i in others if merge and host[i] == j] for j in critical}
            x = np.stack([x[0], *(np.mean(x[[j, *guests[j]]], axis=0) for j in critical)])
        x = vit.feed(block, x)
    return vit.head(x)


def etps(vit: Vit, image: Array, temperature: float) -> Array:
    """Equations 4 to 6 behind the attention of blocks 0 and 2; 7 and then 4 of the 12 patches stay (methods.md, section 6)."""
    x = vit.embed(image)
    for block in range(3):
        x, attention, _ = vit.attend(block, x)
        if block != 1:
            order = ranked(attention)
            kept = order[: 7 if block == 0 else 4]
            above, below = {j: math.e * x[j] for j in kept}, dict.fromkeys(kept, math.e)
            for i in set(order) - set(kept):
                likeness = {j: float(x[i] @ x[j] / (np.linalg.norm(x[i]) + 1e-6) / (np.linalg.norm(x[j]) + 1e-6)) for j in kept}
                j = max(kept, key=likeness.__getitem__)
                above[j] = above[j] + math.exp(likeness[j] / temperature) * x[i]
                below[j] += math.exp(likeness[j] / temperature)
            x = np.stack([x[0], *(above[j] / below[j] for j in kept)])
        x = vit.feed(block, x)
    return vit.head(x)


def page_rank(attention: Array, alive: list[int], votes: int, v_min: float, v_max: float) -> dict[int, float]:
    """Weighted PageRank (methods.md, section 4): ``s <- A^T s`` in each head, heads of too small or large a spread left out."""
    heads = []
    for head in attention:
        share = {q: {k: head[q, k] / sum(head[q, j] for j in alive) for k in alive} for q in alive}
        start = {k: math.sqrt(len(alive)) if k == 0 else 1.0 for k in alive}
        score = {k: start[k] * len(alive) / sum(start.values()) for k in alive}
        for _ in range(votes):
            score = {k: sum(share[q][k] * score[q] for q in alive) for k in alive}
        heads.append(score)
    spread = [np.mean([(value - 1) ** 2 for value in score.values()]) for score in heads]
    counting = [score for score, one in zip(heads, spread, strict=True) if v_min <= one <= v_max] or heads
    return {k: math.sqrt(np.mean([score[k] ** 2 for score in counting])) for k in alive}


def zero_tprune(vit: Vit, image: Array, v_min: float, v_max: float) -> Array:
    """I', S and I behind block 0: of 12 patches 3 have a double, and of the other 9 stay 7."""
    x = vit.embed(image)
    for block in range(3):
        x, attention, key = vit.attend(block, x)
        x = vit.feed(block, x)
        if block == 0:
            first = page_rank(attention, list(range(13)), 1, v_min, v_max)
            order = sorted(range(1, 13), key=lambda token: -first[token])
            above, below = order[:6], order[6:]
            double = sorted(below, key=lambda i: -max(cosine(key[i], key[j]) for j in above))[:3]
            left = [token for token in range(13) if token not in double]
            last = page_rank(attention, left, 5, v_min, v_max)
            kept = sorted(sorted(left[1:], key=lambda token: -last[token])[:7])
            x = x[[0, *kept]]
    return vit.head(x)


CASES: list[tuple[str, dict[str, Any], Callable[[Vit, Array], Array]]] = [
    ("jmp", {"locations": [0, 2], "keep_rate": 0.5, "tau": -1.0}, lambda vit, image: jmp(vit, image, -1.0)),
    ("jmp", {"locations": [0, 2], "keep_rate": 0.5, "tau": 0.39}, lambda vit, image: jmp(vit, image, 0.39)),
    ("jmp", {"locations": [0, 2], "keep_rate": 0.5, "tau": 1.0}, lambda vit, image: jmp(vit, image, 1.0)),
    (
        "tps",
        {"variant": "etps", "prune_loc": [0, 2], "keep_ratio": 0.6, "temperature": 2.0},
        lambda vit, image: etps(vit, image, 2.0),
    ),
    *(
        (
            "zero_tprune",
            {"stages": [{"block": 0, "iterations": 5, "similar": 0.25, "keep": 0.75}], "v_min": low, "v_max": high},
            lambda vit, image, low=low, high=high: zero_tprune(vit, image, low, high),
        )
        for low, high in ((0.01, 0.7), (0.2, 0.7), (5.0, 9.0))
    ),
]


@pytest.mark.parametrize(("method", "parameters", "paper"), CASES, ids=[f"{name}{i}" for i, (name, _, _) in enumerate(CASES)])
@torch.no_grad()
def test_gives_what_the_paper_says(
    method: str, parameters: dict[str, Any], paper: Callable[[Vit, Array], Array], tiny_vit: Tiny, images: Tensor
) -> None:
    model = tiny_vit()
    expected = np.stack([paper(Vit(model), image.double().numpy()) for image in images])
    got = models.prune(model, method, **parameters)(images)["logits"].numpy()
    assert float(np.abs(got - expected).max()) < 2e-5 * max(1.0, float(np.abs(expected).max()))
    assert float(np.abs(got - model(images).numpy()).max()) > 1e-3
