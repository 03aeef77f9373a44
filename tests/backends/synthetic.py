"""A small pruned graph with every property the backends must carry: two gather sites with taps, a dead tap, dynamic lengths."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, WIDTH = 50, 8
TAPS = tuple(f"site{i}.{what}" for i in range(2) for what in ("keep", "index", "score"))


def _site(i: int, x: str, mask: str) -> list[onnx.NodeProto]:
    """Keep attended tokens whose score passes, and always token 0: rows x<i+1>, their mask m<i+1>."""
    node = helper.make_node
    return [
        node("MatMul", [x, f"probe{i}"], [f"column{i}"]),
        node("Squeeze", [f"column{i}", "two"], [f"site{i}.score"]),
        node("Greater", [f"site{i}.score", "threshold"], [f"passes{i}"]),
        node("And", [f"passes{i}", mask], [f"inner{i}"]),
        node("Shape", [f"inner{i}"], [f"shape{i}"]),
        node("Expand", ["true", f"shape{i}"], [f"ones{i}"]),
        node("ScatterElements", [f"inner{i}", "origin", "true"], [f"site{i}.keep"], axis=1),
        node("NonZero", [f"site{i}.keep"], [f"where{i}"]),
        node("Gather", [f"where{i}", "one"], [f"rows{i}"], axis=0),
        node("Unsqueeze", [f"rows{i}", "zeros"], [f"site{i}.index"]),  # dead: only the tap reads it
        node("Gather", [x, f"rows{i}"], [f"kept{i}"], axis=1),
        node("MatMul", [f"kept{i}", "weight"], [f"x{i + 1}"]),
        node("Gather", [f"site{i}.keep", f"rows{i}"], [f"m{i + 1}"], axis=1),
    ]


def model(external: bool = False) -> onnx.ModelProto:
    """input_ids and attention_mask int64 ``[1, seq]`` -> logits float32 ``[1, 8]``."""
    rng = np.random.default_rng(7)
    values = {
        "table": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        "weight": (rng.standard_normal((WIDTH, WIDTH)) / 2).astype(np.float32),
        "probe0": rng.standard_normal((WIDTH, 1)).astype(np.float32),
        "probe1": rng.standard_normal((WIDTH, 1)).astype(np.float32),
        "threshold": np.float32(0.1),
        "true": np.array([[True]]),
        "origin": np.array([[0]]),
        "zeros": np.array([0]),
        "one": np.array(1),
        "ones": np.array([1]),
        "two": np.array([2]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x0"], axis=0),
        helper.make_node("Cast", ["attention_mask"], ["m0"], to=TensorProto.BOOL),
        *_site(0, "x0", "m0"),
        *_site(1, "x1", "m1"),
        helper.make_node("ReduceMean", ["x2", "ones"], ["logits"], keepdims=0),
    ]
    nodes = [one for one in nodes if not one.output[0].startswith(("shape", "ones"))]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "seq"]) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, WIDTH])]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "synthetic", inputs, outputs, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def save(folder: Path, external: bool = False) -> Path:
    """The model as ``folder/model.onnx``, its larger weights in ``model.onnx.data`` if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    extra = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 500} if external else {}
    onnx.save(model(), path, **extra)
    return path


def sample(length: int, seed: int = 0, attended: int | None = None) -> dict[str, np.ndarray]:
    """Random ids of one length, the first ``attended`` of them attended (default all)."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (1, length))
    mask = np.zeros((1, length), dtype=np.int64)
    mask[:, : length if attended is None else attended] = 1
    return {"input_ids": ids, "attention_mask": mask}


def expected(feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same in numpy: logits, and per site the kept original positions."""
    values = {one.name: numpy_helper.to_array(one) for one in model().graph.initializer}
    x, mask = values["table"][feeds["input_ids"][0]], feeds["attention_mask"][0].astype(bool)
    positions, kept = np.arange(len(mask)), []
    for i in range(2):
        keep = ((x @ values[f"probe{i}"])[:, 0] > values["threshold"]) & mask
        keep[0] = True
        x, mask, positions = x[keep] @ values["weight"], mask[keep] | True, positions[keep]
        kept.append(positions)
    return x.mean(0, keepdims=True), kept


def few(path: Path, inputs: dict[str, tuple[int, list[object]]], nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Path:
    """Write a model of a few nodes, the last of which gives ``y``.

    Args:
        path: the file.
        inputs: name -> type and shape.
        nodes: in order.
        constants: by name.
    """
    takes = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    gives = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "few", takes, gives, held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
