"""A Hugging Face or sentence-transformers directory, or an official checkpoint of a pruning method, to a `Source`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import ModelError, UsageError
from tpcompile.models import importers, vision
from tpcompile.models.checkpoint import digest, read_json, read_weights
from tpcompile.models.families import Pooling, SentenceEncoder, TokenEncoder, architectures, bert, find, vit
from tpcompile.models.families.bert import ARCHITECTURES, Architecture
from tpcompile.models.library import build, fill
from tpcompile.models.sentence import Layout, read_layout
from tpcompile.models.source import Source

ASSETS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
)
"""Files of a model directory that a bundle carries along."""

EXAMPLE_LENGTH = 16
"""Tokens in the example input: the length is dynamic, so any small one serves."""

TOKENS = ("tokens", "none")
"""Poolings that leave one vector per token."""


def load(folder: Path, pooling: str) -> Source:
    """Load a directory; see `tpcompile.models.load`.

    Raises:
        UsageError: a pooling that does not fit.
        ModelError: missing, corrupt or foreign files; NaN or infinite weights; an architecture no family knows.
    """
    if pooling not in ("auto", *Pooling.MODES, *TOKENS):
        raise UsageError(f"unknown pooling {pooling!r}", fix=f"use auto, {', '.join(Pooling.MODES)} or {TOKENS[0]}")
    layout = read_layout(folder)
    config = read_json(layout.folder / "config.json")
    if "auto_map" in config:
        raise ModelError(
            "config.json names code of its own (auto_map), which is never run", fix="use a model of transformers itself"
        )
    weights = read_weights(layout.folder) | importers.beside(layout.folder)
    importer = importers.recognise(config, weights)
    if importer is None:
        return _source(_model(layout, config, weights, pooling), folder, layout, None)
    model, parameters = importer.read(weights, config)
    if isinstance(find(model), vit.VitParts):
        return vision.source(folder.resolve().name, model, vision.PREPARED, imported=(importer.NAME, parameters))
    return _source(model, folder, layout, (importer.NAME, parameters))


def _source(model: nn.Module, folder: Path, layout: Layout, imported: tuple[str, dict[str, Any]] | None) -> Source:
    parts = find(model)
    assert isinstance(parts, bert.BertParts), "every architecture of the table is of the BERT family"
    ids = (torch.arange(EXAMPLE_LENGTH) * 7 + 3) % parts.vocabulary
    example = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones(1, EXAMPLE_LENGTH, dtype=torch.int64)}
    files = (layout.folder / name for name in ASSETS)
    return Source(
        name=_name(folder),
        model=parts.dense,
        family=parts.family,
        architecture=parts.architecture,
        example=example,
        dynamic={name: {1: "seq"} for name in example},
        ranges={"seq": (2, min(parts.max_length, layout.max_length or parts.max_length))},
        values={"input_ids": (0, parts.vocabulary - 1), "attention_mask": (0, 1)},
        weights_sha256=digest(parts.dense.state_dict()),
        assets=tuple(path for path in files if path.is_file()),
        imported=imported,
    )


def _name(folder: Path) -> str:
    """What the config calls the model, else the folder's name."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    stated = config.get("_name_or_path")
    return stated if isinstance(stated, str) and stated and not Path(stated).is_absolute() else folder.resolve().name


def _architecture(config: Mapping[str, Any]) -> Architecture:
    """The row of the family table for a config."""
    kind = config.get("model_type")
    names = next((row for row in ARCHITECTURES if row.name == kind), None)
    if names is None:
        raise ModelError(
            f"no family knows model_type {kind!r}", fix=f"supported: {', '.join(architectures())}; see docs/add-a-method.md"
        )
    return names


def _stated(config: Mapping[str, Any]) -> str:
    """The class a config names; empty where it names none."""
    classes = config.get("architectures") or [""]
    if not isinstance(classes, list) or not isinstance(classes[0], str):
        raise ModelError(
            f"architectures in config.json is not a list of class names: {classes!r}", fix="download the model again"
        )
    return classes[0]


def _model(layout: Layout, config: Mapping[str, Any], weights: Mapping[str, Tensor], pooling: str) -> nn.Module:
    """A model with its own head, or a bare encoder with pooling, with its own pooler, or with neither."""
    names = _architecture(config)
    stated = _stated(config) or names.encoder
    if stated in names.heads_by_class and not layout.pooling:
        if pooling != "auto":
            raise UsageError(f"{stated} has a head: pooling {pooling!r} has no place", fix="leave pooling at auto")
        model = build(names, stated, config)
        fill(model, weights, names.base)
        return model
    chosen = pooling if pooling != "auto" else layout.pooling
    if not chosen and stated != names.encoder:
        raise ModelError(
            f"{stated} has no head that tpcompile knows",
            fix=f"supported: {names.encoder}, {', '.join(names.heads_by_class)}; or set pooling to mean, cls or tokens",
        )
    encoder: Any = build(names, names.encoder, config)
    has_pooler = getattr(encoder, "pooler", None) is not None and any("pooler." in name for name in weights)
    if not chosen and has_pooler:
        fill(encoder, weights, names.base)
        return find(encoder).dense
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # nothing reads it: its weights would only swell the engine
    fill(encoder, weights, names.base)
    return TokenEncoder(encoder) if chosen in TOKENS else SentenceEncoder(encoder, chosen or "mean", layout.normalize)
