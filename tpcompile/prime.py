"""Shapes met at load: a few real inputs that show a runtime the sizes to come, carried along in the bundle.

Where every op runs over one count, one input is enough: the shapes behind a site that left n tokens are those of an input of n tokens, so
``load`` cuts it to every length (docs/decisions/0029).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from tpcompile.bundle import PRIMERS, Vector, write_vectors
from tpcompile.lengths import lengthen
from tpcompile.manifest import MOST_SIZES, Manifest
from tpcompile.program import Program
from tpcompile.rows import MIN_COUNT, Rows

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
    swept = sweep(lowered, manifest, feeds) if square else None
    primers, sizes = ([swept[0]], swept[1]) if swept else (cover(lowered, manifest, feeds), ())
    write_vectors(folder / PRIMERS, [Vector(one, {}, ()) for one in primers])
    return manifest.model_copy(update={"primed": len(primers), "swept": sizes})


def sweep(
    lowered: Program, manifest: Manifest, feeds: Sequence[Mapping[str, np.ndarray]]
) -> tuple[Mapping[str, np.ndarray], tuple[int, ...]] | None:
    """The longest input, with the sizes of its one dynamic dim that show every shape to come.

    None where cuts of it would not: that dim is no number of tokens, an engine is several, a count lies below what inputs may have, or
    an input of so many tokens would be padded to more.

    Args:
        lowered: the engine's program, every op over one count.
        manifest: with the dynamic dims, the ladders and the copies.
        feeds: real inputs.
    """
    if len(manifest.dims) != 1 or manifest.batch != "one" or manifest.copies > 1:
        return None
    ((dim, (least, _)),) = manifest.dims.items()
    along = next((tensor.name, tensor.shape.index(dim)) for tensor in manifest.inputs if dim in tensor.shape)
    known = [feed[along[0]].shape[along[1]] for feed in feeds]
    most, longest = max(zip(known, feeds, strict=True), key=lambda pair: pair[0])
    lengths, counts, every = Rows(manifest.lengths), Rows(manifest.buckets), range(MIN_COUNT, most + 1)
    inputs = known if len({*known}) == 1 else every  # of one length throughout: counts alone differ
    sizes = {min(size, most) for size in ({lengths.rung(n) for n in inputs} | {counts.rung(n) for n in every})}
    if any(size < least or min(lengths.rung(size), most) > size for size in sizes) or _tokens(lowered, longest) != most:
        return None
    return longest, _few(sorted(sizes, reverse=True))


def _tokens(lowered: Program, feed: Mapping[str, np.ndarray]) -> int:
    """Tokens of an input, as the first site sees them; 0 without sites."""
    keep = lowered.trace(**feed).keep
    return int(keep[0].shape[1]) if keep else 0


def _few(sizes: Sequence[int]) -> tuple[int, ...]:
    """At most ``MOST_SIZES`` of falling sizes: the small ones, where most layers are, and of the large ones every second or so."""
    small = [size for size in sizes if size <= MOST_SIZES // 2]
    large = sizes[: len(sizes) - len(small)]
    thin = np.linspace(0, len(large) - 1, min(MOST_SIZES - len(small), len(large))).round().astype(int)
    return (*(large[i] for i in thin), *small)


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
        padded = lengthen(feed, manifest)
        held = [
            next(iter(padded.values())).shape[1],
            *(0 if one is None else one.shape[1] for one in lowered.trace(**padded).index),
        ]
        pairs = {(site, *pair) for site, pair in enumerate(pairwise(held))}
        if pairs - seen and len(found) < COVER:
            seen |= pairs
            found.append(feed)
    return found
