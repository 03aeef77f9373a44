"""FLOPs polynomials."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcompile.errors import IntegrityError, UsageError
from tpcompile.flops import Counts, evaluate, saving


@dataclass(frozen=True)
class Formulas:
    tokens: tuple = ("t0", "t1")
    paper: tuple = ((2.0, ("t0", "t0")), (10.0, ("t1",)))
    graph: tuple = ((2.0, ("t0", "t0")), (10.0, ("t1",)), (5.0, ()))
    dense: tuple = ((2.0, ("t0", "t0")), (10.0, ("t0",)))


def test_evaluate_sums_products():
    assert evaluate([(3.0, ()), (2.0, ("t0",)), (1.0, ("t0", "t1"))], {"t0": 5, "t1": 7}) == 3 + 10 + 35


def test_unknown_token_set_is_an_integrity_error():
    with pytest.raises(IntegrityError, match="t9"):
        evaluate([(1.0, ("t9",))], {"t0": 1})


def test_paper_counts_alive_and_graph_counts_stored():
    work = saving(Formulas(), [Counts(10, (3,), (4,))])
    assert work.paper_dense == 2 * 100 + 10 * 10
    assert work.paper_pruned == 2 * 100 + 10 * 3
    assert work.graph_pruned == 2 * 100 + 10 * 4 + 5
    assert work.graph_dense == 300
    assert work.paper == pytest.approx(300 / 230)


@settings(deadline=None)
@given(st.lists(st.integers(2, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=9))
def test_ratio_is_that_of_totals_and_never_below_one(rows):
    work = saving(Formulas(), [Counts(n, (kept,), (kept,)) for n, kept in rows])
    dense = sum(2 * n * n + 10 * n for n, _ in rows)
    assert work.paper_dense == dense
    assert work.paper >= 1


def test_unknown_formula_gives_no_ratio():
    assert saving(Formulas(paper=()), [Counts(10, (3,), (4,))]).paper is None


def test_bad_calls():
    with pytest.raises(UsageError, match="no samples"):
        saving(Formulas(), [])
    with pytest.raises(IntegrityError, match="2 token sets, the engine 2 sites"):
        saving(Formulas(), [Counts(10, (3, 2), (4, 2))])
