"""Samples as tensors on disk, without pickle: what ``validate`` saves of its worst inputs, and data for any kind of engine."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample
from tpcompile.data.textfiles import read_text
from tpcompile.errors import EnvironmentFault, InputError, UsageError, first_line
from tpcompile.spec import Patches

SUFFIXES = (".safetensors", ".npz")
MAX_BYTES = 4 * 2**30
"""The most that an archive may unpack to: a small file can claim any size."""
LABEL = "label"
"""A tensor of this name is no input: the sample's class."""


def is_tensors(path: Path) -> bool:
    """Whether a path is a file of tensors, or a folder of them."""
    return path.suffix.lower() in SUFFIXES or any(True for _ in _files(path))


def read_tensors(path: Path, names: Sequence[str], limit: int | None = None, patches: Patches | None = None) -> list[Sample]:
    """One sample for each file: its tensors by the names of the inputs, each with its batch dim of 1.

    Args:
        path: a ``.safetensors`` or ``.npz`` file, or a folder of such files, taken in the order of their names.
        names: of the engine's inputs.
        limit: the most samples.
        patches: of the engine's tokens, where they are parts of an image.

    Raises:
        InputError: a file cannot be read, lacks an input, or holds a label that is no class.
    """
    files = [path] if path.suffix.lower() in SUFFIXES else sorted(_files(path))
    return [_sample(file, names, patches) for file in files[:limit]]


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES] if folder.is_dir() else []


def _sample(file: Path, names: Sequence[str], patches: Patches | None) -> Sample:
    held = _load(file)
    missing = [name for name in names if name not in held]
    if missing:
        raise InputError(f"{file} holds no tensor {missing[0]!r}", fix=f"save one tensor for each input: {', '.join(names)}")
    tokens = patches.tokens if patches is not None else 0
    if not tokens and held[names[0]].ndim < 2:
        raise InputError(f"{file}: {names[0]} is {list(held[names[0]].shape)}, not [1, tokens, ...]", fix="keep the batch dim of 1")
    beside = file.with_suffix(".txt")
    text = read_text(beside) if beside.is_file() else str(file)
    label = _label(file, held[LABEL]) if LABEL in held and LABEL not in names else None
    return Sample(text, {name: held[name] for name in names}, label=label, tokens=tokens)


def _label(file: Path, value: NDArray[Any]) -> int:
    if value.size != 1 or value.dtype.kind not in "iu" or value.item() < 0:
        raise InputError(f"{file}: the label is no class index", fix="save one integer: 0, 1, ...")
    return int(value.item())


def _load(file: Path) -> Mapping[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    try:
        if file.suffix.lower() == ".safetensors":
            found: Mapping[str, NDArray[Any]] = load_file(file)
            return found
        with zipfile.ZipFile(file) as entries:
            size = sum(entry.file_size for entry in entries.infolist())
        if size > MAX_BYTES:
            raise InputError(f"{file} unpacks to {size / 2**30:.1f} GiB", fix="save a file for each sample")
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}", fix="check the path") from error
    except Exception as error:  # a broken file makes the readers raise whatever they meet: zlib.error, TypeError, SafetensorError, ...
        fix = "write it with safetensors or numpy.savez; no objects"
        raise InputError(f"{file} holds no tensors: {first_line(error)}", fix=fix) from error


def save_worst(folder: Path, samples: Sequence[Sample], records: Sequence[Mapping[str, Any]]) -> Path:
    """Write samples so that ``--data FOLDER`` reads them again: tensors, text, and what was found of each.

    Args:
        folder: does not exist yet.
        samples: worst first.
        records: a JSON document for each.

    Raises:
        UsageError: the folder exists.
        EnvironmentFault: it cannot be written.
    """
    from safetensors.numpy import save_file

    vacant(folder)
    try:
        folder.mkdir(parents=True)
        for number, sample in enumerate(samples):
            held = {name: np.ascontiguousarray(value) for name, value in sample.inputs.items()}
            label = {} if sample.label is None else {LABEL: np.array([sample.label])}
            save_file({**held, **label}, folder / f"worst-{number}.safetensors")
            (folder / f"worst-{number}.txt").write_text(sample.text, encoding="utf-8")
        (folder / "worst.json").write_text(json.dumps(list(records), indent=1), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{folder} cannot be written: {error.strerror}", fix="choose another folder") from error
    return folder


def vacant(folder: Path) -> None:
    """Refuse a folder that exists.

    Raises:
        UsageError: it does.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists", fix="choose another folder, or remove it")
