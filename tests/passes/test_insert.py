"""Restoring rows that a model selects, and the site before the readers of a state."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes import Canonicalize
from tpcompile.passes.candidates import bit_inputs, candidates
from tpcompile.passes.insert import insert, restored
from tpcompile.program import Program

Toy = Callable[..., Program]


class Rows(nn.Module):
    """An output with a row per token; ``kind`` says what dropped rows hold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        alive = (x.sum(-1, keepdim=True) > 0) & keep.unsqueeze(-1)
        new = torch.tanh(x)
        match self.kind:
            case "older":
                return self.norm(torch.where(alive, new, x))
            case "older, the other way":
                return torch.where(~alive, x, new)
            case "zeros":
                return new * alive
            case "number":
                return self.norm(new.masked_fill(~alive, -2.0))
            case "frozen":
                return x + new * alive.float()
            case "given":  # the mask is an input: it drops nothing
                return new * keep.unsqueeze(-1)
            case "channels":
                return torch.where(x > 0, new, x)
        return (new * alive).sum(1)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("older", 1), ("older, the other way", 1), ("zeros", 1), ("number", 1), ("frozen", 1), ("given", 0), ("channels", 0),
        ("pooled", 0),
    ],
)  # fmt: skip
def test_rows_that_a_model_selects_are_restored(toy: Toy, agree: Callable[..., None], kind: str, count: int) -> None:
    model = Rows(kind)
    before = Canonicalize()(toy(model))
    after = restored(before)
    assert len(list(after.graph.find_nodes(op="call_function", target=RESTORE))) == count
    assert (after is before) == (count == 0)
    agree(model, after)


class Chain(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        one = torch.where((x.sum(-1) > 0)[..., None], torch.tanh(x), x)
        return torch.where((one.sum(-1) > 0)[..., None], torch.tanh(one), one) * (1 + 0 * keep[..., None])


def test_older_states_are_followed(toy: Toy, agree: Callable[..., None]) -> None:
    program = restored(Canonicalize()(toy(Chain())))
    assert len(list(program.graph.find_nodes(op="call_function", target=RESTORE))) == 2
    agree(Chain(), program)


class Additive(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        hidden = torch.where(x.sum(-1) > 0, 0.0, -1e4) + torch.where(x.amax(-1) > 1, 0.0, -1e4)
        y = torch.tanh(x)
        return ((y @ y.mT + hidden[:, None]).softmax(-1) @ y).sum(1) * (1 + 0 * keep.sum())


def test_a_site_stands_before_the_readers_and_changes_nothing(toy: Toy, agree: Callable[..., None]) -> None:
    program = Canonicalize()(toy(Additive()))
    (candidate,) = candidates(program)
    assert (candidate.numbers, candidate.senses) == ({0.0, -1e4, -2e4}, (0.0,))
    found = insert(program, candidate, "tanh", 0.0)
    assert found is not None
    (prune,) = found.graph.find_nodes(op="call_function", target=PRUNE)
    assert str(prune.args[1].target) == "aten.gt.Scalar"
    assert {user.name for user in prune.users} == {user.name for user in program.node("tanh").users}
    agree(Additive(), found)
    assert insert(program, candidate, program.graph.output_node().args[0][0].name, 0.0) is None  # nobody reads it


class Attended(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return x * attention_mask[..., None] + token_type_ids[..., None]


def test_inputs_that_may_be_masks(toy: Toy) -> None:
    ones, zeros = torch.ones(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64)
    program = toy(Attended(), x=torch.randn(1, 6, 4), attention_mask=ones, token_type_ids=zeros)
    assert bit_inputs(program) == {"inputs_attention_mask"}  # a mask keeps the first token
    program = toy(Attended(), x=torch.randn(1, 6, 4), attention_mask=ones * 2, token_type_ids=zeros)
    assert bit_inputs(program) == frozenset()
