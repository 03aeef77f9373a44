"""captured -> marked: the numbered cases of ``passes/mark.py``."""

import re
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import MarkError
from tpcompile.passes import Canonicalize, Mark
from tpcompile.program import Program

Toy = Callable[..., Program]


class Shared(nn.Module):
    def forward(self, x: Tensor, keep: Tensor, score: Tensor) -> Tensor:
        y = ops.prune(x + 1, keep)
        x = ops.prune(x, keep)
        later = torch.logical_and(keep, score > 0.0)
        z = ops.prune(x + y, later, score)
        return (z * later.unsqueeze(-1)).sum(1)


def test_case_1_every_keep_mask_is_one_site(toy: Toy, agree: Callable[..., None]) -> None:
    keep, score = torch.ones(1, 6, dtype=torch.bool), torch.randn(1, 6)
    program = Mark()(Canonicalize()(toy(Shared(), x=torch.randn(1, 6, 4), keep=keep, score=score)))
    first, second = program.sites
    assert (first.name, first.keep, first.score, str(first.tokens)) == ("site0", "inputs_keep", "", "t1")
    assert (second.name, second.keep, second.score, str(second.tokens)) == ("site1", "logical_and", "inputs_score", "t2")
    assert [site.where.source for site in program.sites] == ["y = ops.prune(x + 1, keep)", "z = ops.prune(x + y, later, score)"]
    assert_expected_inline(
        "\n".join(map(short, program.report)),
        """\
accepted: site0 at  in forward:  y = ops.prune(x + 1, keep): n tokens, keep inputs_keep
shared: prune_1 at  in forward:  x = ops.prune(x, keep) prunes by the mask of site0
accepted: site1 at  in forward:  z = ops.prune(x + y, later, score): n tokens, keep logical_and""",
    )
    agree(Shared(), program, more=lambda n: {"score": torch.randn(1, n)})


def short(line: str) -> str:
    """A report line without its line number and torch's name of the size."""
    return re.sub(r": s\d+ tokens", ": n tokens", re.sub(r"test_mark\.py:\d+", "", line))


class Floats(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return ops.prune(x, keep.float()).sum(1)


class Flat(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return ops.prune(x[:, :, 0], keep).sum(1)


@pytest.mark.parametrize(
    ("model", "got"),
    [(Floats(), "rank 3 and float32 rank 2"), (Flat(), "rank 2 and bool rank 2")],
    ids=["a float mask", "flat states"],
)
def test_case_2_a_malformed_site_is_refused(toy: Toy, model: nn.Module, got: str) -> None:
    with pytest.raises(MarkError) as caught:
        Mark()(toy(model))
    error = caught.value
    assert error.message == f"prune takes hidden states [B, N, C] and a bool mask [B, N]; it got {got}"
    assert error.fix == "reshape the hidden states to [B, N, C] and pass the keep mask as bool [B, N]"
    assert error.where is not None
    assert error.where.source.startswith("return ops.prune(")


class Dense(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (x * keep.unsqueeze(-1)).sum(1)


def test_case_3_a_dense_program_is_refused(toy: Toy) -> None:
    with pytest.raises(MarkError) as caught:
        Mark()(toy(Dense()))
    assert str(caught.value) == (
        "the model has no prune site: no tpcompile.ops.prune ran while it was traced, and no mask over tokens was found\n"
        "  fix     give the method a threshold above 0, wrap the model with tpcompile.models.prune(model, method=...), "
        "or call ops.prune(x, keep)"
    )


class Pair(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep) * keep.unsqueeze(-1)).sum(1)
