"""An index of all positions is a view; any other index stays."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.passes import Canonicalize

LENGTH = 6
Pick = Callable[[Tensor], Tensor]


def places(x: Tensor, dim: int) -> Tensor:
    return torch.arange(x.shape[dim])


class Picked(nn.Module):
    def __init__(self, pick: Pick) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(x) + 1


@pytest.mark.parametrize(
    ("pick", "view"),
    [
        (lambda x: x[places(x, 0)[:, None, None, None], (places(x, 1) + 0)[None, None, None, :]], True),
        (lambda x: x[places(x, 0)[None, :], places(x, 1)[:, None]], True),
        (lambda x: x[places(x, 0)[:, None], places(x, 1)[None, :] // 2], False),
        (lambda x: x[places(x, 0)[:, None], torch.arange(3)[None, :]], False),
        (lambda x: x[places(x, 0)[:, None], (places(x, 1)).flip(0)[None, :]], False),
        (lambda x: x[:, :2][places(x, 0), torch.arange(2)], False),
    ],
)
def test_only_an_index_of_all_positions_is_a_view(pick: Pick, view: bool) -> None:
    model = Picked(pick).eval()
    program = Canonicalize()(capture(model, {"x": torch.randn(2, LENGTH)}, {}))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("aten.index.Tensor" not in targets) == view
    x = torch.randn(2, LENGTH)
    assert torch.equal(program(x=x)["output"], model(x))
