"""Kept patches shown: as lines of characters, as a darkened picture, as the path of an SVG."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tpcompile.errors import IntegrityError
from tpcompile.spec import Patches

Grid = NDArray[np.bool_]
Picture = NDArray[np.uint8]

KEPT, DROPPED = "#", "."
SHADE, WEIGHT = 44, 0.78
"""Grey level and share of the veil over dropped patches: bright ones fall to dark grey, and black ones still differ from kept black."""
LEAST_SIDE = 224
"""Pixels the longer side of a panel has at least: small pictures are enlarged by a whole factor."""
GAP = 8
"""Pixels between panels."""


def grid(mask: Grid, patches: Patches) -> Grid:
    """The patches' part of a mask over tokens ``[N]``, as ``[rows, columns]``.

    Raises:
        IntegrityError: the mask is over another number of tokens than the manifest says.
    """
    if mask.shape != (patches.tokens,):
        raise IntegrityError(f"the manifest says {patches.tokens} tokens, the engine has {mask.size}", fix="export again")
    return mask[patches.prefix :].reshape(patches.rows, patches.columns)


def lines(kept: Grid) -> list[str]:
    """A character per patch, a line per row."""
    return ["".join(KEPT if patch else DROPPED for patch in row) for row in kept]


def counts(mask: Grid, patches: Patches) -> str:
    """``11 of 16 patches, 1 of 1 prefix tokens``."""
    shown = f"{int(grid(mask, patches).sum())} of {patches.rows * patches.columns} patches"
    return f"{shown}, {int(mask[: patches.prefix].sum())} of {patches.prefix} prefix tokens" if patches.prefix else shown


def path(kept: Grid) -> str:
    """The dropped patches as the ``d`` of an SVG path in units of patches: a rectangle for each run in a row."""
    found = []
    for y, row in enumerate(kept):
        edges = np.flatnonzero(np.diff(np.concatenate([[True], row, [True]])))
        found += [f"M{start} {y}h{end - start}v1h-{end - start}z" for start, end in edges.reshape(-1, 2)]
    return "".join(found)


def darken(picture: Picture, kept: Grid) -> Picture:
    """A picture ``[H, W, 3]`` with a dark veil over the dropped patches of ``[rows, columns]``."""
    rows, columns = (np.arange(size) * count // size for size, count in zip(picture.shape[:2], kept.shape, strict=True))
    veiled = np.rint(picture * (1 - WEIGHT) + SHADE * WEIGHT).astype(np.uint8)
    return np.where(kept[rows][:, columns, None], picture, veiled)


def panels(picture: Picture, grids: Sequence[Grid]) -> Picture:
    """The picture, then one darkened copy per site, side by side on white."""
    factor = -(-LEAST_SIDE // max(picture.shape[:2]))
    large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    gap = np.full((large.shape[0], GAP, 3), 255, dtype=np.uint8)
    parts = [large]
    for kept in grids:
        parts += [gap, darken(large, kept)]
    return np.concatenate(parts, axis=1)


def png(picture: Picture) -> bytes:
    """A picture ``[H, W, 3]`` as PNG; the same bytes for the same pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
