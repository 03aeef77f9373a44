"""What differs: small graphs first, then bundles as a user has them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import tpcompile
from tpcompile import bundle as bundles
from tpcompile import ops
from tpcompile.compare.differ import diff
from tpcompile.compare.graphdiff import GraphDiff
from tpcompile.errors import IntegrityError, ModelError, UsageError

Save = Callable[..., Path]


def node(kind: str, inputs: Sequence[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **attributes)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """``save(nodes, weight=array)``: an ONNX file, x float32 [1, n] -> y."""
    count = iter(range(100))

    def make(*nodes: onnx.NodeProto, size: int | str = "n", **weights: object) -> Path:
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name in ("x", "y")]
        tensors = [numpy_helper.from_array(np.asarray(value, dtype=np.float32), name) for name, value in weights.items()]
        graph = helper.make_graph(list(nodes), "g", ports[:1], ports[1:], tensors)
        path = tmp_path / f"{next(count)}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    return make


def graph(a: Path, b: Path) -> GraphDiff:
    (found,) = diff(a, b).graphs
    return found


BASE = (node("Mul", ["x", "w"], "scaled"), node("Tanh", ["scaled"], "bent"), node("Add", ["bent", "x"], "y"))
WEIGHT = {"w": [1.0, 2.0]}


def test_the_same_graph(save: Save) -> None:
    renamed = (node("Mul", ["x", "w"], "val_3"), node("Tanh", ["val_3"], "val_9"), node("Add", ["val_9", "x"], "y"))
    found = diff(save(*BASE, **WEIGHT), save(*renamed, **WEIGHT))
    assert not found.differs
    assert found.text().endswith("the same ops and weights; names or notes may differ\nno differences")


def test_an_op_came_and_its_reader_is_not_named_for_it(save: Save) -> None:
    more = (BASE[0], node("Relu", ["scaled"], "fresh"), node("Tanh", ["fresh"], "bent"), BASE[2])
    found = graph(save(*BASE, **WEIGHT), save(*more, **WEIGHT))
    assert [str(op) for op in found.ops] == ["+ fresh = Relu()"]
    assert (found.added, found.removed) == ({"Relu": 1}, {})
    back = graph(save(*more, **WEIGHT), save(*BASE, **WEIGHT))
    assert [str(op) for op in back.ops] == ["- fresh = Relu()"]


def test_an_op_reads_something_else(save: Save) -> None:
    crossed = (BASE[0], BASE[1], node("Add", ["bent", "scaled"], "y"))
    found = graph(save(*BASE, **WEIGHT), save(*crossed, **WEIGHT))
    assert [str(op) for op in found.ops] == ["~ y = Add: input 1 x -> scaled"]
    assert (found.added, found.removed) == ({}, {})


def test_a_constant_and_an_attribute(save: Save) -> None:
    a = save(node("Mul", ["x", "val_0"], "scaled"), node("Softmax", ["scaled"], "y", axis=-1), val_0=0.5)
    b = save(node("Mul", ["x", "val_7"], "scaled"), node("Softmax", ["scaled"], "y", axis=0), val_7=0.25)
    assert [str(op) for op in graph(a, b).ops] == [
        "~ scaled = Mul: input 1 0.5 -> 0.25", "- y = Softmax(axis=-1)", "+ y = Softmax(axis=0)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"w": [1.0, 2.5]}, "~ w float32[2]: by up to 0.5"),
        ({"w": [[1.0, 2.0]]}, "~ w: float32[2] -> float32[1, 2]"),
        ({"v": [1.0, 2.0]}, "+ v float32[2]"),
        ({"w": [1.0, np.nan]}, "~ w float32[2]: other numbers"),
    ],
)
def test_weights_by_name(other: dict[str, object], text: str, save: Save) -> None:
    name = next(iter(other))
    found = graph(save(*BASE, **WEIGHT), save(node("Mul", ["x", name], "scaled"), *BASE[1:], **other))
    assert text in [str(weight) for weight in found.weights]
    assert found.equal_weights == 0


def test_inputs_and_outputs(save: Save) -> None:
    found = graph(save(*BASE, **WEIGHT), save(*BASE, size=2, **WEIGHT))
    assert [str(port) for port in found.interface] == [
        "~ input x: float32[1, n] -> float32[1, 2]", "~ output y: float32[1, n] -> float32[1, 2]",
    ]  # fmt: skip


def test_a_thousand_ops_of_one_kind(save: Save) -> None:
    chain = [node("Tanh", [f"h{i}" if i else "x"], f"h{i + 1}" if i < 999 else "y") for i in range(1000)]
    cut = [*chain[:500], node("Tanh", ["h500"], "h502"), *chain[502:]]
    assert [op.change for op in graph(save(*chain), save(*cut)).ops] == ["removed"]


class Tower(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope, self.lin = slope, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.lin(x), self.slope)


def test_two_traced_programs(tmp_path: Path) -> None:
    for name, slope in (("a", 0.1), ("b", 0.2)):
        torch.manual_seed(0)
        torch.export.save(torch.export.export(Tower(slope), (torch.ones(1, 4),)), tmp_path / f"{name}.pt2")
    found = graph(tmp_path / "a.pt2", tmp_path / "b.pt2")
    assert [(op.change, op.kind, op.detail) for op in found.ops] == [
        ("removed", "aten.leaky_relu.default", "_, 0.1"), ("added", "aten.leaky_relu.default", "_, 0.2"),
    ]  # fmt: skip
    assert (found.weights, found.equal_weights) == ((), 2)


# --- bundles ----------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A sum over tokens whose norm passes a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.lin, self.head, self.threshold = nn.Linear(8, 8), nn.Linear(8, 3), threshold

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        score = x.norm(dim=-1)
        keep = score > self.threshold
        return {"logits": self.head((ops.prune(self.lin(x), keep, score) * keep.unsqueeze(-1)).sum(1))}


def export(out: Path, threshold: float = 2.5, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(threshold).eval()
    tpcompile.export(model, {"x": torch.ones(1, 9, 8)}, out, dynamic={"x": {1: "seq"}})
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles: another threshold, and other weights."""
    folder = tmp_path_factory.mktemp("bundles")
    return export(folder / "a"), export(folder / "b", 2.0, 1)


def test_a_bundle_and_itself(pair: tuple[Path, Path]) -> None:
    found = diff(pair[0], pair[0])
    assert not found.differs
    assert found.text() == "no differences"


def test_when_and_where_it_was_built_is_no_difference(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "copy")
    manifest = bundles.read(tmp_path / "copy").manifest
    environment = {**manifest.environment, "created": "yesterday", "hardware": {"machine": "abacus"}}
    bundles.seal(tmp_path / "copy", manifest.model_copy(update={"environment": environment, "measured": {"speed": 1}}))
    found = diff(pair[0], tmp_path / "copy")
    assert not found.differs
    assert "hardware.machine" in [change.field for change in found.environment]
    assert found.text().endswith("no differences")


def test_two_bundles(pair: tuple[Path, Path]) -> None:
    found = diff(*pair)
    assert found.differs
    assert [change.field for change in found.fields] == ["model.sha256"]
    assert {"model.onnx", "dense/model.onnx", "reference/model.onnx"} <= {file.name for file in found.files}
    engine = next(graph for graph in found.graphs if graph.file == "model.onnx")
    assert [str(op).partition("   #")[0] for op in engine.ops] == ["~ site0.keep = Greater: input 1 2.5 -> 2"]
    assert {weight.name.removesuffix(".T") for weight in engine.weights} == {
        "lin.weight", "lin.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert all(weight.change == "changed" and weight.max_abs for weight in engine.weights)
    again = diff(*pair)
    assert (found.text(), found.to_json()) == (again.text(), again.to_json())
    assert set(json.loads(json.dumps(found.to_json(), allow_nan=False))) == {
        "a", "b", "differs", "fields", "environment", "files", "graphs",
    }  # fmt: skip


def test_a_field_that_only_one_has(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "copy")
    manifest = bundles.read(tmp_path / "copy").manifest
    bundles.seal(tmp_path / "copy", manifest.model_copy(update={"sites": (), "dims": {"seq": (2, 10)}}))
    rows = diff(pair[0], tmp_path / "copy").text().splitlines()
    assert rows[0].startswith("field      sites[0]     name site0, module ")
    assert rows[0].endswith(" -> none")
    assert rows[1] == "field      dims.seq[1]  8192 -> 10"


def test_a_changed_file_is_an_integrity_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "copy")
    with (tmp_path / "copy" / "dense" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError):
        diff(pair[0], tmp_path / "copy")


def test_two_things_that_cannot_be_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken.pt2").write_bytes(b"no program")
    for a, b, error in [
        (pair[0], pair[0] / "model.onnx", UsageError),
        (pair[0], tmp_path / "none", UsageError),
        (tmp_path / "notes.txt", tmp_path / "notes.txt", UsageError),
        (tmp_path / "broken.pt2", tmp_path / "broken.pt2", ModelError),
        (tmp_path, tmp_path, IntegrityError),
    ]:
        with pytest.raises(error):
            diff(a, b)
