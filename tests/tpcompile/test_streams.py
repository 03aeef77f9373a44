"""The stream benchmark's own arithmetic; its timing is never asserted."""

import importlib.util
from pathlib import Path

import pytest

from tpcompile.errors import InputError

pytest.importorskip("torch")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "streams.py"


@pytest.fixture(scope="module")
def streams():
    spec = importlib.util.spec_from_file_location("streams", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Linear:
    """An encoder whose FLOPs ratio is 1 + 100 times the largest threshold."""

    def flops_ratio(self, samples, thresholds, n_ref):
        return 1 + 100 * max(thresholds)


def test_thresholds_rise(streams):
    assert streams.rising(3) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_bisection_meets_the_target(streams):
    thresholds = streams.choose(Linear(), [], 2.6, [0.5, 1.0])
    assert 2.6 <= 1 + 100 * thresholds[1] < 2.61
    assert thresholds[0] == pytest.approx(thresholds[1] / 2)
    with pytest.raises(InputError, match="no threshold"):
        streams.choose(Linear(), [], 500.0, [1.0])


def test_formula_is_that_of_a_layer(streams):
    encoder = streams.Encoder(None, layers=2, width=4, inner=16)
    projections, attention, mlp = 4 * 4 * 4 * 10, 2 * 10 * 10 * 4, 2 * 4 * 16 * 7
    assert encoder.work(10, 7) == projections + attention + mlp
