"""How many rows are stored, and which: laws over drawn masks."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from numpy.typing import NDArray

from tpcompile.rows import Rows, fit, store

GATE = settings(max_examples=60, derandomize=True, deadline=None, database=None)
LADDERS = [(), (2,), (3,), (8,), (2, 5), (4, 8, 12), (64,)]


@pytest.mark.parametrize(
    ("ladder", "needed", "count"),
    [
        ((), 5, 5),
        ((), 0, 2),
        ((), 1, 2),
        ((16,), 1, 16),
        ((16,), 16, 16),
        ((16,), 17, 32),
        ((32, 64, 128), 32, 32),
        ((32, 64, 128), 33, 64),
        ((32, 64, 128), 128, 128),
        ((32, 64, 128), 129, 256),
        ((96,), 97, 100),
    ],
)
def test_a_count_is_rounded_up_to_a_rung_and_never_beyond_the_tokens(ladder: tuple[int, ...], needed: int, count: int) -> None:
    assert Rows(ladder).count(needed, 100 if needed < 98 else 300) == count


def test_a_constant_count_does_not_depend_on_what_is_needed() -> None:
    assert [Rows(limit=8).count(needed, 20) for needed in (0, 8, 15)] == [8, 8, 8]
    assert Rows(limit=8).count(3, 5) == 5


@pytest.mark.parametrize("ladder", [(1,), (0, 4), (8, 8), (16, 8), (-4,)])
def test_what_is_no_ladder_is_refused(ladder: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is no rising list of sizes from 2"):
        Rows(ladder)


def test_a_limit_below_two_is_refused() -> None:
    with pytest.raises(ValueError, match="1 is no rising list"):
        Rows(limit=1)


def masks() -> st.SearchStrategy[tuple[list[list[bool]], list[list[float]], int]]:
    """``(keep, score, pinned)``: up to 4 samples of one length; scores from few values, so that ties occur; a pinned prefix."""

    def rows(size: tuple[int, int]) -> st.SearchStrategy[tuple[list[list[bool]], list[list[float]], int]]:
        batch, length = size
        keep = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
        values = st.sampled_from([-1e30, -1.0, 0.0, 0.25, 0.25, 1.0, 1e30])
        score = st.lists(st.lists(values, min_size=length, max_size=length), min_size=batch, max_size=batch)
        return st.tuples(keep, score, st.integers(1, min(2, length)))

    return st.tuples(st.integers(1, 4), st.integers(2, 20)).flatmap(rows)


def arrays(
    drawn: tuple[list[list[bool]], list[list[float]], int],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]]:
    keep = np.array(drawn[0])
    pinned = (np.arange(keep.shape[1]) < drawn[2])[None]
    return keep, pinned, np.array(drawn[1], dtype=np.float32)


@given(drawn=masks(), ladder=st.sampled_from(LADDERS))
@example(drawn=([[False] * 9], [[0.0] * 9], 1), ladder=(4,))
@example(drawn=([[True] * 9], [[0.0] * 9], 1), ladder=(4,))
@GATE
def test_any_ladder_stores_a_superset_on_a_rung(
    drawn: tuple[list[list[bool]], list[list[float]], int], ladder: tuple[int, ...]
) -> None:
    keep, pinned, _ = arrays(drawn)
    index = store(keep, pinned, Rows(ladder))
    exact = store(keep, pinned, Rows())
    length, count = keep.shape[1], index.shape[1]
    rungs = {*ladder, *range(ladder[-1], length + ladder[-1], ladder[-1])} if ladder else {exact.shape[1]}
    assert count == length or count in rungs
    assert exact.shape[1] <= count <= length
    np.testing.assert_array_equal(index[:, : exact.shape[1]], exact)  # the extra slots come last
    for row, wanted in zip(index, keep | pinned, strict=True):
        assert len(set(row.tolist())) == count
        assert set(np.flatnonzero(wanted).tolist()) <= set(row.tolist())
        needed = int(wanted.sum())
        assert row[:needed].tolist() == sorted(row[:needed].tolist())
        assert row[needed:].tolist() == sorted(row[needed:].tolist())


@given(drawn=masks(), limit=st.integers(2, 22))
@GATE
def test_a_constant_count_keeps_the_best(drawn: tuple[list[list[bool]], list[list[float]], int], limit: int) -> None:
    keep, pinned, score = arrays(drawn)
    fits = fit(keep, pinned, score, limit)
    index = store(fits, pinned, Rows(limit=limit))
    assert index.shape == (len(keep), min(limit, keep.shape[1]))
    for own, left, value in zip(keep, fits, score, strict=True):
        assert not (left & ~own).any()
        lost = own & ~left
        if (own | pinned[0]).sum() <= limit:
            assert not lost.any()
            continue
        assert (left | pinned[0]).sum() == limit
        stays = left & ~pinned[0]
        for i in np.flatnonzero(lost):
            assert all(value[i] < value[j] or (value[i] == value[j] and j < i) for j in np.flatnonzero(stays))


def test_without_a_score_the_last_tokens_are_lost() -> None:
    keep = np.array([[True, False, True, True, True, True]])
    fits = fit(keep, np.zeros_like(keep), None, 3)
    assert store(fits, np.zeros_like(keep), Rows(limit=3)).tolist() == [[0, 2, 3]]


def test_what_does_not_fit_is_no_policy() -> None:
    keep = np.ones((1, 5), dtype=bool)
    with pytest.raises(ValueError, match="5 rows do not fit into 4"):
        store(keep, keep, Rows(limit=4))
