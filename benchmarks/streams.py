"""MiniLM's thresholds for a FLOPs ratio on docstrings: they rise linearly, theta * (l + 1) / L for layer l of L; theta is fitted.

``benchmarks/speed`` times what comes of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import nn

from tpcompile import models
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample
from tpcompile.demo import model_folder
from tpcompile.operating import fit
from tpcompile.subject import subject_of

CALIBRATION_TEXTS = 48


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
        config = sizes(folder)
        return cls(models.load(folder).model, config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])

    def work(self, entering: int, staying: int) -> int:
        """Multiply-accumulates of one layer: its attention at the tokens that enter it, its MLP at those that stay."""
        return (4 * self.width * entering + 2 * entering**2 + 2 * self.inner * staying) * self.width

    def ratio(self, counts: Sequence[int]) -> float:
        """Dense work over pruned work, of the tokens at the input and behind every layer."""
        return self.layers * self.work(counts[0], counts[0]) / sum(self.work(a, b) for a, b in pairwise(counts))


def sizes(folder: Path) -> dict[str, int]:
    """What a model directory says of its model."""
    config: dict[str, int] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def rising(layers: int) -> list[float]:
    """The shape (l + 1) / L, growing with depth. Layer 0 prunes too: without it no threshold reaches /5 on six layers."""
    return [(layer + 1) / layers for layer in range(layers)]


def choose(folder: Path, samples: Sequence[Sample], target: float, shape: Sequence[float]) -> list[float]:
    """Thresholds, a factor times a shape, whose FLOPs ratio on the samples is the target; see ``tpcompile.operating``.

    Raises:
        UsageError: even thresholds that drop nearly every token do not reach the target.
    """
    found = fit(subject_of(folder, None, None, "ltp", {"thresholds": list(shape)}), target, samples, "calibration texts")
    thresholds: list[float] = found.pruned.method_parameters["thresholds"]
    return thresholds


def calibration_texts() -> list[Sample]:
    """Docstrings of 64 tokens or more from the calibration half."""
    return [s for s in load_data("docstrings:calibration", model_folder(), 256) if s.length >= 64][:CALIBRATION_TEXTS]
