"""Real data of the kind an engine will meet, to calibrate or fit on: the caller's, or the calibration part of what comes with a model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tpcompile.data.images import CONFIG
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample, batches, collate
from tpcompile.data.tensors import is_tensors
from tpcompile.errors import UsageError
from tpcompile.inputs import Takes, array_of
from tpcompile.plan import Data
from tpcompile.subject import Subject

CALIBRATION = 100
"""The most samples that are read."""
BATCH = 8
"""Samples an inference, where batches may be any."""
TOKENS = (2, 512)
"""Least and most tokens of a text where the model does not say."""
ARRAYS = "give real inputs: --calibrate F, a file or folder of tensors; in Python also calibrate=[{name: array, ...}, ...]"


def calibration(
    folder: Path, subject: Subject, given: Data | None, takes: Takes, why: str, fix: str = ARRAYS
) -> tuple[str, list[Sample]]:
    """Samples that fit, and what they are called.

    Args:
        folder: with what ``Subject.carry`` put there.
        subject: the model.
        given: by the caller; None: the calibration part of what comes with the model.
        takes: what they are for; texts shorter than its ``seq`` are left out.
        why: what needs data, for the refusal.
        fix: its way out.

    Raises:
        UsageError: there is none, it cannot be read, or it holds no sample that is long enough.
        InputError: a sample does not fit: torch would fail on it, or read what is not there.
    """
    tokens = takes.dims.get("seq")
    if given is not None and not isinstance(given, (str, Path)):
        name = "the caller"
        rows = [Sample("", {name: array_of(name, value) for name, value in one.items()}) for one in given]
    else:
        name, rows = _read(folder, subject, given, takes, why, fix)
    if not rows:
        raise UsageError(f"{name} gives no sample{f' of {tokens[0]} tokens or more' if tokens else ''}", fix=fix)
    # A sample comes alone, however many the engine takes at once.
    together = {spec.shape[0] for spec in takes.inputs if spec.shape}
    alone = replace(takes, dims={dim: sizes for dim, sizes in takes.dims.items() if dim not in together})
    for row in rows:
        alone.check(row.inputs)
    return name, rows


def _read(folder: Path, subject: Subject, given: str | Path | None, takes: Takes, why: str, fix: str) -> tuple[str, list[Sample]]:
    """What a specification names, or what comes with the model; texts that are too short are left out."""
    if given is None:
        grey = (folder / CONFIG).is_file() and next(iter(subject.inputs.values())).shape[1:] == (1, 8, 8)
        given = "docstrings:calibration" if (folder / "tokenizer.json").is_file() else "digits:calibration" if grey else None
    if given is None:
        raise UsageError(f"{why}, and none comes with this model", fix=fix)
    if not is_tensors(Path(given)) and not any((folder / name).is_file() for name in ("tokenizer.json", CONFIG)):
        raise UsageError(f"{given} cannot be read: this model has no tokenizer and no preprocessing", fix=fix)
    least, most = takes.dims.get("seq", TOKENS)
    names = tuple(spec.name for spec in takes.inputs)
    rows = load_data(given, folder, most, CALIBRATION, names=names, patches=subject.patches)
    return str(given), [row for row in rows if row.length >= least or "seq" not in takes.dims]


def grouped(rows: Sequence[Sample], policy: str) -> list[dict[str, np.ndarray]]:
    """Samples as inputs, where batches may be a few together."""
    groups = batches(rows, BATCH if policy == "ragged" else 1, by_length=True)
    return [collate([rows[i] for i in group]) for group in groups]
