"""What dropped tokens hold, node by node."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.axes import NEG_INF, Factors
from tpcompile.passes import Canonicalize, Mark
from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.fact import LIVE, Doubt, Fact
from tpcompile.passes.facts import Facts
from tpcompile.passes.values import TRUE, UNKNOWN, ZERO, Value
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


def about(number: float) -> Value:
    return Value(number, number, about=True)


EXPECTED: dict[str, tuple[int, Value, Value]] = {
    "zero": (1, ZERO, UNKNOWN),
    "filled": (1, Value.of(2.0), UNKNOWN),
    "int": (1, ZERO, Value.of(3.0)),
    "official": (1, Value.of(-1e4), ZERO),
    "low": (2, about(-1e4), UNKNOWN),
    "half": (2, about(-5e3), UNKNOWN),
    "twice": (2, about(-2e4), UNKNOWN),
    "away": (2, about(1e4), UNKNOWN),
    "minus": (2, about(1e4), UNKNOWN),
    "back": (2, about(0.0), UNKNOWN),
    "infinite": (2, Value.of(NEG_INF), UNKNOWN),
    "largest": (1, Value.of(-1.0), UNKNOWN),
    "moved": (2, ZERO, UNKNOWN),
    "split": (1, ZERO, UNKNOWN),
    "unknown": (1, UNKNOWN, UNKNOWN),
}


def test_what_a_dropped_and_a_living_token_hold(toy: Callable[..., Program]) -> None:
    program, facts = facts_of(toy(Masks()))
    results = dict(zip(program.output_names, program.graph.output_node().args[0], strict=True))
    found = {
        name: (dim, facts[results[name]].at(dim, 1), facts[results[name]].at(dim, LIVE)) for name, (dim, *_) in EXPECTED.items()
    }
    assert found == EXPECTED
    assert not facts[results["nan"]].at(2, 1).finite  # 0 * -inf


def test_a_mask_is_one_relative_to_the_living(toy: Callable[..., Program]) -> None:
    program, facts = facts_of(toy(Masks()))
    results = dict(zip(program.output_names, program.graph.output_node().args[0], strict=True))
    softmax = Factors((("b", "q", "k"),), (("b", "q", "k"),), folds={"k": NEG_INF})
    names = ("low", "half", "twice", "away", "back", "infinite")
    hidden = {name for name in names if facts.masked(Described(results[name], softmax, (results[name],)), "k")}
    assert hidden == {"low", "half", "twice", "infinite"}


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
    assert [first.at(1, cls) for cls in (0, 1, 2, LIVE)] == [TRUE, ZERO, TRUE, TRUE]
    assert [later.at(1, cls) for cls in (1, 2, LIVE)] == [ZERO, ZERO, TRUE]
    assert facts.first_kept(1)
    assert not facts.first_kept(2)
    rows = facts[program.graph.output_node().args[0][2]]
    assert {cls for (dim, cls), v in rows.held.items() if dim == 1 and v == ZERO} == {1, 2}


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
    assert (p.doubts, p.at(2, 1)) == ({Doubt(1, hard, frozenset({1}))}, ZERO)
    assert rows.doubts == {Doubt(1, hard, frozenset({1}))}
    assert times.pending == (1 if hard else 0)
    assert where.pending == 0


class Laundered(nn.Module):
    """A pending row goes through an op without a rule and one with several outputs."""

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        x = ops.prune(x, keep)
        y = ((x @ x.transpose(1, 2)) + torch.where(keep, 0.0, -1e4).unsqueeze(1)).softmax(-1) @ (x * keep.unsqueeze(-1))
        return {"leaky": nn.functional.leaky_relu(y[:, 0]), "top": y[:, 0].topk(2).values}


def test_pending_is_never_lost(toy: Callable[..., Program]) -> None:
    program, facts = facts_of(toy(Laundered()))
    assert [facts[node].pending for node in program.graph.output_node().args[0]] == [1, 1]


def test_values_compare_below() -> None:
    assert Value.of(-1e4).below(UNKNOWN)
    assert Value.of(NEG_INF).below(UNKNOWN)
    assert not Value.of(-999.0).below(UNKNOWN)
    assert not Value.of(-1e4).below(Value.of(-1e4))
    assert not Value.of(-1e4).below(Value(-1e4, 0.0))
    assert Fact(held={(1, 1): ZERO}).at(1, 1) == ZERO
    assert Fact(rest=TRUE).at(None, 1) == TRUE


class Loops(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        x = ops.prune(x, keep)
        place = torch.arange(x.shape[1])
        own = torch.eye(x.shape[1], dtype=torch.bool)
        before = place[None, :] <= place[:, None]
        near = (place[None, :] - place[:, None]).abs() < 2
        open_ = keep[:, None, :] | own
        logits = (x @ x.mT).masked_fill(~(open_ | (before & near & keep[:, None, :])), NEG_INF)
        return {"eye": own[None] & keep[:, None, :], "open": open_, "before": before, "near": near, "p": logits.softmax(-1)}


def test_on_and_off_the_diagonal(toy: Callable[..., Program]) -> None:
    program = Mark()(Canonicalize()(toy(Loops())))
    keeps = {site.keep: site.tokens.level for site in program.sites}
    facts = Facts(program.graph, AxesMap(program.graph), keeps, program.constants(), nested=lambda call, rows, keys: True)
    found = {
        name: facts[node]
        for name, node in zip(program.output_names, program.graph.output_node().args[0], strict=True)
        if isinstance(node, torch.fx.Node)
    }
    pairs = {name: fact.pair for name, fact in found.items()}
    assert all(pair is not None for pair in pairs.values())
    own = {name: pair.own[1] for name, pair in pairs.items() if pair is not None}
    assert own == {"eye": ZERO, "open": TRUE, "before": TRUE, "near": TRUE, "p": Value(-1.0, 1.0)}
    keys = {name: pair.off[max(pair.dims), 1] for name, pair in pairs.items() if pair is not None}
    assert (keys["eye"], keys["open"]) == (ZERO, ZERO)
    assert found["before"].at(1, 0) == TRUE  # everybody sees position 0
    assert not found["p"].doubts  # and itself
