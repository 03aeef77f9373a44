"""Spectrograms as pictures."""

import numpy as np

from tpcompile.data.samples import Sample
from tpcompile.report.page import trace_patches
from tpcompile.report.patchview import path
from tpcompile.report.spectrogram import LOUD, QUIET, picture
from tpcompile.spec import Patches


def test_time_runs_from_left_to_right() -> None:
    values = np.zeros((1, 6, 2), dtype=np.float32)
    values[0, 4, 1] = 3.0
    for given in (values, values.transpose(0, 2, 1)):
        drawn = picture({"input_values": given})
        assert drawn is not None
        assert drawn.shape == (2, 6, 3)
        assert tuple(drawn[1, 4]) == LOUD
        assert tuple(drawn[0, 0]) == QUIET


def test_silence_and_what_is_no_spectrogram() -> None:
    silent = picture({"x": np.ones((1, 4, 2), dtype=np.float32)})
    assert silent is not None
    assert (silent == np.array(QUIET)).all()
    assert picture({"x": np.ones((1, 3, 4, 4), dtype=np.float32)}) is None
    assert picture({"x": np.ones((1, 4, 2), dtype=np.int64)}) is None
    assert picture({"x": np.ones((1, 4, 2)), "y": np.ones(1)}) is None


class Kept:
    """What two sites kept of two frames in each of two bands."""

    masks = (np.array([True, True, False, True, True]), np.array([True, True, False, True, False]))
    counts = (4, 3)


def test_frames_that_merged_into_their_neighbour_are_veiled() -> None:
    values = {"input_values": np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)}
    sample = Sample("a sound", values, tokens=5, picture=picture(values))
    trace = trace_patches(sample, Kept(), Patches(1, 2, 2))  # type: ignore[arg-type]  # masks and counts are all it reads
    assert (trace.width, trace.height) == (8, 4)
    assert trace.panels[0].gone == path(np.array([[True, False], [True, True]]))
    assert trace.panels[1].counts == "2 of 4 patches, 1 of 1 prefix tokens"
