"""Callers at once: the stream is emptied once a turn, every caller on a handle of its own, and what runtime cannot is said."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

from tpcompile.chain import shared
from tpcompile.data.samples import Sample
from tpcompile.engine import load
from tpcompile.errors import UsageError
from tpcompile.timing.workers import crowd, without_gc

DATA = [Sample("", {"x": np.full((1, 4), i)}) for i in range(7)]


class Fake:
    """Counts what it saw, by handle and thread."""

    def __init__(self, seen=None):
        self.seen = [] if seen is None else seen
        self.closed = False

    def share(self):
        return Fake(self.seen)

    def __call__(self, **inputs):
        self.seen.append((id(self), threading.get_ident(), int(inputs["x"][0, 0])))
        return {}

    def close(self):
        self.closed = True


def test_callers_empty_the_stream_together():
    engines = []

    def opener():
        engines.append(Fake())
        return engines[-1]

    found = crowd(opener, opener, DATA, workers=3, threads=1, rounds=2, confidence=0.95)
    assert len(engines) == 2
    for engine in engines:
        assert engine.closed
        assert sorted(value for _, _, value in engine.seen) == sorted([*range(7)] * 6)  # two turns in each of three rounds
    assert found.dense.count == 7 * 4  # the first round is not counted
    assert (found.dense.p50 is None, found.dense.p90) == (False, None)  # seven inputs, however often they ran
    assert found.gain.low <= found.gain.value <= found.gain.high
    assert "3 callers" in found.text()


def test_engines_are_shared(text_bundles: dict[str, Path]) -> None:
    """A second handle answers the same from another thread, and lives on when the first is closed."""
    inputs = {"input_ids": np.array([[2, 9, 30, 41, 3]]), "attention_mask": np.ones((1, 5), dtype=np.int64)}
    for folder in text_bundles.values():
        engine = load(folder, threads=1, callers=2)
        feeds = {spec.name: inputs.get(spec.name, np.zeros((1, 5), dtype=np.int64)) for spec in engine.inputs}
        expected, other = engine(**feeds), engine.share()
        engine.close()
        for name, value in other(**feeds).items():
            np.testing.assert_array_equal(value, expected[name])
        other.close()


def test_a_runtime_for_one_caller_says_so():
    with pytest.raises(UsageError, match="one caller") as caught:
        shared(object())
    assert caught.value.fix == "leave out --workers"


def test_no_garbage_is_collected_while_the_clock_runs():
    assert gc.isenabled()
    with without_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
