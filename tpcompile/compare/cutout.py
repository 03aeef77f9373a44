"""The part of a graph that is at fault, as a model of its own, with its inputs and a script that shows the difference."""

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.compare.layers import Level, Root, common_rows
from tpcompile.compare.watch import Batch, Seen, Side
from tpcompile.data.tensors import vacant
from tpcompile.errors import EnvironmentFault

if TYPE_CHECKING:
    import onnx

SIDES = ("engine", "reference")
SCRIPT = '''\
"""What `tpcompile bisect` cut out: {name}, computed by the engine and by the reference from values on which both agree.

Needs numpy and onnxruntime. Where there is no engine.onnx, what the engine gave is in engine.npz.
"""

from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).parent


def value(side: str) -> np.ndarray:
    given = np.load(HERE / f"{{side}}.npz")
    if not (HERE / f"{{side}}.onnx").is_file():
        return given["result"]
    session = onnxruntime.InferenceSession(str(HERE / f"{{side}}.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {{one.name: given[one.name] for one in session.get_inputs()}})[0]


def alike(side: str, array: np.ndarray) -> np.ndarray:
    """The rows of tokens that both sides have, in one order."""
    rows = np.load(HERE / "rows.npz")
    for dim in range(array.ndim):
        if f"{{side}}.{{dim}}" in rows:
            array = array.take(rows[f"{{side}}.{{dim}}"], dim)
    return array


given = {{side: value(side) for side in ("engine", "reference")}}
rank = max(array.ndim for array in given.values())  # an engine leaves a batch of one out
whole = {{side: array.reshape((1,) * (rank - array.ndim) + array.shape) for side, array in given.items()}}
engine, reference = (alike(side, array).astype(np.float64) for side, array in whole.items())
print("{name}", engine.shape, "largest difference", np.abs(engine - reference).max())
'''


def cut_out(out: Path, root: Root, way: Sequence[Level], sides: tuple[Side, Side], batch: Batch, seen: tuple[Seen, Seen]) -> None:
    """Write ``engine.onnx`` and ``reference.onnx`` with ``.npz`` inputs, ``rows.npz`` and ``repro.py``; whole or not at all.

    Args:
        out: a folder that does not exist.
        root: the value at fault.
        way: the token set of each of its dims.
        sides: engine and reference.
        batch: with the sample that shows the fault most.
        seen: what both sides gave for it.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    vacant(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            for name, side in zip(SIDES, sides, strict=True):
                _side(fresh, name, side, root, batch)
            np.savez(fresh / "rows.npz", allow_pickle=False, **_rows(way, batch, seen, root.gap.sample))
            (fresh / "repro.py").write_text(SCRIPT.format(name=root.name), encoding="utf-8")
            shutil.move(fresh, out)
    except OSError as error:
        raise EnvironmentFault(f"{out} cannot be written: {error.strerror}", fix="choose another folder for --out") from error


def _side(folder: Path, name: str, side: Side, root: Root, batch: Batch) -> None:
    """One side's part of the graph and its inputs."""
    import onnx

    file = side.file_of(root.name)
    whole = onnx.load(file) if file is not None else None
    own = [value.name for value in whole.graph.input if value.name not in batch.feeds] if whole is not None else []
    taps = [tap for tap in dict.fromkeys([*root.inputs, *own]) if tap not in side.outputs]
    with side.open([*taps, *([] if root.name in side.outputs else [root.name])]) as session:
        values = {**batch.feeds, **session.run(batch.feeds)}
    given = {value: values[value] for value in root.inputs}
    if whole is not None:
        part = cut(whole, root.inputs, root.name, values)
        given = {value.name: values[value.name] for value in part.graph.input}
        onnx.save(part, folder / f"{name}.onnx")
    else:
        given["result"] = values[root.name]
    np.savez(folder / f"{name}.npz", allow_pickle=False, **given)


def cut(model: "onnx.ModelProto", inputs: Collection[str], output: str, values: Mapping[str, NDArray[Any]]) -> "onnx.ModelProto":
    """The part of a model that computes one value from others, and from the model's own inputs where it needs them.

    Args:
        model: the whole, with its weights.
        inputs: values to start from.
        output: the value wanted.
        values: of ``inputs``, the model's inputs and ``output``: their dtypes and ranks are taken.
    """
    import onnx
    from onnx import helper

    producers = {name: node for node in model.graph.node for name in node.output}
    wanted, nodes, read = [output], dict[str, onnx.NodeProto](), set[str]()
    while wanted:
        node = producers.get(wanted.pop())
        if node is None or node.output[0] in nodes:
            continue
        nodes[node.output[0]] = node
        read |= set(node.input)
        wanted += [name for name in node.input if name not in inputs]
    own = {value.name for value in model.graph.input}
    weights = [weight for weight in model.graph.initializer if weight.name in read]
    starts = sorted(name for name in read & (own | set(inputs)) if name not in {weight.name for weight in weights})
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), [None] * values[name].ndim)
        for name in (*starts, output)
    ]
    ordered = [node for node in model.graph.node if node.output and node.output[0] in nodes]
    graph = helper.make_graph(ordered, "part", ports[:-1], ports[-1:], weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _rows(way: Sequence[Level], batch: Batch, seen: tuple[Seen, Seen], number: int) -> dict[str, NDArray[Any]]:
    """For each dim that is not compared whole: which of its rows, on either side."""
    sample = batch.numbers.index(number)
    found: dict[str, NDArray[Any]] = {}
    for d, level in enumerate(way):
        if level is not None:
            pair = common_rows(*seen, sample, level, batch.samples[sample].length)
            found |= {f"{side}.{d}": rows for side, rows in zip(SIDES, pair, strict=True)}
    if len(batch.numbers) > 1:
        found |= {f"{side}.0": np.array([sample]) for side in SIDES}
    return found
