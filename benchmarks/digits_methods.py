"""Accuracy against FLOPs of every training-free method on the held-out digits; writes docs/digits.md and docs/digits.svg.

    python benchmarks/digits_methods.py

The shipped digits model as it is, 359 test images, eager; nothing is chosen on them. Each method runs at a few settings, from mild to
strong, which stand in the table. FLOPs are products of matrices: of a method that gathers by nature counted in eager runs of 40 images,
one by one; of a masked one by the tokens alive in each block, the paper's count, which the compiled graph keeps or falls below.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train_digits import tensors

from tpcompile import models
from tpcompile.models import Pruned, Trace
from tpcompile.models.sources import DIGITS

ROOT = Path(__file__).resolve().parents[1]
TOKENS, DEPTH, COUNTED = 65, 6, 40
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#6a4c93", "#8d6b4f", "#2e4057", "#00798c", "#c05299", "#7a7a7a")


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Methods with their parameters, from mild to strong."""
    for part in (0.3, 0.5, 0.7):
        yield "cls-attention", {"thresholds": [0.0, 0.0, *[part / TOKENS / 4] * 4]}
        yield "ltp", {"thresholds": [part / TOKENS * (layer + 1) / DEPTH for layer in range(DEPTH)], "protect": "prefix"}
        yield "as_vit", {"thresholds": [part / TOKENS / 3] * 3, "pruning_loc": [1, 2, 4]}
    for rate in (0.9, 0.75, 0.6):
        yield "power_bert", {"retention": [1 + round((TOKENS - 1) * rate ** (layer + 1)) for layer in range(DEPTH)]}
        yield "ltp", {"prune_mode": "topk", "token_keep_rate": rate - 0.4, "protect": "prefix"}
        yield "evit", {"base_keep_rate": rate, "drop_loc": [1, 2, 4]}
        yield "jmp", {"keep_rate": rate, "locations": [1, 2, 4]}
        yield "zero_tprune", {"stages": [{"block": b, "iterations": 5, "similar": 0.05, "keep": rate} for b in (0, 1, 3)]}
    for pairs in (3, 6, 9):
        yield "tome", {"r": pairs}
    for most in (50, 35, 20):
        yield "ats", {"ats_blocks": [1, 2, 3, 4, 5], "num_tokens": most}


def counted(model: nn.Module, images: Tensor) -> float:
    """Mean FLOPs of one image in an eager run."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for image in images[:COUNTED]:
            model(image[None])
    return float(counter.get_total_flops()) / COUNTED


def paper(pruned: Pruned, seen: Trace) -> float:
    """Mean FLOPs of one image by the tokens alive: attention at those that enter a block, its MLP at those that stay."""
    model: Any = pruned.parts
    width, inner = model.model.embed_dim, model.model.blocks[0].mlp.fc1.out_features
    before, total = torch.full((len(seen.kept[0]),), float(TOKENS)), torch.zeros(len(seen.kept[0]))
    for kept, base, x in zip(seen.kept, seen.bases, seen.hidden[:-1], strict=True):
        after = kept.sum(1).float()
        entering = after if base is x else before  # decided at the block's entry, or in its middle
        total += 2 * width * (4 * width * entering + 2 * entering**2 + 2 * inner * after)
        before = after
    channels = model.model.patch_embed.proj.weight.numel()
    return float(total.mean()) + 2 * (TOKENS - 1) * channels + 2 * width * 10


def measure() -> list[tuple[str, str, float, float]]:
    """Method, setting, FLOPs relative to the dense model's, accuracy."""
    model = models.load(DIGITS).model
    images, classes = tensors("test")
    whole = counted(model, images)
    rows = [("dense", "", 1.0, _accuracy(model(images)["logits"], classes))]
    for method, parameters in settings():
        pruned = models.prune(model, method, **parameters)
        if method in ("ats",):  # each image its own count
            logits, cost = torch.cat([pruned(image[None])["logits"] for image in images]), counted(pruned, images)
        else:
            seen = pruned.trace(images)
            gathered = any(x.shape[1] != TOKENS for x in seen.hidden)
            logits, cost = seen.outputs["logits"], counted(pruned, images) if gathered else paper(pruned, seen)
        shown = ", ".join(f"{key}={_short(value)}" for key, value in parameters.items())
        rows.append((method, shown, cost / whole, _accuracy(logits, classes)))
        print(*rows[-1], file=sys.stderr, flush=True)
    return rows


def _accuracy(logits: Tensor, classes: Tensor) -> float:
    return float((logits.argmax(1) == classes).float().mean())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(part)}" for key, part in value.items()) + "}"
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, list) else str(value)


def picture(rows: list[tuple[str, str, float, float]]) -> str:
    """The plot as SVG: FLOPs to the right, accuracy upwards, from 0.8."""
    wide, high, floor = 640, 400, 0.8
    methods = list(dict.fromkeys(row[0] for row in rows))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide + 160} {high + 60}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide + 160}" height="{high + 60}" fill="white"/>',
        f'<text x="{wide / 2}" y="{high + 45}">FLOPs, of the dense model\'s</text><text x="8" y="14">accuracy, 359 test digits</text>',
    ]

    def at(cost: float, accuracy: float) -> tuple[float, float]:
        return 50 + (wide - 60) * cost, 20 + (high - 20) * (1 - (max(accuracy, floor) - floor) / (1 - floor))

    for tick in (0.2, 0.4, 0.6, 0.8, 1.0):
        x, _ = at(tick, 1)
        lines.append(f'<path d="M{x:.0f} 20V{high}" stroke="#ddd"/><text x="{x - 8:.0f}" y="{high + 18}">{tick}</text>')
    for tick in (0.8, 0.85, 0.9, 0.95, 1.0):
        _, y = at(0, tick)
        lines.append(f'<path d="M50 {y:.0f}H{wide - 10}" stroke="#ddd"/><text x="14" y="{y + 4:.0f}">{tick:.2f}</text>')
    for number, method in enumerate(methods):
        colour = COLOURS[number % len(COLOURS)]
        for _, _, cost, accuracy in (row for row in rows if row[0] == method):
            x, y = at(cost, accuracy)
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        y = 30 + 20 * number
        lines.append(
            f'<circle cx="{wide + 10}" cy="{y}" r="5" fill="{colour}"/><text x="{wide + 22}" y="{y + 4}">{method}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


@torch.no_grad()
def main() -> None:
    rows = measure()
    table = [f"| `{method}` | {shown} | {cost:.3f} | {accuracy:.4f} |" for method, shown, cost, accuracy in rows]
    text = [
        "# Training-free methods on the held-out digits",
        "",
        "Written by `python benchmarks/digits_methods.py`: do not edit. The shipped digits model (6 blocks, 65 tokens) as it is, 359",
        "test images; every method that needs no weights of its own, untrained. Settings were chosen by hand, on no images. The model",
        "was trained with tokens dropped by `cls-attention`, which favours methods of its kind. FLOPs are relative to the dense",
        "model's; below an accuracy of 0.8 a point stands on the lower edge.",
        "",
        "![accuracy against FLOPs](digits.svg)",
        "",
        "| method | setting | FLOPs | accuracy |",
        "|---|---|---|---|",
    ]
    (ROOT / "docs" / "digits.md").write_text("\n".join([*text, *table, ""]), encoding="utf-8")
    (ROOT / "docs" / "digits.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
