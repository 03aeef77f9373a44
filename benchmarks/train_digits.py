"""Train the shipped vision transformer on scikit-learn's handwritten digits. ``python benchmarks/train_digits.py [-o DIR]``.

Trains on the part ``train``, reports the accuracy on ``calibration`` and on ``test``, which no choice here has looked at, and writes
config.json in timm's hub layout, model.safetensors and README.md. The same seed, versions and number of threads give the same file.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from tpcompile import models
from tpcompile.data.images import digits
from tpcompile.models.library import timm
from tpcompile.models.sources import DIGITS

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
ARCHITECTURE = "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 1,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2,
}
CLASSES = 10
MEAN, STD = 0.305, 0.376
"""Of the training part's pixels, from 0 to 1."""

RISING = [0.2, 0.4, 0.6, 0.8, 1, 1]
LEAST, MOST = 3e-4, 3e-2
"""Thresholds while adapting: a shape over layers times a factor between these."""


def tensors(part: str) -> tuple[Tensor, Tensor]:
    """Images float32 ``[n, 1, 8, 8]``, normalised, and classes int64 ``[n]``."""
    pixels, classes = digits(part)
    images = (pixels.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(classes)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by -1, 0 or 1 pixels both ways, black moving in. ``[n, 1, 8, 8] -> [n, 1, 8, 8]``."""
    wide = nn.functional.pad(images, (1, 1, 1, 1), value=-MEAN / STD)
    places = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([one[:, top : top + 8, left : left + 8] for one, (top, left) in zip(wide, places, strict=True)])


@torch.no_grad()
def lay_out(model: Any) -> None:
    """Start the positions as sines and cosines of row and column: as large as what a pixel adds, so that the place of it counts."""
    waves = torch.linspace(0.5, 3.0, 16) * math.pi / 8
    angles = torch.arange(8)[:, None] * waves
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [8, 32]
    model.pos_embed[0, 0] = 0.0
    model.pos_embed[0, 1:] = torch.cat([line[:, None].expand(8, 8, 32), line[None].expand(8, 8, 32)], dim=2).reshape(64, 64)
    nn.init.normal_(model.cls_token, std=0.5)


@torch.no_grad()
def accuracy(model: nn.Module, part: str) -> float:
    """Share of a part's images that are classified right."""
    images, classes = tensors(part)
    return float((model(images).argmax(1) == classes).float().mean())


def train(epochs: int, drop: float) -> nn.Module:
    """A dense model in eval mode.

    Args:
        epochs: passes over the training part.
        drop: share of patches left out of every training image: it is cheaper, and prepares the model for pruning.
    """
    torch.manual_seed(SEED)
    model: nn.Module = timm().create_model(ARCHITECTURE, num_classes=CLASSES, patch_drop_rate=drop, **SHAPE)
    lay_out(model)
    model.train()
    fit(model, model, epochs, 2e-3)
    return model.eval()


def adapt(model: nn.Module, epochs: int) -> None:
    """Train on with tokens dropped by cls-attention at thresholds that change from batch to batch, none to most of the tokens."""
    generator = torch.Generator().manual_seed(SEED)

    def pruned(images: Tensor) -> Tensor:
        factor = LEAST * (MOST / LEAST) ** float(torch.rand((), generator=generator))
        dropping = models.prune(model, "cls-attention", thresholds=[factor * part for part in RISING])
        logits: Tensor = dropping(images)["logits"]
        return logits

    fit(model, pruned, epochs, 1e-3)


def fit(model: nn.Module, run: Callable[[Tensor], Tensor], epochs: int, rate: float) -> None:
    """Passes over the training part with AdamW and one cycle of the learning rate; ``run`` gives the logits."""
    images, classes = tensors("train")
    generator, batch = torch.Generator().manual_seed(SEED), 64
    steps = epochs * -(-len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            loss = nn.functional.cross_entropy(run(shifted(images[chosen], generator)), classes[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def config() -> dict[str, Any]:
    """config.json in timm's hub layout."""
    return {
        "architecture": ARCHITECTURE,
        "num_classes": CLASSES,
        "num_features": SHAPE["embed_dim"],
        "global_pool": "token",
        "model_args": SHAPE,
        "pretrained_cfg": {
            "tag": "digits",
            "input_size": [SHAPE["in_chans"], SHAPE["img_size"], SHAPE["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN],
            "std": [STD],
            "num_classes": CLASSES,
            "label_names": [str(digit) for digit in range(CLASSES)],
            "license": "apache-2.0",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


CARD = """# digits-vit

A small vision transformer that reads handwritten digits: 8 x 8 grey pixels, a token per pixel and a CLS token, width {embed_dim},
{depth} blocks of {num_heads} heads, {count:,} weights, 10 classes. tpcompile ships it so that demo, tests and documentation have a real
trained vision model with 65 tokens that needs no download. Load it with `tpcompile.models.load("{name}")`, or as a directory in
timm's hub layout.

**What it is for.** Trying token pruning end to end: accuracy with and without dropped tokens, engines that agree with the masked
model, pictures of kept pixels. Recipes chosen for it: `recipes/digits-70.yaml`, `digits-50.yaml`, `digits-30.yaml`.

**Data.** The 1,797 images of scikit-learn's `load_digits`: the test set of the *Optical Recognition of Handwritten Digits* data of E.
Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998 (doi 10.24432/C50P49), licensed CC BY 4.0; scikit-learn distributes its copy
under BSD-3-Clause. Pixels 0 to 16 become `round(16ths * 255 / 16)`.

**Split**, by index modulo 5: 0, 1, 2 train; 3 calibration, on which settings and pruning thresholds were chosen; 4 test. Digits of one
writer may stand in several parts, so the figures say nothing about new writers.

**Training.** `benchmarks/train_digits.py`, seed {seed}, AdamW, shifts by up to one pixel, label smoothing 0.1: {epochs} epochs with
{drop:.0%} of the patches left out of every image, then {adapt} with `cls-attention` dropping none to most of them, so that the model
knows pruned inputs; about two minutes on one CPU thread.

| part | images | accuracy |
|---|---|---|
{rows}

**Limits.** It knows upright, centred, white-on-black digits of 8 x 8 pixels and nothing else, always answers with one of ten digits,
and was never tested for use on documents, forms or people's records.

**Licence** of the weights: Apache-2.0, as the project; the data's licence asks for the attribution above.
"""


def card(model: nn.Module, found: dict[str, float], options: dict[str, Any]) -> str:
    """README.md: what the model is, where it comes from, how good it is and what it is not for."""
    rows = "\n".join(f"| {part} | {len(digits(part)[1])} | {value:.2%} |" for part, value in found.items())
    count = sum(weight.numel() for weight in model.parameters())
    return CARD.format(**SHAPE, **options, count=count, name=DIGITS, seed=SEED, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "models" / "digits")
    parser.add_argument("--epochs", type=int, default=60, help="without pruning")
    parser.add_argument("--adapt", type=int, default=20, help="epochs with pruning")
    parser.add_argument("--drop", type=float, default=0.5, help="share of patches left out without pruning")
    options = parser.parse_args()
    begin = time.perf_counter()
    model = train(options.epochs, options.drop)
    adapt(model, options.adapt)
    seconds = time.perf_counter() - begin
    found = {part: accuracy(model, part) for part in ("train", "calibration", "test")}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "model.safetensors").write_bytes(save(model.state_dict()))
    (options.output / "README.md").write_text(card(model, found, vars(options)), encoding="utf-8")
    (options.output / "config.json").write_text(json.dumps(config(), indent=2) + "\n", encoding="utf-8")
    print(
        f"{seconds:.0f} s on {torch.get_num_threads()} threads; accuracy",
        {part: round(value, 4) for part, value in found.items()},
    )


if __name__ == "__main__":
    main()
