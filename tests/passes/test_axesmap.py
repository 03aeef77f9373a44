"""Which dims run over tokens: by factors, never by sizes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.axes import Factors
from tpcompile.passes import Canonicalize
from tpcompile.passes.axesmap import AxesMap, _guarded
from tpcompile.program import Program


class Mixed(nn.Module):
    """Four tokens, four channels, two heads of two."""

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        table = x.transpose(1, 2).sum(1)
        y = ops.prune(x, keep)
        heads = y.reshape(1, 4, 2, 2).permute(0, 2, 1, 3)
        values, order = y.topk(2, -1)
        return {
            "table": table,
            "channels": y.sum(1),
            "heads": heads,
            "logits": heads @ heads.transpose(-1, -2),
            "gram": y.transpose(1, 2) @ y,
            "values": values,
            "order": order,
            "prefix": y[:, :2],
            "flat": y.reshape(1, 16),
        }


def test_token_dims(toy: Callable[..., Program]) -> None:
    program = Canonicalize()(toy(Mixed(), length=4, dynamic=False))
    axes = AxesMap(program.graph)
    found = {
        name: axes.token_dims(node) for name, node in zip(program.output_names, program.graph.output_node().args[0], strict=True)
    }
    assert found == {
        "table": [1], "channels": [], "heads": [2], "logits": [2, 3], "gram": [], "values": [1], "order": [1], "prefix": [], "flat": [],
    }  # fmt: skip
    assert len(axes.roots) == 1


def test_a_dim_that_a_rule_forgets_is_rigid() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.zeros(1, 5, 4)
    guarded = _guarded(Factors(((None, None, "c"),), (("c",),), rigid=frozenset({"c"})), (node,))
    assert guarded.ins == ((None, "loose0.1", "c"),)
    assert guarded.rigid == {"c", "loose0.1"}
    plain = Factors(((None, "n", "c"),), (("c",),))
    assert _guarded(plain, (node,)) is plain
