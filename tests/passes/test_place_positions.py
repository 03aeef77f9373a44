"""Case 5 of ``passes/place.py``: what reads tokens by position behind a site."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import AxisError, RigidAxis
from tpcompile.passes import DEFAULT
from tpcompile.program import Program

Toy = Callable[..., Program]
Agree = Callable[..., None]
Refused = Callable[[type[AxisError], Program], AxisError]
PlaceOf = Callable[[str], str]


class First(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        return x[:, 0] + x[:, 2] * x[:, 0:2].sum(1)


def test_case_5_positions_from_the_front_are_pinned(toy: Toy, agree: Agree) -> None:
    program = DEFAULT(toy(First()))
    assert [site.pinned for site in program.sites] == [3]
    agree(First(), program, lengths=(3, 4, 7, 12))


class FirstKept(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(keep.shape[1]) == 0)
        return ops.prune(x, keep)[:, 0]


def test_case_5_a_first_token_that_is_kept_needs_no_pin(toy: Toy, agree: Agree) -> None:
    program = DEFAULT(toy(FirstKept()))
    assert [site.pinned for site in program.sites] == [0]
    agree(FirstKept(), program)


class Last(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        return x[:, -1]


class Running(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        return (x.cumsum(1) * keep.unsqueeze(-1)).sum(1)


class Merged(nn.Module):
    """Tokens and channels in one dim."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep) * keep.unsqueeze(-1)).reshape(1, -1).amax(1)


class Prefix(nn.Module):
    """A short index reads the first rows by position."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        index = torch.zeros(1, 2, 4, dtype=torch.int64)
        return ops.prune(x, keep).gather(2, index).sum(1)


@pytest.mark.parametrize(
    ("model", "op", "source"),
    [
        (Last(), "select.int", "return x[:, -1]"),
        (Running(), "cumsum.default", "return (x.cumsum(1) * keep.unsqueeze(-1)).sum(1)"),
        (Merged(), "reshape.default", "return (ops.prune(x, keep) * keep.unsqueeze(-1)).reshape"),
        (Prefix(), "gather.default", "return ops.prune(x, keep).gather(2, index).sum(1)"),
    ],
    ids=["last", "cumsum", "merged", "gather"],
)
def test_case_5_other_positions_are_refused(toy: Toy, model: nn.Module, op: str, source: str, refused: Refused, place_of: PlaceOf) -> None:
    error = refused(RigidAxis, toy(model))
    assert error.message == f"aten.{op} reads positions or the count of tokens, and t1 has lost some"
    assert error.fix == "compute it before the first site, read position 0, or pool with the keep mask"
    assert error.where is not None
    assert error.where.short == place_of(source)


class TokenLevel(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": ops.prune(x, keep) * 2}


def test_case_5_a_token_level_output_is_refused(toy: Toy, refused: Refused) -> None:
    error = refused(RigidAxis, toy(TokenLevel()))
    assert error.message == "output 'last_hidden_state' has one row per token, and t1 has lost some"
    assert error.fix == "bring the rows back with ops.restore(x, keep, base), or return a pooled output"
