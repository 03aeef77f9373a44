"""From figures to a verdict, where a test of whole engines would have to wait for chance."""

import math

import numpy as np
import pytest

from tpcompile.proof.agreement import Task
from tpcompile.proof.difference import Tolerances, compare_outputs
from tpcompile.proof.judgement import Demands, SampleParity, judge_all
from tpcompile.proof.scores import METRICS, drop_interval

Y = {"y": np.ones((1, 2))}
RECORD = SampleParity(0, 4, (2,), (2,), "equal", "", (), compare_outputs(Y, Y), {})


def fallen(cases: int, lost: int) -> Task:
    """Dense is always right, pruned loses some."""
    right = np.ones(cases)
    pruned = np.concatenate([np.zeros(lost), np.ones(cases - lost)])
    return Task("accuracy", cases, 1.0, 1 - lost / cases, 1.0, drop_interval(METRICS["accuracy"], right, pruned, right, 0.95))


@pytest.mark.parametrize(
    ("task", "most", "confidence", "code"),
    [
        (fallen(60, 2), 0.05, None, 0),  # 3.3 points
        (fallen(60, 2), 0.05, 0.95, 10),  # 0 to 8 points
        (fallen(60, 2), 0.2, 0.95, 0),
        (fallen(60, 2), 0.01, None, 6),
        (fallen(60, 20), 0.05, 0.95, 6),
        (fallen(3, 1), 0.05, 0.95, 10),  # too few for an interval
        (fallen(3, 0), 0.05, 0.95, 10),
        (fallen(20, 0), 0.05, 0.95, 10),  # no case is lost in 20: that bounds the drop by 17 points
        (fallen(200, 0), 0.05, 0.95, 0),
        (Task("pearson", 60, math.nan, 0.5, 0.9), 0.05, None, 6),
        (Task("cosine", 3, None, None, 0.9), 0.05, None, 10),
    ],
)
def test_a_drop_against_what_is_allowed(task: Task, most: float, confidence: float | None, code: int) -> None:
    verdict = judge_all([RECORD], [], task, Tolerances(), Demands(None, most, confidence))
    assert verdict[2] == code
    assert verdict[0] == {0: "PASSED", 6: "FAILED", 10: "INCONCLUSIVE"}[code]
