"""The stream benchmark's own arithmetic; its timing is never asserted."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError

pytest.importorskip("torch")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "streams.py"


@pytest.fixture(scope="module")
def streams():
    spec = importlib.util.spec_from_file_location("streams", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_thresholds_rise(streams):
    assert streams.rising(3) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_thresholds_meet_the_target_in_the_shape_asked_for(streams, bert_folder):
    ids = np.random.default_rng(0).integers(4, 100, (1, 20))
    samples = [Sample("", {"input_ids": ids, "attention_mask": np.ones_like(ids)})]
    thresholds = streams.choose(bert_folder, samples, 1.3, [0.0, 0.5, 1.0])
    assert thresholds == pytest.approx([0.0, thresholds[2] / 2, thresholds[2]], rel=1e-5)
    with pytest.raises(UsageError, match="cannot cost FLOPs /500"):
        streams.choose(bert_folder, samples, 500.0, [1.0, 1.0, 1.0])


def test_formula_is_that_of_a_layer(streams):
    encoder = streams.Encoder(None, layers=2, width=4, inner=16)
    projections, attention, mlp = 4 * 4 * 4 * 10, 2 * 10 * 10 * 4, 2 * 4 * 16 * 7
    assert encoder.work(10, 7) == projections + attention + mlp
