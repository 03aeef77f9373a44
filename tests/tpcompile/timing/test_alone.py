"""An engine in a process of its own: it runs what is asked for, and what goes wrong there is said here."""

from pathlib import Path

import numpy as np
import pytest

from tpcompile.errors import BuildFailed, InputError, IntegrityError
from tpcompile.timing.alone import CLEAR, apart

ROWS = [{"pixel_values": np.full((1, 1, 8, 8), value, dtype=np.float32)} for value in (0.5, 0.25)]


def test_samples_are_run_and_timed(image_bundle: Path) -> None:
    with apart(ROWS, threads=1) as opener:
        engine = opener(image_bundle)()
        try:
            found = [engine(index) for index in (1, 0)]
        finally:
            engine.close()
    assert all(one.wall > 0 and one.cpu > 0 for one in found)
    if CLEAR.exists():
        assert all(one.peak is not None and 0 < one.peak < 1000 for one in found)


def test_what_loading_raises_is_raised_here(tmp_path: Path) -> None:
    with apart(ROWS, threads=1) as opener, pytest.raises(IntegrityError, match="holds no usable") as caught:
        opener(tmp_path)()
    assert caught.value.fix


def test_what_a_call_raises_is_raised_here(image_bundle: Path) -> None:
    wrong = [{"pixel_values": np.zeros((1, 1, 8), dtype=np.float32)}]
    with apart(wrong, threads=1) as opener:
        engine = opener(image_bundle)()
        with pytest.raises(InputError, match="pixel_values") as caught:
            engine(0)
        assert caught.value.fix
        engine.close()


def test_a_process_that_ends_is_told(image_bundle: Path) -> None:
    with apart(ROWS, threads=1) as opener:
        engine = opener(image_bundle)()
        engine._process.kill()  # as a system does that runs out of memory
        with pytest.raises(BuildFailed, match=r"ended in a process of its own: exit code -?\d") as caught:
            engine(0)
        assert "tpcompile run" in caught.value.fix
        engine.close()


def test_last_words_are_passed_on(image_bundle: Path) -> None:
    with apart(ROWS, threads=1) as opener:
        engine = opener(image_bundle)()
        with pytest.raises(BuildFailed, match="own: ValueError: invalid literal"):
            engine("no number")
        engine.close()
