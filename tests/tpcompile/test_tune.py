"""The choice among candidates that were timed: the first stays unless another is clearly faster, or runs less at load."""

import pytest

from tpcompile.plan import Plan
from tpcompile.tune import MARGIN, Trial, choose


def trial(cold: float, warm: float, form: str = "single") -> Trial:
    return Trial(Plan(form=form), cold, warm, 0.01)


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ([(100, 100), (150, 40)], 1),  # both passes count
        ([(50 + 50 * MARGIN, 50 + 50 * MARGIN), (50, 50)], 0),  # just the margin is not beyond it
        ([(50 + 50 * MARGIN, 51 + 50 * MARGIN), (51, 51), (50, 50)], 1),  # the first that is near enough
        ([(100, 100), (120, 120)], 0),
        ([(100, 100)], 0),
    ],
)
def test_the_first_stays_unless_another_is_faster_by_the_margin(times: list[tuple[float, float]], taken: int) -> None:
    trials = [trial(*pair) for pair in times]
    assert choose(trials) is trials[taken]


def test_of_equally_fast_ones_the_one_that_runs_least_at_load_is_taken() -> None:
    runs = [(100, 255), (101, 62), (102, 19), (120, 0)]
    trials = [Trial(Plan(), total / 2, total / 2, 0.01, many) for total, many in runs]
    assert choose(trials) is trials[2]


@pytest.mark.parametrize(
    ("runs", "taken"),
    [
        ([(100, 127), (108, 11)], 1),  # 12.7 % for the load of the first, spread over a thousand inputs
        ([(100, 127), (120, 11)], 0),
        ([(100, 30), (110, 0)], 0),
    ],
)
def test_what_load_runs_is_weighed_against_later_inputs(runs: list[tuple[float, int]], taken: int) -> None:
    trials = [Trial(Plan(), total / 2, total / 2, 0.01, many) for total, many in runs]
    assert choose(trials) is trials[taken]


def test_a_trial_as_a_document() -> None:
    assert Trial(Plan("bucketed", "staged", (16,)), 12.34, 5.678, 0.01234).to_json() == {
        "lowering": "bucketed", "form": "staged", "sizes": [16], "cold_ms": 12.3, "warm_ms": 5.7, "noise": 0.012, "ruler": "wall",
    }  # fmt: skip
    swept = Trial(Plan(square=True), 1.0, 1.0, 0.0, 19).to_json()
    assert (swept["square"], swept["runs"]) == (True, 19)
