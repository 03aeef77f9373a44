"""The proof that padding changes nothing: what it accepts is exact at every length, and what knows the length is refused at its line."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import AxisError, UsageError
from tpcompile.passes import DEFAULT, Recognise
from tpcompile.passes.padding import Padding, prove_padding
from tpcompile.program import Program

Toy = Callable[..., Program]
LIMIT = 64


class Encoder(nn.Module):
    """One block that drops tokens of little attention; ``slip`` is where it looks at the length."""

    def __init__(self, slip: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slip = slip
        self.words, self.places = nn.Embedding(50, 8), nn.Parameter(torch.randn(1, LIMIT, 8))
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        length, alive = ids.shape[1], attention_mask != 0
        x = self.words(ids) + self.places[:, :length]
        if self.slip == "mean":
            x = x - x.mean(1, keepdim=True)
        if self.slip == "last":
            x = x + x[:, -1:]
        if self.slip == "made":
            x = x + torch.ones(length).sum(0)
        if self.slip == "newest":
            x = x + torch.arange(length)[-1]
        if self.slip == "range":
            x = x + torch.linspace(0, length, 5).sum(0)
        if self.slip == "table":
            x = x + self.words(torch.arange(length)).sum(0)
        logits = self.q(x) @ self.k(x).transpose(1, 2)
        if self.slip != "open":
            logits = logits + torch.where(alive, 0.0, -1e4)[:, None]
        attention = logits.softmax(-1) * alive[..., None]
        count = length if self.slip == "number" else alive.sum(1, keepdim=True)
        score = attention.sum(1) / count
        x = x + attention @ self.v(x)
        keep = alive & (score >= 0.12)
        x = self.head(ops.prune(x, keep, score)) * keep[..., None]
        return x.sum(1) / keep.sum(1, keepdim=True).clamp(min=1)


def inputs(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (1, length), generator=generator)
    mask = (torch.rand(1, length, generator=generator) > 0.3).long()
    mask[:, 0] = 1
    return {"ids": ids, "attention_mask": mask}


def captured(toy: Toy, slip: str = "") -> Program:
    program = toy(Encoder(slip), **(inputs(9) | {"attention_mask": torch.ones(1, 9, dtype=torch.int64)}))
    found: Program = Recognise()(program)
    return found


def test_an_attention_mask_that_hides_padding_proves_it(toy: Toy) -> None:
    found = prove_padding(captured(toy))
    assert (found.mask, found.dim) == ("attention_mask", "n")
    assert isinstance(found, Padding)
    assert found.assumptions[0] == "padding: attention_mask holds 0 and 1 only, and 1 at position 0"


@pytest.mark.parametrize(
    ("slip", "says"),
    [
        ("number", "the padded length is used as a number"),
        ("last", "reads"),
        ("made", "aten.sum.dim_IntList reads padding"),
        ("newest", "aten.select.int reads padding"),
        ("range", "the padded length is used as a number"),
        ("table", "aten.sum.dim_IntList reads padding"),
        ("mean", "padding"),
        ("open", "softmax"),
    ],
)
def test_what_knows_the_length_is_refused(toy: Toy, slip: str, says: str) -> None:
    with pytest.raises(AxisError, match=says) as caught:
        prove_padding(captured(toy, slip))
    assert caught.value.where is not None


def test_without_a_mask_there_is_nothing_to_tell_padding_by(toy: Toy) -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return (ops.prune(x, keep) * keep[..., None]).sum(1)

    with pytest.raises(UsageError, match="no input says which tokens are padding"):
        prove_padding(toy(Bare()))


@pytest.fixture(scope="module")
def both() -> tuple[Program, Program]:
    """The masked program and the gathered one."""
    from tpcompile.capture import capture

    example = inputs(9) | {"attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    program = capture(Encoder().eval(), example, {name: {1: "n"} for name in example}, {"n": (2, LIMIT)})
    prove_padding(program)
    return program, DEFAULT(program)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 30), more=st.integers(1, 30), seed=st.integers(0, 999))
def test_padding_changes_nothing(both: tuple[Program, Program], length: int, more: int, seed: int) -> None:
    short = inputs(length, seed)
    long = {name: nn.functional.pad(value, (0, more)) for name, value in short.items()}
    wanted = both[0](**short)
    for program in both:
        for name, value in program(**long).items():
            assert torch.allclose(value, wanted[name], rtol=0, atol=1e-5 * max(1.0, float(wanted[name].abs().max())))
