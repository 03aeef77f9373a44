"""Choose the shipped recipes of the digits model, without learning. ``python benchmarks/digits_thresholds.py [-o DIR]``.

A schedule is a shape over layers times one factor. For each method, shape and share of tokens the factor is found by bisection so that
the calibration images keep that share on average over layers; of all the one with the best accuracy on them is taken, and at equal
accuracy the one with the lowest cross-entropy. The part ``test`` is looked at once, for the note in the recipe.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from train_digits import tensors

from tpcompile import models
from tpcompile.models.sources import DIGITS

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.7, 0.5, 0.3)
METHODS: dict[str, dict[str, Any]] = {"cls-attention": {}, "ltp": {"protect": "prefix"}}
SHAPES: dict[str, list[float]] = {
    "second layer": [0, 1, 0, 0, 0, 0],
    "third layer": [0, 0, 1, 0, 0, 0],
    "first and third": [1, 0, 1, 0, 0, 0],
    "second and fourth": [0, 1, 0, 1, 0, 0],
    "second and third": [0, 0.5, 1, 0, 0, 0],
    "flat": [1, 1, 1, 1, 1, 1],
    "flat from the third": [0, 0, 1, 1, 1, 1],
    "rising": [0.2, 0.4, 0.6, 0.8, 1, 1],
}


class Found(NamedTuple):
    """What a schedule does on one part of the digits; ordered from worse to better."""

    accuracy: float
    neg_entropy: float
    share: float


def measure(model: nn.Module, method: str, thresholds: list[float], data: tuple[Tensor, Tensor]) -> Found:
    """Accuracy, cross-entropy (negative) and share of tokens alive after each layer, averaged over layers and images."""
    images, classes = data
    seen = models.prune(model, method, thresholds=thresholds, **METHODS[method]).trace(images)
    logits = seen.outputs["logits"]
    share = float(torch.stack([kept.float().mean() for kept in seen.kept]).mean())
    accuracy = float((logits.argmax(1) == classes).float().mean())
    return Found(accuracy, -float(nn.functional.cross_entropy(logits, classes)), share)


def scaled(shape: list[float], factor: float) -> list[float]:
    """The thresholds of a shape, to six digits."""
    return [round(factor * part, 6) for part in shape]


def choose(model: nn.Module, method: str, shape: list[float], share: float, data: tuple[Tensor, Tensor]) -> list[float]:
    """The thresholds of a shape that keep a share of the tokens, found on every third image."""
    low, high = 1e-4, 0.5
    data = (data[0][::3], data[1][::3])
    for _ in range(11):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if measure(model, method, scaled(shape, middle), data).share > share else (low, middle)
    return scaled(shape, low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "models" / "recipes")
    options = parser.parse_args()
    model = models.load(DIGITS).model
    calibration, test = tensors("calibration"), tensors("test")
    dense = {name: measure(model, "ltp", [0.0] * 6, data) for name, data in (("calibration", calibration), ("test", test))}
    print({name: round(found.accuracy, 4) for name, found in dense.items()}, flush=True)
    for share in SHARES:
        rows = []
        for method in METHODS:
            for name, shape in SHAPES.items():
                thresholds = choose(model, method, shape, share, calibration)
                found = measure(model, method, thresholds, calibration)
                print(f"{share} {method} {name}: {found} {thresholds}", flush=True)
                if abs(found.share - share) < 0.03:
                    rows.append((found, method, name, thresholds))
        best, method, name, thresholds = max(rows)
        held_out = measure(model, method, thresholds, test)
        print(f"chosen: {method} {name}; test {held_out}", flush=True)
        note = (
            f"Searched, not learned: of {len(SHAPES)} shapes and {len(METHODS)} methods that keep {share:.0%} of the tokens (mean over "
            f"layers) of {len(calibration[1])} calibration digits, '{name}' has the best accuracy on them, {best.accuracy:.4f} (dense "
            f"{dense['calibration'].accuracy:.4f}). On the {len(test[1])} test digits it keeps {held_out.share:.1%} at accuracy "
            f"{held_out.accuracy:.4f} (dense {dense['test'].accuracy:.4f})."
        )
        recipe = {"method": method, "model": DIGITS, "note": note, "parameters": {"thresholds": thresholds, **METHODS[method]}}
        path = options.output / f"digits-{share * 100:.0f}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False, width=120), encoding="utf-8")


if __name__ == "__main__":
    main()
