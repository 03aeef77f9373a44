"""Shapes met at load: a few real inputs that show a runtime the sizes to come, carried along in the bundle.

Where every op runs over one count, one input is enough: the shapes behind a site that left n tokens are those of an input of n tokens, so
``load`` cuts it to every length (docs/decisions/0029).
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from tpcompile.bundle import PRIMERS, Vector, write_vectors
from tpcompile.lengths import lengthen
from tpcompile.manifest import MOST_SIZES, Manifest
from tpcompile.program import Program
from tpcompile.rows import Rows

COVER = 64
"""At most so many inputs that are not cut."""


def prime(
    folder: Path, lowered: Program, manifest: Manifest, feeds: Sequence[Mapping[str, np.ndarray]], square: bool
) -> Manifest:
    """Write what ``load`` runs into an engine's folder; the manifest that says so.

    Args:
        folder: gets ``prime.safetensors``.
        lowered: the engine's program.
        manifest: with the dynamic dims, the ladders and the copies.
        feeds: real inputs; none: nothing is run.
        square: every op of the program runs over one count.
    """
    if not feeds:
        return manifest
    if square and len(manifest.dims) == 1 and manifest.copies == 1:
        (dim,) = manifest.dims
        dims = {tensor.name: tensor.shape for tensor in manifest.inputs}
        known = [next(x.shape[dims[name].index(dim)] for name, x in feed.items() if dim in dims[name]) for feed in feeds]
        most, longest = max(zip(known, feeds, strict=True), key=lambda pair: pair[0])
        every, counted = range(manifest.dims[dim][0], most + 1), _tokens(lowered, longest) == most
        primers, swept = [longest], {dim: _sizes(manifest, {*known}, every, counted)}
    else:
        primers, swept = cover(lowered, manifest, feeds), {}
    write_vectors(folder / PRIMERS, [Vector(one, {}, ()) for one in primers])
    return manifest.model_copy(update={"primed": len(primers), "swept": swept})


def _tokens(lowered: Program, feed: Mapping[str, np.ndarray]) -> int:
    """Tokens of an input, as the first site sees them; 0 without sites."""
    keep = lowered.trace(**{name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in feed.items()}).keep
    return int(keep[0].shape[1]) if keep else 0


def _sizes(manifest: Manifest, known: Collection[int], every: range, counted: bool) -> tuple[int, ...]:
    """The sizes to come, the largest first: of inputs, and, where a size is a number of tokens, of what sites leave."""
    lengths, counts = Rows(manifest.lengths), Rows(manifest.buckets)
    inputs = known if counted and len(known) == 1 else every
    found = {lengths.rung(size) for size in inputs} | ({counts.rung(size) for size in every} if counted else set())
    sizes = sorted({min(size, every[-1]) for size in found}, reverse=True)
    thin = np.linspace(0, len(sizes) - 1, min(MOST_SIZES, len(sizes))).round().astype(int)
    return tuple(sizes[i] for i in thin)


def cover(lowered: Program, manifest: Manifest, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[Mapping[str, np.ndarray]]:
    """Inputs that show the sizes that the others will show: of those that bring a pair of neighbouring sizes not seen before.

    Args:
        lowered: the engine's program.
        manifest: with the ladder of lengths.
        feeds: real inputs.
    """
    seen: set[tuple[int, int, int]] = set()
    found: list[Mapping[str, np.ndarray]] = []
    for feed in feeds:
        padded = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in lengthen(feed, manifest).items()}
        held = [
            next(iter(padded.values())).shape[1],
            *(0 if one is None else one.shape[1] for one in lowered.trace(**padded).index),
        ]
        pairs = {(site, *pair) for site, pair in enumerate(pairwise(held))}
        if pairs - seen and len(found) < COVER:
            seen |= pairs
            found.append(feed)
    return found
