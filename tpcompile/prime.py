"""Shapes met at load: a few real inputs that show a runtime the sizes to come, carried along in the bundle."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from tpcompile.lengths import lengthen
from tpcompile.manifest import Manifest
from tpcompile.program import Program

PRIMERS = 64
"""At most so many inputs are run when an engine is loaded."""


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
        if pairs - seen and len(found) < PRIMERS:
            seen |= pairs
            found.append(feed)
    return found
