"""Streams of inputs, and thresholds that give them a FLOPs ratio.

MiniLM with its real weights reads docstrings of 64 to 256 tokens; its thresholds rise linearly over the layers, found by bisection on
the other half of the docstrings. The other shapes have random weights: a constant share of the tokens stays behind every site, and each
threshold is the quantile of the scores that calibration inputs give there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from cells import Workload
from PIL import Image
from safetensors.torch import save_file
from streams import Encoder, calibration_texts, choose, rising, sizes
from torch import nn

from tpcompile import models
from tpcompile.data.images import CONFIG, Preprocessing, open_image
from tpcompile.data.load import docstrings, load_data, open_tokenizer
from tpcompile.data.samples import Sample
from tpcompile.demo import model_folder
from tpcompile.models.library import transformers

CALIBRATION, TRIED = 4, 24
"""Inputs that thresholds are chosen on, and that an export measures."""
STEPS = 16
"""Halvings of a share: far finer than one token."""
SPREAD = 0.05
"""Of random weights: more than the libraries' 0.02, so that attention is not the same everywhere."""
MATRIX = 2


def keep_rate(encoder: Encoder, tokens: int, sites: Sequence[int], target: float) -> float:
    """The share of the tokens that every site keeps, one apart, so that the FLOPs are the dense ones over ``target``."""
    low, high = 0.05, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        counts = [tokens]
        for layer in range(encoder.layers):
            counts.append(1 + round((counts[-1] - 1) * middle) if layer in sites else counts[-1])
        low, high = (low, middle) if encoder.ratio(counts) < target else (middle, high)
    return low


def quantiles(model: nn.Module, method: str, inputs: Sequence[Mapping[str, np.ndarray]], rate: float, sites: Sequence[int],
              layers: int) -> list[float]:  # fmt: skip
    """A threshold a layer, 0 where there is no site: of the scores that calibration inputs give there, what ``1 - rate`` lie below."""
    found = [0.0] * layers
    for site in sites:
        found[site] = 1e-9  # a threshold nobody misses: the scores are wanted
        pruned, scores = models.prune(model, method, thresholds=found), []
        for one in inputs:
            trace = pruned.trace(**{name: torch.from_numpy(value) for name, value in one.items()})
            alive, score = trace.kept[site], trace.scores[site]
            assert score is not None
            scores.append(score[alive][1:])
        rest = torch.cat(scores)
        if len(rest):  # behind deep cuts the first token may stand alone, and no threshold matters
            found[site] = float(torch.quantile(rest.float(), 1 - rate))
    return found


@dataclass(frozen=True)
class Chosen:
    """A workload ready to be compiled.

    Attributes:
        source: what ``tpcompile.models.load`` takes.
        peer: the model as a directory of transformers, for peers.
        thresholds: one a layer.
        stream: the samples.
        calibration: other inputs, for what an export measures; None where the compiler brings them along.
        checkpoint: weights of the source, where it comes without.
    """

    source: str
    peer: Path
    thresholds: list[float]
    stream: list[Sample]
    calibration: list[Mapping[str, np.ndarray]] | None = None
    checkpoint: Path | None = None


def prepare(name: str, workload: Workload, ratio: float, folder: Path) -> Chosen:
    """Make what is missing in a folder, and choose thresholds once."""
    folder.mkdir(parents=True, exist_ok=True)
    if workload.peer is not None:
        return _images(workload, ratio, folder)
    if workload.tokens:
        return _random_texts(workload, ratio, folder)
    shape = rising(sizes(model_folder())["num_hidden_layers"])
    thresholds = _once(folder / f"{ratio:g}.json", lambda: choose(model_folder(), calibration_texts(), ratio, shape))
    stream = load_data("docstrings:stream", model_folder(), 256, workload.samples)
    if len(stream) < workload.samples:  # the long stream: every text of its half, short ones too
        stream = load_data("docstrings:report", model_folder(), 256, workload.samples)
    return Chosen(str(model_folder()), model_folder(), thresholds, stream)


def _once(path: Path, make: Any) -> Any:
    """What a function gives, kept in a file."""
    if not path.is_file():
        path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def _random_texts(workload: Workload, ratio: float, folder: Path) -> Chosen:
    """BERT-base's shape, and docstrings one behind the other, cut into pieces of one length."""
    model = folder / "model"
    if not model.is_dir():
        library = transformers()
        torch.manual_seed(0)
        library.BertModel(library.BertConfig(initializer_range=SPREAD)).save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            copyfile(model_folder() / name, model / name)
    tokenizer = open_tokenizer(model)
    flat = np.array(tokenizer.encode(" ".join(docstrings()[:400]), add_special_tokens=False).ids, dtype=np.int64)
    pieces = flat[: len(flat) // workload.tokens * workload.tokens].reshape(-1, 1, workload.tokens)
    rows = [{"input_ids": piece, "attention_mask": np.ones_like(piece)} for piece in pieces]
    encoder = Encoder.load(model)
    sites = range(encoder.layers)
    rate = keep_rate(encoder, workload.tokens, sites, ratio)
    last = rows[-CALIBRATION:]
    thresholds = _once(
        folder / f"{ratio:g}.json", lambda: quantiles(encoder.model, workload.method, last, rate, sites, encoder.layers)
    )
    stream = [Sample("", row) for row in rows[: workload.samples]]
    return Chosen(str(model), model, thresholds, stream, rows[-TRIED:])


def _images(workload: Workload, ratio: float, folder: Path) -> Chosen:
    """A timm model, smooth noise for images, and the same shape in transformers for peers."""
    checkpoint = folder / "weights.safetensors"
    if not checkpoint.is_file():
        torch.manual_seed(0)
        widen(checkpoint, models.load(workload.source).model)
    source = models.load(workload.source, checkpoint=checkpoint)
    (folder / CONFIG).write_text(source.documents[CONFIG], encoding="utf-8")
    prepared = Preprocessing.read(folder)
    images = [np.asarray(prepared(open_image(path))) for path in noise(folder / "images", workload.samples + TRIED)]
    body: Any = getattr(source.model, "model")  # noqa: B009  # not typed
    encoder = Encoder(source.model, len(body.blocks), body.embed_dim, body.blocks[0].mlp.fc1.out_features)
    rate = keep_rate(encoder, workload.tokens, workload.sites, ratio)
    held = [{"pixel_values": image} for image in images[-TRIED:]]
    last = held[-CALIBRATION:]
    thresholds = _once(
        folder / f"{ratio:g}.json",
        lambda: quantiles(encoder.model, workload.method, last, rate, workload.sites, encoder.layers),
    )
    peer = folder / "peer"
    if not peer.is_dir():
        library = transformers()
        library.ViTForImageClassification(library.ViTConfig(**workload.peer)).save_pretrained(peer)
        library.ViTImageProcessor().save_pretrained(peer)
    stream = [Sample("", {"pixel_values": image}, tokens=workload.tokens) for image in images[: workload.samples]]
    return Chosen(workload.source, peer, thresholds, stream, held, checkpoint)


def widen(path: Path, model: nn.Module) -> None:
    """Write the weights of a model of timm's, its matrices drawn anew with ``SPREAD``.

    With timm's own 0.02 all patches get the same attention: the last site kept all of them or none.
    """
    weights = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    drawn = {name: torch.randn_like(value) * SPREAD if value.dim() == MATRIX else value for name, value in weights.items()}
    save_file(drawn, path)


def noise(folder: Path, count: int) -> list[Path]:
    """Smooth random images of 320 x 256 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for path in paths:
        coarse = Image.fromarray(generator.integers(0, 256, (20, 25, 3), dtype=np.uint8))
        coarse.resize((320, 256), Image.Resampling.BICUBIC).save(path)
    return paths
