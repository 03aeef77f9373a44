"""DeiT shapes, dense and pruned, batch 1 and 8, at fixed FLOPs ratios: parity and latency. Random weights: accuracy means nothing here.

    python benchmarks/vision.py
    python benchmarks/vision.py --model timm/deit_base_patch16_224 --ratios 2

The method is ``cls-attention`` at blocks 4, 7 and 10 of 12. The keep rate that gives a FLOPs ratio follows from the formula; each
threshold is that quantile of the scores that calibration images give at its site. Images are smooth noise, each another.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tpcompile import api, models
from tpcompile.errors import TpcompileError
from tpcompile.images import CONFIG, Preprocessing, open_image

SITES = (3, 6, 9)
CALIBRATION = 6


def noise(folder: Path, count: int, seed: int) -> list[Path]:
    """Smooth random images of 320 x 256 pixels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (20, 25, 3), dtype=np.uint8))
        paths.append(folder / f"{number:03}.png")
        coarse.resize((320, 256), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def counts(rate: float, tokens: int, layers: int) -> list[int]:
    """Tokens that enter each block and leave the last, where every site keeps this share of the patches."""
    found = [tokens]
    for layer in range(layers):
        found.append(1 + round((found[-1] - 1) * rate) if layer in SITES else found[-1])
    return found


def ratio_of(rate: float, tokens: int, layers: int, width: int, inner: int) -> float:
    """Dense work over pruned work: attention at the tokens that enter a block, its MLP at those that stay."""

    def work(entering: int, staying: int) -> int:
        return (4 * width * entering + 2 * entering**2 + 2 * inner * staying) * width

    return layers * work(tokens, tokens) / sum(work(a, b) for a, b in pairwise(counts(rate, tokens, layers)))


def thresholds(source: models.Source, images: Sequence[torch.Tensor], target: float) -> list[float]:
    """Per block a threshold, 0 where there is no site, so that FLOPs are the dense ones over ``target``."""
    body: Any = source.model
    inner_model: Any = body.model
    layers, width = len(inner_model.blocks), inner_model.embed_dim
    assert source.patches is not None
    tokens, inner = source.patches.tokens, inner_model.blocks[0].mlp.fc1.out_features
    low, high = 0.05, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if ratio_of(middle, tokens, layers, width, inner) < target else (middle, high)
    found = [0.0] * layers
    for site in SITES:
        found[site] = 1e-9  # a threshold nobody misses: the scores are wanted
        pruned = models.prune(source.model, "cls-attention", thresholds=found)
        scores = []
        for image in images:
            trace = pruned.trace(pixel_values=image)
            alive, score = trace.kept[site], trace.scores[site]
            assert score is not None
            scores.append(score[alive][1:])
        found[site] = float(torch.quantile(torch.cat(scores).float(), 1 - low))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, validate, time, print, write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/vision.json"), help="JSON to write (default: %(default)s)")
    parser.add_argument("--model", default="timm/deit_small_patch16_224")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["onnx", "openvino"])
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    source = models.load(options.model)
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            room = Path(scratch)
            noise(room / "stream", options.images, 1)
            (room / CONFIG).write_text(source.documents[CONFIG], encoding="utf-8")
            prepare = Preprocessing.read(room)
            calibration = [torch.from_numpy(prepare(open_image(p))) for p in noise(room / "calibration", CALIBRATION, 2)]
            for ratio in options.ratios:
                chosen = thresholds(source, calibration, ratio)
                for target in options.targets:
                    for batch, policy in ((1, "one"), (8, "ragged")):
                        out = room / f"{target}-{policy}-{ratio:g}"
                        api.export(
                            options.model, out=out, target=target, method="cls-attention", parameters={"thresholds": chosen},
                            batch=policy,
                        )  # fmt: skip
                        parity = api.validate(out, data=room / "stream", samples=16, batch=batch)
                        latency = api.bench(out, data=room / "stream", repeats=options.repeats, batch=batch)
                        assert latency.saving is not None
                        needed = max(d.required for d in parity.outputs.values())
                        rows.append(
                            {
                                "target": target,
                                "batch": batch,
                                "parity": parity.verdict,
                                "required": needed,
                                "flipped": parity.flipped,
                                "flops_ratio": latency.saving.paper,
                                "latency": latency.to_json(),
                            }
                        )
                        cold, warm, images = latency.cold, latency.warm, options.images
                        print(
                            f"| {target} | {batch} | /{latency.saving.paper:.2f} | {parity.verdict} {needed:.1e} | "
                            f"{cold.dense.total / images:.1f} / {warm.dense.total / images:.1f} | "
                            f"{cold.pruned.total / images:.1f} / {warm.pruned.total / images:.1f} | "
                            f"{cold.speedup.value:.2f} / {warm.speedup.value:.2f} | "
                            f"{cold.realisation['paper']:.2f} / {warm.realisation['paper']:.2f} |",
                            flush=True,
                        )
    except TpcompileError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    document = {"model": options.model, "images": options.images, "repeats": options.repeats, "rows": rows}
    options.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
