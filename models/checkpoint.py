"""Files of a model directory: JSON and weights, read without trusting them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import ModelError

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
NESTED = ("model", "state_dict")
"""Where training code keeps the weights beside its own state."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: absent, unreadable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.name} is missing in {path.parent}", fix="pass the directory that save_pretrained wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}", fix="download or save the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object", fix="download or save the model again")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a model directory, floating ones as float32; safetensors are preferred to pickles.

    Raises:
        ModelError: no weights, a corrupt or truncated file, a shard outside the directory, a NaN or infinite weight.
    """
    weights: dict[str, Tensor] = {}
    for path in _files(folder):
        weights |= _read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    return _sound(weights)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All weights of one safetensors file, floating ones as float32.

    Raises:
        ModelError: a corrupt or truncated file, a NaN or infinite weight.
    """
    return _sound(_read_safetensors(path))


def read_saved(path: Path) -> dict[str, Tensor]:
    """All weights of one file that torch.save wrote, floating ones as float32; of a training state what stands under `NESTED`.

    Raises:
        ModelError: the file is corrupt, holds more than weights, or a NaN or infinite one.
    """
    return _sound(read_pickled(path))


def _sound(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with floating ones as float32; a NaN or infinite one is refused."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise ModelError(
                f"weight {name} holds {bad} NaN or infinite of {weight.numel()} values", fix="train or save the model again"
            )
    return {name: weight.float() if weight.is_floating_point() else weight for name, weight in weights.items()}


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values in order of name: the same for every file format."""
    state = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        state.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        state.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The weight files to read: one file, or the shards an index names."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [_shard(folder, shard) for shard in _shards(index)]
    raise ModelError(
        f"no weights in {folder}", fix=f"the directory must hold {SAFETENSORS} (or {PICKLED}), or an index of shards"
    )


def _shards(index: Path) -> list[str]:
    """The file names an index lists, each once."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise ModelError(f"{index} holds no weight_map", fix="download or save the model again")
    return sorted(set(table.values()))


def _shard(folder: Path, name: str) -> Path:
    """A shard's path; it must lie in the directory itself."""
    if Path(name).name != name or not (folder / name).is_file():
        raise ModelError(f"the index names the shard {name!r}, which is not in {folder}", fix="download or save the model again")
    return folder / name


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is truncated or corrupt: {error}", fix="download or save the model again") from error
    return weights


def read_pickled(path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors that ``torch.save`` wrote; nothing else is unpickled.

    Raises:
        ModelError: the file is corrupt or holds more.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt pickle makes the reader raise almost anything
        raise ModelError(
            f"{path} is corrupt, or holds more than weights, which tpcompile does not unpickle",
            fix="save the model as safetensors",
        ) from error
    inner = [weights[key] for key in NESTED if isinstance(weights, dict) and isinstance(weights.get(key), dict)]
    weights = inner[0] if inner else weights
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ModelError(f"{path} is not a flat dict of weights", fix="save the model as safetensors")
    return weights
