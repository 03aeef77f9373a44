"""Zoo x backend: a library model, pruned by its masks, becomes a bundle that equals it."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tpcompile
from tpcompile import models, ops
from tpcompile.backends import runnable
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.bundle import read, stage
from tpcompile.engine import open_reference
from tpcompile.errors import UnmaskedFold
from tpcompile.models.families.bert import ARCHITECTURES
from tpcompile.models.library import transformers
from tpcompile.subject import subject_of

DYNAMIC = {name: {1: "seq"} for name in ("input_ids", "attention_mask")}
TARGETS = runnable()


def tiny(name: str, head: bool) -> nn.Module:
    """A small random library model whose weights are large enough that attention is uneven."""
    transformers()
    row = next(row for row in ARCHITECTURES if row.name == name)
    model_class = getattr(importlib.import_module(row.home), row.classifier if head else row.encoder)
    sizes = {"vocab_size": 60, "max_position_embeddings": 48, "num_labels": 3}
    sizes |= {"dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 3} if name == "distilbert" else {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
    }  # fmt: skip
    torch.manual_seed(7)
    model: nn.Module = model_class(model_class.config_class(**sizes))
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.endswith("LayerNorm.weight"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def feeds(length: int, pads: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 60, (1, length), generator=generator)
    mask = torch.ones_like(ids)
    if pads:
        ids[:, -pads:], mask[:, -pads:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(
    scope="module", params=[("bert", True), ("bert", False), ("roberta", True), ("distilbert", True), ("electra", True)], ids=str
)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """One compilation serves every target."""
    model = tiny(*request.param)
    dense = model if request.param[1] else models.SentenceEncoder(model, "mean", True)
    pruned = models.prune(dense, "ltp", thresholds=[0.03, 0.06, 0.09])
    return compile_subject(subject_of(pruned, feeds(11), DYNAMIC, None, None))


@pytest.mark.parametrize("target", TARGETS)
def test_family(compiled: Compiled, target: str, tmp_path: Path) -> None:
    with stage(tmp_path / "out") as folder:
        fill(folder, compiled, target)
    pruned, dropped = compiled.subject.model, 0
    assert isinstance(pruned, models.Pruned)
    with tpcompile.load(tmp_path / "out") as engine, open_reference(read(tmp_path / "out")) as reference:
        for length, pads in [(2, 0), (3, 1), (11, 0), (23, 7), (40, 0)]:
            inputs = feeds(length, pads)
            arrays = {k: v.numpy() for k, v in inputs.items()}
            gathered, trace = compiled.compact(**inputs), pruned.trace(**inputs)
            outputs, kept = engine.kept(**arrays)
            masked, _ = reference.kept_each(**arrays)
            for site, mask in zip(trace.kept, kept.masks, strict=True):
                np.testing.assert_array_equal(site[0].numpy(), mask)
            for key, value in trace.outputs.items():
                law(gathered[key].numpy(), value.numpy())  # in one runtime each: erf and exp differ between runtimes by more
                law(outputs[key], masked[key])
            dropped += length - kept.counts[-1]
    assert dropped > 20  # else nothing was tested


def law(got: np.ndarray, expected: np.ndarray) -> None:
    """``|gathered - masked| <= 1e-5 * max(1, max|masked|)``."""
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("target", TARGETS)
def test_everything_falls(target: str, tmp_path: Path) -> None:
    """Thresholds no token meets: one dead row is stored, and the engine still equals the masked model."""
    pruned = models.prune(tiny("bert", head=True), "ltp", thresholds=[0.9, 0.9, 0.9])
    tpcompile.export(pruned, feeds(11), tmp_path / "out", target=target, dynamic=DYNAMIC)
    with tpcompile.load(tmp_path / "out") as engine:
        inputs = feeds(17)
        outputs, kept = engine.kept(**{k: v.numpy() for k, v in inputs.items()})
        assert kept.counts == (0, 0, 0)
        assert kept.stored == (1, 1, 1)
        law(outputs["logits"], pruned(**inputs)["logits"].detach().numpy())


def test_bundle_is_reproducible_and_whole(short_bert_folder: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"target": "onnx", "method": "ltp", "parameters": {"thresholds": [0.05]}}
    first = tpcompile.export(short_bert_folder, out=tmp_path / "a", **arguments)
    second = tpcompile.export(short_bert_folder, out=tmp_path / "b", **arguments)
    assert first.identity == second.identity
    assert first.manifest.files == second.manifest.files
    names = {p.relative_to(first.path).as_posix() for p in first.path.rglob("*") if p.is_file()}
    assert {
        "tpcompile.json",
        "model.onnx",
        "tokenizer.json",
        "dense/tpcompile.json",
        "dense/model.onnx",
        "reference/model.onnx",
    } <= names
    assert json.loads((first.path / "tpcompile.json").read_text())["dims"] == {"seq": [2, 64]}
    parity = tpcompile.validate(first.path, samples=5)
    assert parity.verdict == "PASSED", parity.reason
    assert parity.flipped == 0


class MeanOverAll(nn.Module):
    """Prunes, then averages over all tokens: the masked model reads the dropped ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.norm(dim=-1)
        x = ops.prune(self.lin(x), score > 2.5, score)
        return x.mean(1)


def test_a_model_that_reads_dropped_tokens_is_refused() -> None:
    with pytest.raises(UnmaskedFold) as caught:
        tpcompile.lower(MeanOverAll().eval(), {"x": torch.randn(1, 9, 8)}, dynamic={"x": {1: "seq"}})
    text = re.sub(r"%\w+", "%n", str(caught.value))
    line = next(
        i for i, row in enumerate(Path(__file__).read_text().splitlines(), 1) if "return x.mean(1)" in row and "if" not in row
    )
    assert caught.value.where is not None
    assert (Path(caught.value.where.file).name, caught.value.where.line) == ("test_journey.py", line)
    assert "aten.sum.dim_IntList combines over tokens that site0" in text
    assert "x.mean(1)" in text
    assert "multiply by the keep mask before a sum" in text
    assert caught.value.exit_code == 4
