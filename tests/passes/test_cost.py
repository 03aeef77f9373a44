"""FLOPs by hand, on the masked and the gathered program."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.passes import Canonicalize, Mark, Pipeline, Place, pipeline
from tpcompile.passes.cost import polynomial
from tpcompile.program import Program


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        logits = x @ x.transpose(1, 2)
        x = logits.softmax(-1) @ x
        x = ops.prune(x, keep)
        x = self.down(torch.nn.functional.gelu(self.up(x)))
        return (x * keep.unsqueeze(-1)).sum(1)


EXPECTED = {("t0", "t0"): 2 * (2 * 4), ("t1",): 2 * (4 * 6) * 2}
"""A multiply-accumulate is two: logits and values are ``4 n n`` each, the linear maps ``24 k`` each."""


def test_flops_by_token_set(toy: Callable[..., Program]) -> None:
    captured = toy(Block())
    placed = Pipeline((Canonicalize(), Mark(), Place()))(captured)
    assert {names: c for c, names in polynomial(placed)} == EXPECTED
    assert {names: c for c, names in polynomial(pipeline(optimize=False)(captured))} == EXPECTED


def test_flops_of_a_fixed_length(toy: Callable[..., Program]) -> None:
    placed = Pipeline((Canonicalize(), Mark(), Place()))(toy(Block(), dynamic=False))
    assert {names: c for c, names in polynomial(placed)} == EXPECTED


class Patches(nn.Module):
    """Patches of 4 x 4 pixels become tokens: 16 of them in an image of 16 x 16."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.embed = batch, nn.Conv2d(3, 8, 4, 4)

    def forward(self, image: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(self.embed(image).flatten(2).transpose(1, 2), keep)
        return (x * keep.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_sums_over_its_kernel(toy: Callable[..., Program], batch: int) -> None:
    given = {"image": torch.randn(batch, 3, 16, 16), "keep": torch.ones(batch, 16, dtype=torch.bool)}
    placed = Pipeline((Canonicalize(), Mark("one" if batch == 1 else "ragged"), Place()))(
        toy(Patches(batch), dynamic=False, **given)
    )
    assert polynomial(placed) == ((2 * 16 * 8 * 3 * 4 * 4, ()),)


class Fused(nn.Module):
    """A dense model: attention as one op."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, 2)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum((1, 2))


def test_a_dynamic_batch_of_a_dense_program_is_no_token() -> None:
    captured = capture(Fused().eval(), {"x": torch.randn(2, 5, 4)}, {"x": {0: "batch"}})
    assert polynomial(Canonicalize()(captured)) == ((2 * 5 * 5 * 4 * 2, ()),)
    one = capture(Fused().eval(), {"x": torch.randn(1, 5, 4)}, {"x": {1: "n"}})
    assert polynomial(Canonicalize()(one)) == ((2 * 4 * 2, ("t0", "t0")),)
