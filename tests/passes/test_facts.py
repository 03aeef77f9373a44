"""What dropped tokens hold, node by node."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.axes import NEG_INF
from tpcompile.passes import Canonicalize, Mark
from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.facts import Fact, Facts, Value
from tpcompile.program import Program

aten = torch.ops.aten


def facts_of(program: Program) -> tuple[Program, Facts]:
    """A marked program with its facts."""
    program = Mark()(Canonicalize()(program))
    axes = AxesMap(program.graph)
    return program, Facts(program.graph, axes, {s.keep: s.tokens.level for s in program.sites}, program.constants())


class Masks(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        rows = ops.prune(x, keep).unsqueeze(-1).squeeze(-1)
        gone = torch.logical_not(keep)
        logits = rows @ rows.transpose(1, 2)
        low = torch.where(keep, 0.0, -1e4).unsqueeze(1)
        return {
            "zero": rows * keep.unsqueeze(-1),
            "filled": rows.masked_fill(gone.unsqueeze(-1), 2.0),
            "int": keep.to(torch.int64) * 3,
            "official": (1.0 - keep.to(torch.float32)) * -10000.0,
            "low": logits + low,
            "half": (logits + low) / 2.0,
            "twice": logits + low + low,
            "away": logits - low,
            "minus": torch.add(logits, low, alpha=-1),
            "back": logits + low + torch.where(keep, 0.0, 1e4).unsqueeze(1),
            "infinite": logits.masked_fill(gone.unsqueeze(1), NEG_INF),
            "nan": torch.where(gone, 0.0, 1.0).unsqueeze(1) * logits.masked_fill(gone.unsqueeze(1), NEG_INF),
            "largest": torch.where(gone.unsqueeze(-1), -1.0, rows).amax(-1),
            "moved": (rows * keep.unsqueeze(-1)).transpose(1, 2),
            "split": (rows * keep.unsqueeze(-1)).reshape(1, -1, 2, 2),
            "unknown": rows,
        }


EXPECTED: dict[str, dict[tuple[int, int], Value]] = {
    "zero": {(1, 1): Value(0.0)},
    "filled": {(1, 1): Value(2.0)},
    "int": {(1, 1): Value(0.0)},
    "official": {(1, 1): Value(-10000.0)},
    "low": {(2, 1): Value(-1e4, low=True)},
    "half": {(2, 1): Value(-5e3, low=True)},
    "twice": {(2, 1): Value(-2e4, low=True)},
    "away": {},
    "minus": {},
    "back": {},
    "infinite": {(2, 1): Value(NEG_INF)},
    "nan": {},
    "largest": {(1, 1): Value(-1.0)},
    "moved": {(2, 1): Value(0.0)},
    "split": {(1, 1): Value(0.0)},
    "unknown": {},
}


def test_what_a_dropped_token_holds(toy: Callable[..., Program]) -> None:
    program, facts = facts_of(toy(Masks()))
    results = dict(zip(program.output_names, program.graph.output_node().args[0], strict=True))
    found = {name: {at: v for at, v in facts[node].held.items() if at[1] > 0} for name, node in results.items()}
    assert found == EXPECTED


class Nested(nn.Module):
    def forward(self, x: Tensor, keep: Tensor, more: Tensor) -> dict[str, Tensor]:
        first = keep | (torch.arange(keep.shape[1]) == 0)
        x = ops.prune(x, first)
        later = first & more
        x = ops.prune(x, later)
        return {"first": first, "later": later, "rows": x * later.unsqueeze(-1)}


def test_classes_of_nested_sites(toy: Callable[..., Program]) -> None:
    mask = torch.ones(1, 6, dtype=torch.bool)
    program, facts = facts_of(toy(Nested(), x=torch.randn(1, 6, 4), keep=mask, more=mask))
    first, later = (facts[program.node(site.keep)] for site in program.sites)
    assert first.held == {(1, 0): Value(1.0), (1, 1): Value(0.0), (1, 2): Value(1.0)}
    assert later.held == {(1, 1): Value(0.0), (1, 2): Value(0.0)}
    assert facts.first_kept(1)
    assert not facts.first_kept(2)
    rows = facts[program.graph.output_node().args[0][2]]
    assert {cls for (dim, cls), v in rows.held.items() if dim == 1 and v == Value(0.0)} == {1, 2}


class Soft(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        x = ops.prune(x, keep)
        p = (x @ x.transpose(1, 2)).masked_fill(~keep.unsqueeze(1), self.number).softmax(-1)
        rows = p @ (x * keep.unsqueeze(-1))
        return {"p": p, "rows": rows, "times": rows * keep.unsqueeze(-1), "where": torch.where(keep.unsqueeze(-1), rows, 0.0)}


@pytest.mark.parametrize(("number", "hard"), [(-1e4, False), (NEG_INF, True)])
def test_a_softmax_is_pending_until_its_rows_are_settled(toy: Callable[..., Program], number: float, hard: bool) -> None:
    program, facts = facts_of(toy(Soft(number)))
    p, rows, times, where = (facts[node] for node in program.graph.output_node().args[0])
    assert (p.pending, p.hard, p.keys, p.held) == (1, hard, frozenset({2}), {(2, 1): Value(0.0)})
    assert (rows.pending, rows.keys) == (1, frozenset())
    assert times.pending == (1 if hard else 0)
    assert where.pending == 0


def test_neutral_values() -> None:
    low, infinite, zero = Value(-1e4, low=True), Value(NEG_INF), Value(0.0)
    assert [v.neutral(NEG_INF) for v in (low, infinite, zero, Value(-999.0))] == [True, True, False, False]
    assert [v.neutral(0.0) for v in (low, infinite, zero, Value(0.0, low=True))] == [False, False, True, False]
    assert Fact(uniform=zero).at(None, 1) == zero
    assert Fact(held={(1, 1): low}, uniform=zero).at(1, 1) == low
