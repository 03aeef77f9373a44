"""Python branches on 0-d parameters: their values at capture stand for them."""

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.errors import CaptureError
from tpcompile.frozen import frozen


class Inner(nn.Module):
    """Official LTP's way to switch a layer off."""

    threshold: Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold == 0:
            return x
        return x * self.scale * (x > self.threshold)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(0.0), Inner(0.25)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_branch_on_a_scalar_is_captured_at_its_value() -> None:
    model = Outer().eval()
    program = capture(model, {"x": torch.randn(1, 6)}, {"x": {1: "n"}})
    x = torch.linspace(-1, 1, 9)[None]
    torch.testing.assert_close(program(x=x)["output"], model(x))
    assert program.assumptions == (
        "layers.0.threshold = 0, its value at capture",
        "layers.0.scale = 2, its value at capture",
        "layers.1.threshold = 0.25, its value at capture",
        "layers.1.scale = 2, its value at capture",
    )
    assert [type(layer) for layer in model.layers] == [Inner, Inner]  # the model is as it was
    assert model.layers[1].threshold is dict(model.named_parameters())["layers.1.threshold"]


def test_without_a_branch_scalars_stay_parameters() -> None:
    program = capture(nn.Linear(3, 3).eval(), {"input": torch.randn(1, 3)})
    assert program.assumptions == ()


def test_a_branch_on_data_is_still_refused() -> None:
    class Data(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("least", torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > self.least else -x

    with pytest.raises(CaptureError, match="could not trace Data"):
        capture(Data().eval(), {"x": torch.randn(1, 6)})


def test_the_classes_come_back_after_an_error() -> None:
    model = Outer().eval()
    with pytest.raises(RuntimeError, match="stop"), frozen(model):
        raise RuntimeError("stop")
    assert [type(layer) for layer in model.layers] == [Inner, Inner]
