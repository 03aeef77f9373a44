"""ToMe and Zero-TPrune on texts, compiled: every runtime, every length from one graph, with padding, in batches, as a bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import models
from tpcompile.backends import backend, runnable
from tpcompile.models.library import transformers
from tpcompile.onnx.emit import emit

TARGETS = runnable()
STAGES = [{"block": 0, "iterations": 3, "similar": 0.25, "keep": 0.75}]
CASES: dict[str, tuple[Literal["one", "ragged"], dict[str, Any]]] = {
    "tome": ("one", {"r": 3}),
    "zero_tprune": ("ragged", {"stages": STAGES}),
}
"""Method -> batch policy and parameters."""
LENGTHS = [(2, 0), (5, 0), (9, 3), (14, 0), (20, 1)]
"""Tokens of a text, and pads behind them."""
MIXED = [(3, 13), (16, 0), (9, 7)]
"""The same for texts of one batch."""


def encoder() -> nn.Module:
    """A sentence encoder of 2 layers, width 24 and 3 heads."""
    library = transformers()
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = library.BertConfig(vocab_size=60, max_position_embeddings=32, attn_implementation="eager", **sizes)
    torch.manual_seed(7)
    model = library.BertModel(config)
    for name, weight in model.named_parameters():
        if not name.endswith("LayerNorm.weight"):
            nn.init.normal_(weight, std=0.3)
    return models.SentenceEncoder(model.eval())


def text(length: int, pads: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (1, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    tail = torch.zeros(1, pads, dtype=torch.int64)
    return {"input_ids": torch.cat([ids, tail], dim=1), "attention_mask": torch.cat([mask, tail], dim=1)}


def batch(texts: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    rows = [text(*one) for one in texts]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def dynamic(*dims: str) -> dict[str, dict[int, str]]:
    return {name: dict(enumerate(dims, 2 - len(dims))) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_engines_equal_eager(method: str, tmp_path: Path) -> None:
    """Of padded texts and of batches, too, what the eager model makes of each text alone; nothing in the graph depends on data."""
    policy, parameters = CASES[method]
    model = models.prune(encoder(), method, **parameters)
    example, dims = (batch([(9, 0), (7, 2)]), ("batch", "seq")) if policy == "ragged" else (text(9), ("seq",))
    written = emit(tpcompile.lower(model, example, dynamic=dynamic(*dims), batch=policy))
    written.save(tmp_path / "model.onnx")
    assert "NonZero" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    for target in TARGETS:
        (tmp_path / target).mkdir()
        backend(target).build(tmp_path / "model.onnx", tmp_path / target, "fp32")
        with backend(target).open(tmp_path / target, taps=written.taps, threads=1, precision="fp32") as session:
            for group in [[one] for one in LENGTHS] + ([MIXED] if policy == "ragged" else []):
                values = session.run({name: value.numpy() for name, value in batch(group).items()})
                for row, (length, _) in enumerate(group):
                    alone = model.trace(text(length)["input_ids"])
                    want = alone.outputs["sentence_embedding"][0].numpy()
                    np.testing.assert_allclose(values["sentence_embedding"][row], want, rtol=0, atol=1e-5)
                    sites = range(len(parameters.get("stages", alone.kept)))
                    assert [values[f"site{i}.keep"][row].sum() for i in sites] == [alone.kept[i].sum() for i in sites]


def test_bundle(bert_folder: Path, tmp_path: Path) -> None:
    """The whole way from a directory: the bundle brings reference and dense model, and `validate` knows its sites."""
    bundle = tpcompile.export(bert_folder, out=tmp_path / "out", method="tome", parameters={"r": [4, 0, 0]})
    assert (bundle.manifest.lowering, bundle.manifest.form) == ("static", "single")
    assert [site.form for site in bundle.manifest.sites] == ["merged"]
    assert tpcompile.validate(bundle.path).verdict == "PASSED"
