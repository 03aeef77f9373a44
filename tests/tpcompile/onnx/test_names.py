"""The values of an emitted graph have the names, and hold the numbers, of the program's nodes."""

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.onnx.emit import emit
from tpcompile.passes import DEFAULT
from tpcompile.program import Program, Stage

HELPER = re.compile(r"val_\d+")


class Block(nn.Module):
    """Attention under a mask, a threshold, and a row-wise layer behind it; its weights are turned round ahead of time."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.query(x) @ self.key(x).transpose(1, 2) + torch.where(keep, 0.0, -1e4)[:, None, :]
        weights = logits.softmax(-1) * keep[:, :, None]
        score = weights.sum(1) / x.shape[1]
        x = x + weights @ self.value(x)
        keep = keep & (score >= 0.05)
        return self.out(ops.prune(x, keep, score)), keep


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones_like(x[:, :, 0], dtype=torch.bool)
        for block in self.blocks:
            x, keep = block(x, keep)
        return x[:, 0]


@pytest.fixture(scope="module")
def programs() -> dict[Stage, Program]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = Model().eval(), torch.randn(1, 9, 8)
    found: dict[Stage, Program] = {}
    captured = capture(model, {"x": example}, {"x": {1: "n"}}, {"n": (2, 64)})
    DEFAULT(captured, lambda step, before, after, seconds: found.__setitem__(after.stage, after))
    return found


def named(model: ir.Model) -> list[str]:
    return [str(value.name) for node in model.graph for value in node.outputs if not HELPER.fullmatch(str(value.name))]


@pytest.mark.parametrize("stage", [Stage.PLACED, Stage.COMPACT])
def test_every_named_value_is_the_programs_node(stage: Stage, programs: dict[Stage, Program]) -> None:
    program = programs[stage]
    emitted = emit(program)
    own = {node.name for node in program.graph.nodes if node.op == "call_function"}
    names = [name for name in named(emitted.model) if name in own]
    assert len(names) > 30  # most of the graph
    assert set(named(emitted.model)) - own == {"output", *emitted.taps}
    x = torch.randn(1, 13, 8, generator=torch.Generator().manual_seed(1))
    expected, got = eager(program, x), run(emitted.model, names, x.numpy())
    for name in names:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-4, err_msg=name)


def eager(program: Program, x: Tensor) -> dict[str, np.ndarray]:
    seen: dict[str, np.ndarray] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                seen[n.name] = value.detach().numpy()
            return value

    specs = program.exported.graph_signature.input_specs
    with torch.no_grad():
        Watch(program.exported.graph_module).run(*(x if spec.target is None else program.constant(spec) for spec in specs))
    return seen


def run(model: ir.Model, names: list[str], x: np.ndarray) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    present = {output.name for output in proto.graph.output}
    proto.graph.output.extend(type(proto.graph.output[0])(name=name) for name in names if name not in present)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def test_engine_and_reference_share_their_names(programs: dict[Stage, Program]) -> None:
    reference, engine = (set(named(emit(programs[stage]).model)) for stage in (Stage.PLACED, Stage.COMPACT))
    gone = {node.name for node in programs[Stage.PLACED].graph.nodes} - {node.name for node in programs[Stage.COMPACT].graph.nodes}
    assert {"add_24", "mul_35"} <= gone & reference  # before the first site a mask hides nothing
    assert not reference - engine - gone - {"ge", *(name for name in reference if name.startswith("bound"))}  # which is site0.keep then
    assert {name.partition("_")[0] for name in engine - reference} <= {
        "arange", "getitem", "index", "lt", "select", "site0.index", "site1.index", "unsqueeze",
    }  # fmt: skip  # the gathers


def test_a_turned_weight_keeps_its_name(programs: dict[Stage, Program]) -> None:
    graph = emit(programs[Stage.COMPACT]).model.graph
    names = {f"captured.blocks.{i}.{part}.weight" for i in range(2) for part in ("query", "key", "value", "out")}
    found = {name.removesuffix(".T"): value for name, value in graph.initializers.items() if name.removesuffix(".T") in names}
    assert found.keys() == names
    weights = programs[Stage.COMPACT].exported.state_dict
    for name, value in found.items():
        assert value.const_value is not None
        weight, turned = weights[name].detach().numpy(), str(value.name).endswith(".T")
        np.testing.assert_array_equal(value.const_value.numpy(), weight.T if turned else weight)
