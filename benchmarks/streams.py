"""MiniLM's thresholds for a FLOPs ratio on docstrings: they rise linearly, theta * (l + 1) / L for layer l of L; theta by bisection.

``benchmarks/speed`` times what comes of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from tpcompile import models
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample
from tpcompile.demo import model_folder
from tpcompile.errors import InputError

CALIBRATION_TEXTS = 48
STEPS = 16
"""Halvings of theta: far finer than what one more kept token changes."""


@dataclass(frozen=True)
class Encoder:
    """The dense encoder with the sizes that the papers' formula needs."""

    model: nn.Module
    layers: int
    width: int
    inner: int

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read a model directory."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(models.load(folder).model, config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])

    def work(self, entering: int, staying: int) -> int:
        """Multiply-accumulates of one layer: its attention at the tokens that enter it, its MLP at those that stay."""
        return (4 * self.width * entering + 2 * entering**2 + 2 * self.inner * staying) * self.width

    def ratio(self, counts: Sequence[int]) -> float:
        """Dense work over pruned work, of the tokens at the input and behind every layer."""
        return self.layers * self.work(counts[0], counts[0]) / sum(self.work(a, b) for a, b in pairwise(counts))

    def flops_ratio(self, samples: Sequence[Sample], thresholds: Sequence[float], n_ref: int | str = "length") -> float:
        """Dense / pruned over all samples, without padding, by the paper's formula."""
        pruned = models.prune(self.model, "ltp", thresholds=list(thresholds), n_ref=n_ref)
        full = kept = 0
        for sample in samples:
            trace = pruned.trace(**{name: torch.from_numpy(value) for name, value in sample.inputs.items()})
            counts = [sample.length, *(int(mask.sum()) for mask in trace.kept)]
            full += self.layers * self.work(sample.length, sample.length)
            kept += sum(self.work(entering, staying) for entering, staying in pairwise(counts))
        return full / kept


def rising(layers: int) -> list[float]:
    """The shape (l + 1) / L, growing with depth. Layer 0 prunes too: without it no threshold reaches /5 on six layers."""
    return [(layer + 1) / layers for layer in range(layers)]


def choose(
    model: Encoder, samples: Sequence[Sample], target: float, shape: Sequence[float], n_ref: int | str = "length"
) -> list[float]:
    """Thresholds ``theta * shape`` whose FLOPs ratio on the samples is the target; theta by bisection.

    Raises:
        InputError: even thresholds that drop nearly every token do not reach the target.
    """
    low, high = 0.0, 1.0
    if model.flops_ratio(samples, [high * s for s in shape], n_ref) < target:
        raise InputError(f"no threshold reaches FLOPs /{target}", fix="ask for less, or use longer texts")
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if model.flops_ratio(samples, [middle * s for s in shape], n_ref) < target else (low, middle)
    return [high * s for s in shape]


def calibration_texts() -> list[Sample]:
    """Docstrings of 64 tokens or more from the calibration half."""
    return [s for s in load_data("docstrings:calibration", model_folder(), 256) if s.length >= 64][:CALIBRATION_TEXTS]
