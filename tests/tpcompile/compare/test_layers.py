"""The search inside: which rows are compared, what counts as equal, and how the walk leaves out differences that cancel."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tpcompile.backends.base import Session
from tpcompile.compare.graphview import Graph, Op
from tpcompile.compare.layers import Found, distance, locate
from tpcompile.compare.watch import Batch, Law, Side, judge, observe
from tpcompile.data.samples import Sample

Array = NDArray[Any]
Values = Callable[[Array], Mapping[str, Array]]


@pytest.mark.parametrize(
    ("x", "y", "max_abs", "required"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5, 0.2),
        ([0.1], [0.2], 0.1, 0.1),  # small values are compared absolutely
        ([-math.inf, 1.0], [-math.inf, 1.0], 0.0, 0.0),
        ([math.nan], [math.nan], 0.0, 0.0),
        ([math.inf], [1.0], math.inf, math.inf),
        ([math.nan], [1.0], math.inf, math.inf),
    ],
)
def test_distance(x: list[float], y: list[float], max_abs: float, required: float) -> None:
    assert distance(np.array(x), np.array(y)) == pytest.approx((max_abs, required))


def test_integers_must_be_equal() -> None:
    assert distance(np.array([30000]), np.array([30001])) == (1.0, 1.0)
    assert distance(np.array([True]), np.array([False])) == (1.0, 1.0)


class Fake(Session):
    """A session over a function of ``x [1, n]``."""

    def __init__(self, values: Values, names: Sequence[str]) -> None:
        self.values, self.names = values, names

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = self.values(feeds["x"])
        return {name: found[name] for name in ("y", *self.names)}

    def close(self) -> None: ...


def side(values: Values, edges: Mapping[str, str], gathered: bool = False, site: bool = False) -> Side:
    """A side whose graph is ``{value: "what it reads"}``."""
    ops = tuple(Op(name.upper(), "", tuple(read.split()), (name,)) for name, read in edges.items())
    graph = Graph(ops, ("x",), ("y",), {name: name for name in edges}, {})
    return Side("fake", graph, ("y",), (True,) if site else (), gathered, lambda names: Fake(values, names))


def search(a: Side, b: Side, *lengths: int, tolerance: float = 1e-5) -> Found:
    rng = np.random.default_rng(0)
    samples = [Sample("", {"x": rng.random((1, length))}) for length in lengths or (4, 7)]
    batches = [Batch((i,), (sample,)) for i, sample in enumerate(samples)]
    return locate(a, b, batches, (observe(a, batches, {}), observe(b, batches, {})), Law(tolerance))


EDGES = {"shift": "x", "top": "x shift", "total": "top", "ratio": "top total", "late": "ratio", "y": "late"}


def softmax(shift: float, fault: float) -> Values:
    """exp(x - shift) / sum: the shift cancels; ``fault`` comes behind it."""

    def values(x: Array) -> Mapping[str, Array]:
        top = np.exp(x - shift)
        ratio = top / top.sum(1, keepdims=True)
        late = ratio + fault
        return {"shift": np.array([[shift]]), "top": top, "total": top.sum(1, keepdims=True), "ratio": ratio, "late": late,
                "y": late.sum(1)}  # fmt: skip

    return values


def test_a_difference_that_cancels_is_not_the_fault() -> None:
    found = search(side(softmax(1.0, 0.5), EDGES), side(softmax(0.0, 0.0), EDGES))
    (root,) = found.roots
    assert (root.name, root.inputs, root.ops, root.gap.max_abs) == ("late", ("ratio",), ("LATE",), pytest.approx(0.5))
    assert found.compared == 6


def test_two_faults_are_two_roots() -> None:
    def values(x: Array) -> Mapping[str, Array]:
        return {"a": x + 1, "b": x + 2, "y": (x + 1) * (x + 2)}

    def wrong(x: Array) -> Mapping[str, Array]:
        return {"a": x + 1.5, "b": x + 2.5, "y": (x + 1.5) * (x + 2.5)}

    edges = {"a": "x", "b": "x", "y": "a b"}
    assert [root.name for root in search(side(wrong, edges), side(values, edges)).roots] == ["a", "b"]


def test_the_worst_sample_is_named() -> None:
    def wrong(x: Array) -> Mapping[str, Array]:
        return {"a": x + (x.shape[1] == 6), "y": (x + (x.shape[1] == 6)).sum(1)}

    def right(x: Array) -> Mapping[str, Array]:
        return {"a": x, "y": x.sum(1)}

    (root,) = search(side(wrong, {"a": "x", "y": "a"}), side(right, {"a": "x", "y": "a"}), 3, 5, 6, 8).roots
    assert (root.name, root.gap.sample) == ("a", 2)


SITE = {
    "site0.score": "x",
    "site0.keep": "site0.score",
    "site0.index": "site0.keep",
    "rows": "x site0.index",
    "hidden": "rows",
    "y": "hidden",
}
"""Tokens above one half are kept; ``hidden`` is computed of what is left."""


def gathered(fault: Callable[[Array], Array] = lambda rows: rows, threshold: float = 0.5, noise: float = 0.0) -> Side:
    def values(x: Array) -> Mapping[str, Array]:
        keep = x - noise > threshold
        index = np.flatnonzero(keep[0])[None]
        hidden = fault(x[:, index[0]] * 2)
        return {"site0.score": x - noise, "site0.keep": keep, "site0.index": index, "hidden": hidden, "y": hidden.sum(1)}

    return side(values, SITE, gathered=True, site=True)


def masked() -> Side:
    def values(x: Array) -> Mapping[str, Array]:
        keep = x > 0.5
        hidden = np.where(keep, x * 2, 99.0)  # a dropped row holds anything
        return {"site0.score": x, "site0.keep": keep, "hidden": hidden, "y": (hidden * keep).sum(1)}

    edges = {"site0.score": "x", "site0.keep": "site0.score", "hidden": "x", "y": "hidden site0.keep"}
    return side(values, edges, site=True)


def test_only_rows_of_living_tokens_are_compared() -> None:
    found = search(gathered(), masked(), 5, 9, 12)
    assert found.roots == ()
    assert (found.compared, found.skipped) == (4, 0)
    assert found.dims["hidden"] == (None, 1)


def test_a_fault_in_one_row_of_what_is_left() -> None:
    def last(rows: Array) -> Array:
        return np.concatenate([rows[:, :-1], rows[:, -1:] + 0.25], 1)

    (root,) = search(gathered(last), masked(), 5, 9, 12).roots
    assert (root.name, root.gap.max_abs) == ("hidden", pytest.approx(0.25))
    assert root.inputs == ("site0.keep",)


def test_rows_that_a_site_chose_wrongly_are_the_sites_fault() -> None:
    found = search(gathered(threshold=0.6), masked(), 9, 12, 15)
    assert [root.name for root in found.roots] == ["site0.keep"]


def test_what_cannot_be_laid_along_tokens_is_left_out() -> None:
    def odd(rows: Array) -> Array:
        return rows[:, 1:]

    found = search(gathered(odd), masked(), 9, 12)
    assert (found.compared, found.skipped) == (3, 1)


def test_a_sample_inside_float_noise_is_not_judged() -> None:
    scores = np.array([[0.2, 0.5 + 2e-7, 0.9, 0.7]])
    batch = [Batch((0,), (Sample("", {"x": scores}),))]
    a, b = gathered(noise=4e-7), masked()
    seen = observe(a, batch, {}), observe(b, batch, {})
    (judged,) = judge(batch, seen[0], seen[1], seen[1], Law())
    assert judged.verdict == "noise"
    far = gathered(threshold=0.8)
    (judged,) = judge(batch, observe(far, batch, {}), seen[1], seen[1], Law())
    assert (judged.verdict, judged.what) == ("differs", "site0.keep")
