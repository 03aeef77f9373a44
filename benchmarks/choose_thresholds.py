"""Choose LTP thresholds for MiniLM without learning: the recipe that the demo ships.

    python benchmarks/choose_thresholds.py -o models/recipes/minilm-ltp.yaml

A schedule is a shape over layers times one factor. For each shape the factor is fitted (``tpcompile.operating``) so that the calibration
texts (64 tokens or more) cost the target FLOPs; of all shapes the one with the best recall@1 on the calibration pairs is taken. The
report half of the docstrings is never looked at.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from streams import Encoder, calibration_texts, choose, rising

from tpcompile import models
from tpcompile.data.load import Sample, load_data
from tpcompile.demo import model_folder
from tpcompile.recipe import Recipe

SHAPES: dict[str, list[float]] = {
    "rising": rising(6),
    "flat": [1, 1, 1, 1, 1, 1],
    "flat, last layer free": [1, 1, 1, 1, 1, 0],
    "first layer": [1, 0, 0, 0, 0, 0],
    "first two": [1, 1, 0, 0, 0, 0],
    "first two, falling": [1, 0.8, 0, 0, 0, 0],
    "first three": [1, 1, 1, 0, 0, 0],
    "second": [0, 1, 0, 0, 0, 0],
    "second and third": [0, 1, 1, 0, 0, 0],
    "first two, then mild": [1, 0.9, 0.3, 0.3, 0.3, 0],
    "first, then mild": [1, 0.3, 0.3, 0.3, 0.3, 0],
    "first, later mild": [1, 0, 0.25, 0.25, 0.5, 0],
    "first, then rising": [1, 0.1, 0.2, 0.3, 0.4, 0.5],
}


def recall(model: torch.nn.Module, pairs: Sequence[Sample]) -> float:
    """Share of first lines whose nearest body is their own."""
    rows = []
    for sample in pairs:
        with torch.no_grad():
            rows.append(
                model(**{name: torch.from_numpy(value) for name, value in sample.inputs.items()})["sentence_embedding"][0].numpy()
            )
    vectors = np.stack(rows)
    similarity = vectors[0::2] @ vectors[1::2].T
    return float((similarity.argmax(1) == np.arange(len(similarity))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--flops", type=float, default=2.15, help="dense / pruned on the calibration texts")
    options = parser.parse_args()
    encoder, texts = Encoder.load(model_folder()), calibration_texts()
    pairs = load_data("docstrings:calibration-pairs", model_folder(), 256)
    dense = recall(encoder.model, pairs)
    print(f"dense recall@1 {dense:.3f} on {len(pairs) // 2} pairs")
    found = []
    for name, shape in SHAPES.items():
        thresholds = choose(model_folder(), texts, options.flops, shape)
        score = recall(models.prune(encoder.model, "ltp", thresholds=thresholds), pairs)
        found.append((score, name, thresholds))
        print(f"{name}: recall@1 {score:.3f} at FLOPs /{options.flops:g}  {thresholds}", flush=True)
    score, name, thresholds = max(found)
    note = (
        f"Not learned: of {len(SHAPES)} shapes at FLOPs /{options.flops} on {len(texts)} calibration docstrings, '{name}' has the best "
        f"recall@1 on {len(pairs) // 2} calibration pairs, {score:.3f} (dense {dense:.3f}). Scores divide by the text's own length."
    )
    parameters = {"thresholds": thresholds, "n_ref": "length"}
    Recipe(method="ltp", model="all-MiniLM-L6-v2", note=note, parameters=parameters).write(options.output)


if __name__ == "__main__":
    main()
