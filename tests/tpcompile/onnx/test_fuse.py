"""Attention as one op: which patterns become one, and that runtimes compute the same by it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.reference
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture import capture
from tpcompile.onnx.emit import OnnxModel, emit

HEADS, WIDTH = 2, 8
Core = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Queries, keys and values are the input times numbers; ``core`` is what stands between."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = ((x * s).view(b, n, HEADS, c // HEADS).transpose(1, 2) for s in (1.0, 0.7, 0.5))
        return self.core(q, k, v, mask).transpose(1, 2).reshape(b, n, c)


def bias(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, -1e4)[:, None, None, :]


def written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3 + bias(mask)).softmax(-1) @ v


def divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q * 0.5) @ k.transpose(2, 3) / 2.0 + bias(mask).expand(-1, -1, q.shape[2], -1)).softmax(-1) @ v


def mask_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (bias(mask) + q @ k.transpose(-1, -2)).softmax(-1) @ v


def keys_turned_at_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2).permute(0, 2, 3, 1) + bias(mask)).softmax(-1) @ v


def unmasked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].expand(-1, -1, q.shape[2], -1))


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def rows_scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return written(q, k, v, mask) * mask[:, None, :, None]


def scale_behind_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2) + bias(mask)) * 0.3).softmax(-1) @ v


def map_read_twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    probs = (q @ k.transpose(-1, -2) + bias(mask)).softmax(-1)
    return probs @ v + probs.sum(2).unsqueeze(-1)


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) + bias(mask)).softmax(2) @ v


def built(core: Core, batch: int) -> tuple[Attention, OnnxModel]:
    model = Attention(core).eval()
    rows = {0: "batch", 1: "n"} if batch > 1 else {1: "n"}
    given = {"x": torch.randn(batch, 5, WIDTH), "mask": torch.ones(batch, 5, dtype=torch.bool)}
    return model, emit(capture(model, given, {"x": rows, "mask": rows}))


def agrees(model: Attention, onnx_model: OnnxModel, batch: int, path: Path) -> None:
    onnx_model.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    runtimes: list[Callable[[dict[str, np.ndarray]], np.ndarray]] = [
        lambda feeds: session.run(None, feeds)[0],
        lambda feeds: onnx.reference.ReferenceEvaluator(str(path)).run(None, feeds)[0],
        lambda feeds: openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds)[0],
    ]
    for length, hidden in ((2, 0), (7, 3), (7, 0)):
        x, mask = torch.randn(batch, length, WIDTH) * 3, torch.ones(batch, length, dtype=torch.bool)
        mask[0, length - hidden :] = False
        for run in runtimes:
            got = run({"x": x.numpy(), "mask": mask.numpy()})
            np.testing.assert_allclose(got, model(x, mask).numpy(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("core", [written, divided, mask_first, unmasked, native, causal])
def test_one_op_with_its_heads(core: Core, batch: int, tmp_path: Path) -> None:
    model, onnx_model = built(core, batch)
    counts = Counter(node.op_type for node in onnx_model.model.graph)
    assert counts["Attention"] == 1
    assert not counts.keys() & {"Softmax", "MatMul", "Transpose", "Reshape"}
    agrees(model, onnx_model, batch, tmp_path / "model.onnx")


@pytest.mark.parametrize("core", [keys_turned_at_once, rows_scaled])
def test_one_op_between_other_ops(core: Core, tmp_path: Path) -> None:
    model, onnx_model = built(core, 1)
    counts = Counter(node.op_type for node in onnx_model.model.graph)
    assert (counts["Attention"], counts["Softmax"]) == (1, 0)
    agrees(model, onnx_model, 1, tmp_path / "model.onnx")


@pytest.mark.parametrize("core", [scale_behind_the_mask, map_read_twice, softmax_over_queries])
def test_what_is_no_plain_attention_stays(core: Core, tmp_path: Path) -> None:
    model, onnx_model = built(core, 1)
    counts = Counter(node.op_type for node in onnx_model.model.graph)
    assert (counts["Attention"], counts["Softmax"]) == (0, 1)
    agrees(model, onnx_model, 1, tmp_path / "model.onnx")


class Deep(nn.Module):
    """Two layers behind one mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return Attention(written)(x + Attention(written)(x, mask), mask)


def test_the_mask_is_spread_once() -> None:
    given = {"x": torch.randn(1, 5, WIDTH), "mask": torch.ones(1, 5, dtype=torch.bool)}
    graph = emit(capture(Deep().eval(), given, {"x": {1: "n"}, "mask": {1: "n"}})).model.graph
    counts = Counter(node.op_type for node in graph)
    assert (counts["Attention"], counts["Expand"]) == (2, 1)
