"""Several samples of different lengths for any program: real data where there is some, made-up inputs where there is none."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.images import CONFIG
from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample
from tpcompile.spec import Patches, TensorSpec

LONGEST = 96
"""Tokens of the longest made-up input: enough to differ, and quick."""
POOL = 64
"""Texts to choose lengths from."""


@dataclass(frozen=True)
class Wants:
    """What samples are made for.

    Attributes:
        inputs: of the program.
        dims: dynamic dim -> least and greatest size.
        ranges: input -> least and greatest value, where known.
        folder: with ``tokenizer.json`` or ``preprocessor_config.json``, where there is one.
        patches: which part of an image each token is.
        examples: inputs that are known to work.
    """

    inputs: Sequence[TensorSpec]
    dims: Mapping[str, tuple[int, int]]
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    folder: Path | None = None
    patches: Patches | None = None
    examples: Sequence[Mapping[str, NDArray[Any]]] = ()


def gather(wants: Wants, count: int, data: str | Path | None = None, truncate: bool = False) -> list[Sample]:
    """Samples, shortest first.

    Args:
        wants: what they are for.
        count: how many; data given by the caller may hold fewer.
        data: see ``tpcompile.data.load.load_data``; None: the standard library's docstrings where there is a tokenizer, images where they
            come with the package, topped up with the examples and with made-up inputs.
        truncate: cut texts that are too long.
    """
    names = tuple(spec.name for spec in wants.inputs)
    longest = wants.dims.get("seq", (2, 512))[1]
    if data is not None:
        folder = wants.folder or Path()
        rows = load_data(data, folder, longest, count, truncate=truncate, names=names, patches=wants.patches)
    else:
        rows = _spread(_real(wants, names, longest), count)
        rows += [_sample("example", example, wants) for example in wants.examples][: max(0, count - len(rows))]
        rows += made(wants, count - len(rows))
    return sorted(rows, key=lambda row: row.length)


def _real(wants: Wants, names: tuple[str, ...], longest: int) -> list[Sample]:
    """What the package itself has for this kind of program; empty where it has nothing."""
    if wants.folder is None:
        return []
    grey = (wants.folder / CONFIG).is_file() and wants.inputs[0].shape[1:] == (1, 8, 8)
    if not grey and not (wants.folder / "tokenizer.json").is_file():
        return []
    spec = "digits:test" if grey else "docstrings"
    return load_data(spec, wants.folder, longest, POOL, names=names, patches=wants.patches)


def _spread(rows: list[Sample], count: int) -> list[Sample]:
    """Some of them, evenly from the shortest to the longest."""
    ordered = sorted(rows, key=lambda row: row.length)
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)]


def made(wants: Wants, count: int, seed: int = 0) -> list[Sample]:
    """Made-up inputs: sizes from the least to the greatest, values as the examples have them; the same every time.

    Masks of 0 and 1 begin with ones and, in every second sample, end with zeros; so they are never empty.
    """
    rng = np.random.default_rng(seed)
    first = {spec.shape[0] for spec in wants.inputs if spec.shape}
    rows = []
    for i in range(count):
        sizes = {name: 1 if name in first else _size(*bounds, i, count) for name, bounds in wants.dims.items()}
        inputs = {spec.name: _value(spec, sizes, wants, i, rng) for spec in wants.inputs}
        rows.append(_sample("made up", inputs, wants))
    return rows


def _sample(text: str, inputs: Mapping[str, NDArray[Any]], wants: Wants) -> Sample:
    """A sample that knows its length: the patches, or the largest of its dynamic sizes, or its second dim."""
    shown = [
        size
        for spec in wants.inputs
        for size, name in zip(inputs[spec.name].shape, spec.shape, strict=True)
        if isinstance(name, str) and name != spec.shape[0]
    ]
    fixed = [value.shape[1] for value in inputs.values() if value.ndim > 1]
    return Sample(text, dict(inputs), tokens=wants.patches.tokens if wants.patches else max(shown or fixed or [1]))


def _size(low: int, high: int, i: int, count: int) -> int:
    """The i-th of so many sizes, in equal ratios."""
    low = max(low, 1)
    top = max(low, min(high, LONGEST))
    return round(low * math.exp(math.log(top / low) * (i + 1) / count))


def _value(spec: TensorSpec, sizes: Mapping[str, int], wants: Wants, i: int, rng: np.random.Generator) -> NDArray[Any]:
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
    seen = [example[spec.name] for example in wants.examples if spec.name in example]
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "b":
        value = rng.random(shape) < 0.6
        value[..., :1] = True
        return value
    if dtype.kind in "iu":
        low, high = wants.ranges.get(spec.name) or _range(seen)
        return _mask(shape, i).astype(dtype) if (low, high) == (0, 1) else rng.integers(low, high, shape, dtype, endpoint=True)
    mean = float(np.mean([np.mean(value) for value in seen])) if seen else 0.0
    scale = float(np.mean([np.std(value) for value in seen])) if seen else 1.0
    return (mean + (scale or 1.0) * rng.standard_normal(shape)).astype(dtype)


def _range(seen: Sequence[NDArray[Any]]) -> tuple[int, int]:
    return (min(int(value.min()) for value in seen), max(int(value.max()) for value in seen)) if seen else (0, 1)


def _mask(shape: tuple[int, ...], i: int) -> NDArray[np.bool_]:
    """True, but for the last quarter of every second sample."""
    value = np.ones(shape, dtype=bool)
    if i % 2 and shape:
        value[..., shape[-1] - shape[-1] // 4 :] = False
    return value


def apart(inputs: Mapping[str, NDArray[Any]], ragged: bool) -> list[dict[str, NDArray[Any]]]:
    """The samples of an example; where the batch is not dynamic it is one sample, whatever its size."""
    count = len(next(iter(inputs.values()))) if ragged else 1
    return [{name: value[b : b + 1] if ragged else value for name, value in inputs.items()} for b in range(count)]


def groups(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Cut samples into batches of at most ``size`` that can be put together: indices into ``samples``, a list per batch."""
    batch: list[int] = []
    for i in range(len(samples)):
        if batch and (len(batch) == size or not _fit(samples[batch[0]], samples[i])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _fit(a: Sample, b: Sample) -> bool:
    """Whether two samples can share a batch: integers of two dims can be padded, everything else needs one shape."""
    padded = all(value.ndim == 2 and value.dtype.kind in "iub" for row in (a, b) for value in row.inputs.values())
    return padded or all(a.inputs[name].shape == b.inputs[name].shape for name in a.inputs)
