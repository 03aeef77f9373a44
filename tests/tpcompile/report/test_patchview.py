"""Kept patches as characters, pictures and paths."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from tpcompile.errors import IntegrityError
from tpcompile.report import patchview
from tpcompile.spec import Patches

KEPT = np.array([[True, False, False], [True, True, True]])
MASK = np.array([True, False, *KEPT.ravel()])
PATCHES = Patches(2, 2, 3)


def test_lines_and_counts():
    kept = patchview.grid(MASK, PATCHES)
    assert kept.tolist() == KEPT.tolist()
    assert patchview.lines(kept) == ["#..", "###"]
    assert patchview.counts(MASK, PATCHES) == "4 of 6 patches, 1 of 2 prefix tokens"
    assert patchview.counts(MASK[2:], Patches(0, 2, 3)) == "4 of 6 patches"


def test_a_grid_of_another_size():
    with pytest.raises(IntegrityError) as caught:
        patchview.grid(MASK[1:], PATCHES)
    assert (caught.value.message, caught.value.fix) == ("the manifest says 8 tokens, the engine has 7", "export again")


def test_path():
    assert patchview.path(KEPT) == "M1 0h2v1h-2z"
    assert patchview.path(np.ones((2, 2), dtype=bool)) == ""


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_the_path_covers_the_dropped_patches_only(kept):
    covered = np.zeros_like(kept)
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)", patchview.path(kept)):
        covered[int(y), int(x) : int(x) + int(width)] = True
    np.testing.assert_array_equal(covered, ~kept)


def test_a_veil_tells_black_from_dropped_black():
    picture = np.zeros((5, 7, 3), dtype=np.uint8)  # patches of uneven size
    dark = patchview.darken(picture, KEPT)
    assert dark[0].tolist() == [[0] * 3] * 3 + [[34] * 3] * 4
    assert not dark[3:].any()
    assert patchview.darken(picture + 255, KEPT)[0, -1].tolist() == [90, 90, 90]


def test_panels_stand_side_by_side():
    picture = np.zeros((8, 12, 3), dtype=np.uint8)
    joined = patchview.panels(picture, [KEPT, ~KEPT])
    side = 12 * 19  # the least whole factor that reaches 224
    assert joined.shape == (8 * 19, 3 * side + 2 * patchview.GAP, 3)
    assert (joined[:, side : side + patchview.GAP] == 255).all()


def test_png_gives_the_pixels_back():
    image = pytest.importorskip("PIL.Image")
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert patchview.png(picture) == patchview.png(picture)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(patchview.png(picture)))), picture)
