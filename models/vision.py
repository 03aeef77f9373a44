"""Vision transformers of timm, by name or from a directory in timm's hub layout, to a `Source`."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.data.images import CONFIG as PREPROCESSOR
from tpcompile.data.images import Preprocessing
from tpcompile.errors import ModelError, TpcompileError, UsageError, first_line
from tpcompile.models import importers
from tpcompile.models.checkpoint import digest, read_json, read_safetensors, read_saved, read_weights
from tpcompile.models.families import find, vit
from tpcompile.models.importers import ltmp
from tpcompile.models.library import listed, timm
from tpcompile.models.source import Source
from tpcompile.spec import Patches

PREFIX = "timm/"
"""Marks a source as a model of timm by name."""

SAVED = (".pth", ".pt", ".tar")
"""Endings of files that torch.save wrote."""

PREPARED: dict[str, Any] = {
    "interpolation": "bicubic", "crop_pct": 0.875, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)
}  # fmt: skip
"""How the official code of DeiT and of the methods built on it prepares images."""

SEED = 0
"""Of random weights and of the example image."""

NOTE = f"random weights, seed {SEED}: for parity and latency, never accuracy"


def is_timm(folder: Path) -> bool:
    """Whether a directory is in timm's hub layout."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return isinstance(config.get("architecture"), str) and "model_type" not in config


def from_name(named: str, checkpoint: Path | None) -> Source:
    """Build ``timm/NAME``, with the weights of a checkpoint or with random ones.

    Args:
        named: the source's name.
        checkpoint: safetensors, or what torch.save wrote; of timm's names, or an official checkpoint of a pruning method.

    Raises:
        UsageError: timm has no such model, or the checkpoint is of another kind of file.
        ModelError: weights that are missing, foreign, of another shape, NaN or infinite.
    """
    model = _create(named.removeprefix(PREFIX), {}, UsageError)
    if checkpoint is None:
        return source(named, model, model.pretrained_cfg, note=NOTE)
    if checkpoint.suffix not in (".safetensors", *SAVED) or not checkpoint.is_file():
        raise UsageError(
            f"{checkpoint} is no safetensors file",
            fix="write one: safetensors.torch.save_file(torch.load(PATH, weights_only=True)['model'], 'model.safetensors')",
        )
    weights = read_saved(checkpoint) if checkpoint.suffix in SAVED else read_safetensors(checkpoint)
    importer = importers.recognise({}, weights)
    if importer is None:
        _fill(model, weights, f"timm's {named.removeprefix(PREFIX)}")
        return source(named, model, model.pretrained_cfg)
    heads, size = model.blocks[0].attn.num_heads, model.patch_embed.img_size[0]
    dense, parameters = importer.read(weights, {"num_heads": heads, "img_size": size})
    return source(named, dense, model.pretrained_cfg, imported=(importer.NAME, parameters))


def thresholds(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Method and parameters of a file that holds a method's thresholds and no model; empty for any other.

    Raises:
        ModelError: a corrupt file, or thresholds that are missing for a block.
    """
    if checkpoint.suffix not in (".safetensors", *SAVED) or not checkpoint.is_file():
        return {}
    weights = read_saved(checkpoint) if checkpoint.suffix in SAVED else read_safetensors(checkpoint)
    return {ltmp.NAME: ltmp.thresholds(weights)} if weights and ltmp.alone(weights) else {}


def from_folder(folder: Path, name: str) -> Source:
    """Load a directory in timm's hub layout: ``architecture``, ``num_classes``, ``model_args``, ``pretrained_cfg``, and weights.

    Raises:
        ModelError: missing, corrupt or foreign files; NaN or infinite weights.
    """
    config = read_json(folder / "config.json")
    stated, arguments = config.get("pretrained_cfg", {}), config.get("model_args", {})
    if not isinstance(stated, dict) or not isinstance(arguments, dict):
        raise ModelError(
            f"pretrained_cfg and model_args in {folder / 'config.json'} must be objects", fix="download or save the model again"
        )
    shape: dict[str, Any] = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    model = _create(config["architecture"], shape | arguments, ModelError)
    _fill(model, read_weights(folder), "config.json")
    return source(name, model, {**model.pretrained_cfg, **stated}, assets=(folder / "config.json",))


_RESERVED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable", "exportable"}
"""Arguments of timm's factory that read files or the network, or change how a model is built: a config may not set them."""


def _create(architecture: str, arguments: Mapping[str, Any], unknown: type[TpcompileError]) -> Any:
    """A model of timm with random weights from `SEED`, in eval mode; torch's random state is left as it was.

    Raises:
        ``unknown``: timm has no such model.
        ModelError: arguments that timm refuses, or that do more than shape the model.
    """
    library = timm()
    known = [*library.list_models(), *library.list_models(pretrained=True)]
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        meant = f" (did you mean {', '.join(close)}?)" if close else ""
        raise unknown(f"timm has no model {architecture!r}{meant}", fix="list them with timm.list_models('*vit*')")
    reserved = sorted(_RESERVED & arguments.keys())
    if reserved:
        raise ModelError(f"model_args in config.json sets {', '.join(reserved)}", fix="leave out what does not shape the model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            model: nn.Module = library.create_model(architecture, pretrained=False, **arguments)
        except Exception as error:  # the library checks arguments with many exception types of its own
            raise ModelError(
                f"timm cannot build {architecture}: {first_line(error)}", fix="compare config.json with timm's"
            ) from error
    return model.eval()


def _fill(model: nn.Module, weights: Mapping[str, Tensor], asked_by: str) -> None:
    """Copy weights into a model: the same names, the same shapes.

    Raises:
        ModelError: a weight is missing, has no place, or has another shape.
    """
    expected = model.state_dict()
    missing, foreign = (sorted(a.keys() - b.keys()) for a, b in ((expected, weights), (weights, expected)))
    if missing:
        raise ModelError(
            f"weights are missing for {listed(missing)}", fix=f"pass the weights that {asked_by} asks for, all of them"
        )
    if foreign:
        raise ModelError(
            f"weights without a place in {type(model).__name__}: {listed(foreign)}",
            fix="the weights are of another model or have a prefix: save model.state_dict() of the timm model",
        )
    for name, weight in weights.items():
        if expected[name].shape != weight.shape:
            raise ModelError(
                f"{name} has shape {list(weight.shape)}, {asked_by} asks for {list(expected[name].shape)}",
                fix="the weights are of another size, or of another number of classes",
            )
    model.load_state_dict(dict(weights))


def source(
    name: str,
    model: nn.Module,
    config: Mapping[str, Any],
    assets: tuple[Path, ...] = (),
    note: str = "",
    imported: tuple[str, dict[str, Any]] | None = None,
) -> Source:
    """A vision transformer of timm as a source.

    Args:
        name: what the source calls it.
        model: dense, in eval mode.
        config: timm's ``pretrained_cfg``: how images are prepared.
        assets: files to carry along.
        note: what a reader of a report must know about the weights.
        imported: method and parameters of an official checkpoint.
    """
    parts = find(model)
    assert isinstance(parts, vit.VitParts), "find refuses every other model of timm"
    seeded = torch.Generator().manual_seed(SEED)
    config = {**config, "input_size": parts.image}
    rows, columns = parts.grid
    return Source(
        name=name,
        model=parts.dense,
        family=parts.family,
        architecture=parts.architecture,
        example={"pixel_values": torch.randn(1, *parts.image, generator=seeded)},
        dynamic={},
        ranges={},
        values={},
        weights_sha256=digest(parts.dense.state_dict()),
        assets=assets,
        documents={PREPROCESSOR: Preprocessing.from_timm(config).to_json()},
        patches=Patches(parts.prefix, rows, columns),
        note=note,
        imported=imported,
    )
