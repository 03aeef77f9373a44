"""Kept sets compared as sets: where do engine and reference first disagree, and was it inside float noise?

The threshold need not be known: it lies above every dropped and not above any kept score, on both sides, and that bounds how far
a flipped token was from it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class KeptSets(Protocol):
    """What an engine kept of one input; see ``tpcompile.kept.Kept``."""

    @property
    def masks(self) -> tuple[NDArray[np.bool_], ...]:
        """Per site, bool ``[N]`` in original positions."""
        ...

    @property
    def counts(self) -> tuple[int, ...]:
        """Per site, tokens alive after it."""
        ...

    @property
    def stored(self) -> tuple[int, ...]:
        """Per site, rows held after it."""
        ...

    @property
    def lost(self) -> tuple[int, ...]:
        """Per site, tokens that found no room; empty where there is always room."""
        ...

    @property
    def scores(self) -> tuple[NDArray[np.float32], ...]:
        """Per site, float32 ``[N]``, NaN where there is none."""
        ...


@dataclass(frozen=True, eq=False)
class Decided:
    """Kept sets by themselves; see ``KeptSets``."""

    masks: tuple[NDArray[np.bool_], ...]
    scores: tuple[NDArray[np.float32], ...]
    stored: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens alive after each site."""
        return tuple(int(mask.sum()) for mask in self.masks)


@dataclass(frozen=True, slots=True)
class Flip:
    """A token that one side kept and the other dropped, at the first site where they differ.

    Attributes:
        site: index of the site.
        position: in the input.
        kept_by: ``engine`` or ``reference``.
        margin: the most that either side's score of it can be away from the threshold, relative to the site's largest score.
    """

    site: int
    position: int
    kept_by: str
    margin: float


def compare_kept(got: KeptSets, truth: KeptSets, length: int) -> tuple[tuple[Flip, ...], float]:
    """Flips at the first site where the sets differ, and the score noise seen up to there.

    Later sites are not compared: what they see follows from the first flip.

    Args:
        got: the engine's kept sets, masks bool ``[N]`` and scores float ``[N]`` (NaN where gone) per site.
        truth: the reference's.
        length: N.

    Returns:
        The flips, and the largest score difference relative to the largest score of its site.
    """
    entered = np.ones(length, dtype=bool)
    heard = 0.0
    for site, (mask, right) in enumerate(zip(got.masks, truth.masks, strict=True)):
        scores, reference = got.scores[site].astype(np.float64), truth.scores[site].astype(np.float64)
        scale = _largest(np.abs(reference[entered])) or 1.0
        heard = max(heard, _largest(np.abs(scores - reference)[entered]) / scale)
        if not np.array_equal(mask, right):
            bounds = _boundary((mask, scores), (right, reference), entered)
            return tuple(
                Flip(site, int(i), "engine" if mask[i] else "reference", _margin((scores[i], reference[i]), bounds) / scale)
                for i in np.flatnonzero(mask != right)
            ), heard
        entered = entered & right
    return (), heard


def margins(kept: KeptSets) -> tuple[float, ...]:
    """Per site, how far the lowest kept score lies above the highest dropped one, relative to the site's largest score.

    An error of the scores below half of it moves no token. NaN where nothing is dropped or has a score, or where no one threshold
    parts the two: a token is kept for its place.
    """
    found = []
    entered = np.ones(len(kept.masks[0]) if kept.masks else 0, dtype=bool)
    for mask, scores in zip(kept.masks, kept.scores, strict=True):
        side = mask, scores.astype(np.float64)
        low, high = _boundary(side, side, entered)
        scale = _largest(np.abs(side[1][entered])) or 1.0
        found.append((high - low) / scale if math.isfinite(high - low) else math.nan)
        entered = entered & mask
    return tuple(found)


Side = tuple[NDArray[np.bool_], NDArray[np.float64]]
"""Mask and scores of one site, ``[N]`` each."""


def _boundary(left: Side, right: Side, entered: NDArray[np.bool_]) -> tuple[float, float]:
    """The threshold lies above the first and not above the second: the highest dropped, the lowest kept score of both sides."""
    dropped = np.concatenate([scores[entered & ~mask] for mask, scores in (left, right)])
    kept = np.concatenate([scores[entered & mask] for mask, scores in (left, right)])
    low, high = _largest(dropped, -math.inf), -_largest(-kept, -math.inf)
    return (
        (low, high) if low < high else (-math.inf, math.inf)
    )  # no one threshold explains both sides: not noise, whatever the scores


def _margin(scores: tuple[float, float], bounds: tuple[float, float]) -> float:
    away = [abs(float(score) - bound) for score in scores for bound in bounds]
    return math.inf if any(map(math.isnan, away)) else max(away)


def _largest(values: NDArray[np.float64], nothing: float = 0.0) -> float:
    return float(values[np.isfinite(values)].max(initial=nothing))
