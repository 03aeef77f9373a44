"""The order of a gathered graph."""

import pytest
from torch import fx

from tpcompile.errors import StageError
from tpcompile.passes.schedule import schedule


def chain() -> dict[str, fx.Node]:
    """``x -> keep``, ``x -> work -> more``, in the order x, work, keep, more."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    work = graph.call_function(abs, (x,), name="work")
    keep = graph.call_function(bool, (x,), name="keep")
    more = graph.call_function(abs, (work,), name="more")
    return {"x": x, "work": work, "keep": keep, "more": more}


def names(order: list[fx.Node | int]) -> list[str]:
    return [step.name if isinstance(step, fx.Node) else f"t{step}" for step in order]


def test_what_needs_no_set_stays_in_its_order() -> None:
    nodes = chain()
    assert names(schedule(nodes.values(), {}, {1: (nodes["keep"],)})) == ["x", "work", "keep", "t1", "more"]


def test_what_stands_on_a_set_comes_behind_the_decision() -> None:
    nodes = chain()
    order = schedule(nodes.values(), {nodes["work"]: 1, nodes["more"]: 2}, {1: (nodes["keep"],), 2: (nodes["keep"],)})
    assert names(order) == ["x", "keep", "t1", "work", "t2", "more"]


def test_a_decision_that_waits_for_itself_is_a_bug() -> None:
    nodes = chain()
    with pytest.raises(StageError, match="a site's decision waits for its own tokens"):
        schedule(nodes.values(), {nodes["keep"]: 1}, {1: (nodes["keep"],)})
