"""Inputs padded to few lengths, where that was proved to change nothing: what the manifest says, done to arrays and undone.

A runtime that prepares anew for each shape then meets few. Padding stands on the right, with 0 in the mask that tells it from tokens.
Or it meets them all at load: one input cut to every length.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from tpcompile.kept import Kept
from tpcompile.manifest import Manifest
from tpcompile.rows import Rows


def length(arrays: Mapping[str, np.ndarray], manifest: Manifest) -> int:
    """Tokens of an input, with the padding that came along; 0 where the manifest pads nothing."""
    return arrays[manifest.padding].shape[1] if manifest.lengths else 0


def lengthen(arrays: Mapping[str, np.ndarray], manifest: Manifest) -> dict[str, np.ndarray]:
    """The inputs at the next length of the ladder, where it has one that the engine takes; else as they are.

    Also as they are: inputs whose mask is not what the proof takes it for, 0 or 1, and 1 at position 0.
    """
    if not manifest.lengths:
        return dict(arrays)
    mask, own = arrays[manifest.padding], length(arrays, manifest)
    dims = {tensor.name: tensor.shape for tensor in manifest.inputs}
    dim = str(dims[manifest.padding][1])
    wanted = min(Rows(manifest.lengths).rung(own), manifest.dims.get(dim, (0, own))[1])
    if wanted <= own or not ((mask == 0) | (mask == 1)).all() or not (mask[:, 0] == 1).all():
        return dict(arrays)
    return {
        name: np.pad(array, [(0, wanted - own if size == dim else 0) for size in dims[name]]) for name, array in arrays.items()
    }


def cuts(arrays: Mapping[str, np.ndarray], manifest: Manifest) -> Iterator[dict[str, np.ndarray]]:
    """An input that was checked, at every size that ``manifest.swept`` has; as it is where nothing is swept, or is shorter."""
    shapes = {tensor.name: tensor.shape for tensor in manifest.inputs}
    for most in manifest.swept or (None,):
        yield {name: x[tuple(slice(most if size in manifest.dims else None) for size in shapes[name])] for name, x in arrays.items()}


def shorten(values: Mapping[str, np.ndarray], manifest: Manifest, own: int) -> dict[str, np.ndarray]:
    """Outputs with a row per token without those of the padding; all else as it is."""
    along = manifest.along if manifest.lengths else {}
    return {name: np.take(value, range(own), along[name]) if name in along else value for name, value in values.items()}


def unpadded(kept: Kept, own: int) -> Kept:
    """What the sites decided about the tokens alone; ``own`` 0: as it is."""
    if not own:
        return kept
    masks, scores, groups = (tuple(each[:own] for each in rows) for rows in (kept.masks, kept.scores, kept.groups))
    return replace(kept, masks=masks, scores=scores, groups=groups)
