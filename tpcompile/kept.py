"""What the sites of an engine decided for one sample, brought from rows of storage back to original positions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tpcompile.errors import StageError


@dataclass(frozen=True, eq=False)
class Kept:
    """What each site decided for one sample, in original positions.

    Attributes:
        masks: per site, bool ``[N]``: the token is alive after the site.
        stored: per site, rows of storage after the site: K; at least the alive ones, N in masked form.
        scores: per site, float32 ``[N]``, nan where the token was gone before the site or the site has no score.
        lost: per site, tokens that should be alive but found no room: only lowering ``static`` has too little, and what it computes
            for such a sample is approximate. Empty in masked form.
        groups: per site, int64 ``[N]``: the first of the tokens that a token was merged with, -1 once dropped. Empty where nothing merges.
        fused: per site, rows alive that continue no token of the input. Empty where there are none.
    """

    masks: tuple[np.ndarray, ...]
    stored: tuple[int, ...]
    scores: tuple[np.ndarray, ...]
    lost: tuple[int, ...] = ()
    groups: tuple[np.ndarray, ...] = ()
    fused: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens alive after each site, fused ones too."""
        fused = self.fused or (0,) * len(self.masks)
        return tuple(int(mask.sum()) + more for mask, more in zip(self.masks, fused, strict=True))


def compose(taps: Mapping[str, np.ndarray], sites: int, length: int) -> Kept:
    """Bring every site's decision back to original positions.

    In gathered form site i+1 sees the K rows that site i stored, so positions chain through ``site<i>.index`` (int64
    ``[1, K_i]``); a row stored though dropped is told apart by ``site<i>.keep`` (bool ``[1, N_i]``). In masked form there is no
    index: every site sees all N rows. A row that continues none of those before it has index -1; ``site<i>.into`` (int64 ``[1, N_i]``)
    tells which row each went into. A site that sees all N rows again behind one that stored fewer begins from the whole input: the method
    puts rows back.

    Args:
        taps: what a session returned; scores (float32 ``[1, N_i]``) where the site has one.
        sites: number of sites.
        length: tokens N before the first site.

    Raises:
        StageError: sizes do not chain: the engine is not what its manifest says.
    """
    positions, owner = np.arange(length), np.arange(length)
    alive = np.ones(length, dtype=bool)
    merges = any(f"site{i}.into" in taps for i in range(sites))
    masks, stored, scores, lost, groups, fused = [], [], [], [], [], []
    for i in range(sites):
        keep = taps[f"site{i}.keep"].reshape(-1)
        if keep.size == length != positions.size:  # the rows were put back: this site begins from the whole input again
            positions, alive = np.arange(length), np.ones(length, dtype=bool)
        if keep.shape != positions.shape:
            raise StageError(f"site{i} sees {keep.size} rows, but {positions.size} are stored", fix="report this with the bundle")
        score = np.full(length + 1, np.nan, dtype=np.float32)  # rows that continue no token write behind the end
        if f"site{i}.score" in taps:
            score[positions] = taps[f"site{i}.score"].reshape(-1)
        score = score[:-1]
        score[~alive] = np.nan
        if merges:
            owner = _followed(owner, taps, i)
            groups.append(_groups(owner))
        if f"site{i}.index" in taps:
            index = taps[f"site{i}.index"].reshape(-1)
            old = index >= 0
            lost.append(int(keep.sum() - keep[index[old]].sum()))
            positions, keep = np.where(old, positions[index], -1), np.where(old, keep[index], True)
        else:
            lost.append(0)
        alive = np.zeros(length + 1, dtype=bool)
        alive[positions[keep]] = True
        alive = alive[:-1]
        masks.append(alive)
        stored.append(positions.size)
        scores.append(score)
        fused.append(int((positions[keep] < 0).sum()))
    return Kept(tuple(masks), tuple(stored), tuple(scores), tuple(lost), tuple(groups), tuple(fused) if any(fused) else ())


def _followed(owner: np.ndarray, taps: Mapping[str, np.ndarray], site: int) -> np.ndarray:
    """The row that holds each token after a site, from the one before it; -1 once dropped."""
    rows = taps[f"site{site}.keep"].size
    into = taps[f"site{site}.into"].reshape(-1) if f"site{site}.into" in taps else np.arange(rows)
    held = np.where(owner >= 0, into[owner], -1)
    if f"site{site}.index" not in taps:
        return held
    index, new = taps[f"site{site}.index"].reshape(-1), np.full(rows, -1)
    new[index[index >= 0]] = np.flatnonzero(index >= 0)
    new[~taps[f"site{site}.keep"].reshape(-1)] = -1
    return np.where(held >= 0, new[held], -1)


def _groups(owner: np.ndarray) -> np.ndarray:
    """The first of the tokens that share each token's row."""
    return np.array([-1 if row < 0 else int(np.argmax(owner == row)) for row in owner])
