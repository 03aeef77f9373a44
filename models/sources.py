"""`load`: a model directory to a dense model, with everything an export needs to know about where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import ModelError, UsageError
from tpcompile.models import importers
from tpcompile.models.checkpoint import digest, read_json, read_weights
from tpcompile.models.families import Pooling, SentenceEncoder, architectures, find
from tpcompile.models.families.bert import ARCHITECTURES, Architecture
from tpcompile.models.library import build, fill
from tpcompile.models.sentence import Layout, read_layout

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


@dataclass(frozen=True)
class Source:
    """A loaded model.

    Attributes:
        model: dense, eval, float32; ``(input_ids, attention_mask=None, token_type_ids=None) -> dict``.
        family: name of its family.
        architecture: the library's class.
        assets: tokenizer and config files to copy into a bundle.
        max_length: longest sequence it takes.
        weights_sha256: over the weights in use, the same for every file format.
        imported: method and parameters found in an official checkpoint of a pruning method.
    """

    model: nn.Module
    family: str
    architecture: str
    assets: tuple[Path, ...]
    max_length: int
    weights_sha256: str
    imported: tuple[str, dict[str, Any]] | None = None

    def parameters(self, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """A method's parameters: what the checkpoint holds, overridden by what the caller gives.

        Raises:
            UsageError: the checkpoint holds this method's parameters but lacks one that only the caller can know.
        """
        if self.imported is None or self.imported[0] != method:
            return dict(given)
        merged = {**self.imported[1], **given}
        importers.IMPORTERS[method].demand(merged)
        return merged


def load(source: str | Path, *, pooling: str = "auto") -> Source:
    """Load a Hugging Face or sentence-transformers directory, or an official checkpoint of a pruning method.

    Args:
        source: the directory. Nothing is downloaded and no code from the directory is run.
        pooling: ``auto``: what the directory says; for a bare encoder its pooler where it has one, else the mean. ``mean`` or
            ``cls``: pool a bare encoder so.

    Raises:
        UsageError: no such directory, or a pooling that does not fit.
        ModelError: missing, corrupt or foreign files; NaN or infinite weights; an architecture no family knows.
    """
    folder = _folder(source)
    if pooling not in ("auto", *Pooling.MODES):
        raise UsageError(f"unknown pooling {pooling!r}", fix=f"use auto, {' or '.join(Pooling.MODES)}")
    layout = read_layout(folder)
    config = read_json(layout.folder / "config.json")
    if "auto_map" in config:
        raise ModelError(
            "config.json names code of its own (auto_map), which is never run", fix="use a model of transformers itself"
        )
    weights = read_weights(layout.folder)
    importer = importers.recognise(config, weights)
    if importer is None:
        return _source(_model(layout, config, weights, pooling), layout, None)
    model, parameters = importer.read(weights, config)
    return _source(model, layout, (importer.NAME, parameters))


def _source(model: nn.Module, layout: Layout, imported: tuple[str, dict[str, Any]] | None) -> Source:
    parts = find(model)
    files = (layout.folder / name for name in ASSETS)
    return Source(
        model=parts.dense,
        family=parts.family,
        architecture=parts.architecture,
        assets=tuple(path for path in files if path.is_file()),
        max_length=min(parts.max_length, layout.max_length or parts.max_length),
        weights_sha256=digest(parts.dense.state_dict()),
        imported=imported,
    )


def _folder(source: str | Path) -> Path:
    """The directory, or a refusal that says what to do instead."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{source} is a file", fix=f"pass the directory it lies in: {folder.parent}")
    if isinstance(source, str) and source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        raise UsageError(
            f"no directory {source!r}; if it is a model id, tpcompile does not download",
            fix=f"run: hf download {source} --local-dir DIR, then pass DIR",
        )
    raise UsageError(
        f"no directory {source}", fix="pass the directory that save_pretrained wrote (config.json, model.safetensors)"
    )


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
    """A classifier, or a bare encoder with pooling or with its own pooler."""
    names = _architecture(config)
    stated = _stated(config) or names.encoder
    if stated == names.classifier and not layout.pooling:
        if pooling != "auto":
            raise UsageError(f"{stated} has a head: pooling {pooling!r} has no place", fix="leave pooling at auto")
        model = build(names, names.classifier, config)
        fill(model, weights, names.base)
        return model
    chosen = pooling if pooling != "auto" else layout.pooling
    if not chosen and stated != names.encoder:
        raise ModelError(
            f"{stated} has no sentence-level output",
            fix=f"supported: {names.encoder}, {names.classifier}; or set pooling to mean or cls",
        )
    encoder: Any = build(names, names.encoder, config)
    has_pooler = getattr(encoder, "pooler", None) is not None and any("pooler." in name for name in weights)
    if not chosen and has_pooler:
        fill(encoder, weights, names.base)
        return find(encoder).dense
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # nothing reads it: its weights would only swell the engine
    fill(encoder, weights, names.base)
    return SentenceEncoder(encoder, chosen or "mean", layout.normalize)
