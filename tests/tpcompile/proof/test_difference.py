"""What outputs may be off by: one number, or one for each output."""

import numpy as np
import pytest

from tpcompile.errors import UsageError
from tpcompile.proof.difference import Allowed, Tolerances, compare_outputs, worst


def test_the_last_pattern_that_fits_counts():
    law = Tolerances.of(1e-5, {"*": 1e-4, "logits": 1e-3, "log*": 1e-2}, {"logits": 0.5})
    assert law.allowed("logits") == Allowed(1e-2, 0.5)
    assert law.allowed("pooler_output") == Allowed(1e-4, 1e-4)
    assert Tolerances.of(1e-5).allowed("any") == Allowed(1e-5, 1e-5)


def test_what_is_refused():
    with pytest.raises(UsageError, match="no output is called 'logit'"):
        Tolerances.of(1e-5, {"logit": 1.0}).check(["logits"])
    for law in (Tolerances(0.0), Tolerances.of(1e-5, None, {"logits": float("nan")})):
        with pytest.raises(UsageError, match="not positive"):
            law.check(["logits"])


def test_mean_and_largest_difference():
    got, right = {"y": np.array([1.0, 2.0, 3.5, 4.0])}, {"y": np.array([1.0, 2.0, 3.0, 4.0])}
    found = compare_outputs(got, right, Tolerances.of(1e-2, None, {"y": 1e-3}))["y"]
    assert (found.max_abs, found.mean_abs, found.max_rel) == (0.5, 0.125, pytest.approx(0.5 / 3))
    assert found.required == 0.5  # a tenth of the largest value is below 1
    assert worst([{"y": found}, compare_outputs(right, right)])["y"].mean_abs == 0.125
    assert worst([]) == {}
