"""Outputs with a row per token come back at full length, through every engine, with the method's fill."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import models
from tpcompile.backends import runnable
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.bundle import read, stage
from tpcompile.compat import ensure_torchvision
from tpcompile.engine import open_reference
from tpcompile.models.library import transformers
from tpcompile.subject import subject_of

TARGETS = runnable()


def spread(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is uneven."""
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def text(head: str) -> nn.Module:
    transformers()
    bert = importlib.import_module("transformers.models.bert.modeling_bert")
    config = bert.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=48, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(3)
    return spread(getattr(bert, head)(config))


def image() -> nn.Module:
    """16 patches and a CLS token; features without pooling, for dense prediction."""
    ensure_torchvision()
    vit = importlib.import_module("timm.models.vision_transformer")
    torch.manual_seed(3)
    return spread(
        vit.VisionTransformer(
            img_size=16, patch_size=4, in_chans=1, num_classes=0, global_pool="", embed_dim=24, depth=3, num_heads=3
        )
    )


def words(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, length - row :] = 0
    return {"input_ids": torch.randint(5, 60, (batch, length), generator=generator), "attention_mask": mask}


def pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(batch * 100 + length))}


CASES = {
    "tokens": (lambda: text("BertForTokenClassification"), words, {"thresholds": [0.03, 0.06, 0.09]}),
    "answers": (lambda: text("BertForQuestionAnswering"), words, {"thresholds": [0.03, 0.0, 0.09], "fill": "zero"}),
    "patches": (image, pixels, {"thresholds": [0.05, 0.06, 0.07], "protect": "prefix"}),
}


BUILT = [("tokens", "one"), ("tokens", "ragged"), ("answers", "one"), ("patches", "ragged")]
"""Every case, and both policies."""


@pytest.fixture(scope="module", params=BUILT, ids="-".join)
def compiled(request: pytest.FixtureRequest) -> tuple[Compiled, str]:
    case, policy = request.param
    build, feeds, parameters = CASES[case]
    pruned = models.prune(build(), "ltp", **parameters)
    inputs = feeds(1 if policy == "one" else 2, 11)
    dims = {0: "batch"} if policy == "ragged" else {}
    dynamic = {name: {**dims, **({1: "seq"} if case != "patches" else {})} for name in inputs}
    return compile_subject(subject_of(pruned, inputs, dynamic, None, None, batch=policy)), case


@pytest.mark.parametrize("target", TARGETS)
def test_full_length_again(compiled: tuple[Compiled, str], target: str, tmp_path: Path) -> None:
    built, case = compiled
    with stage(tmp_path / "out") as folder:
        fill(folder, built, target)
    found, model, dropped = read(tmp_path / "out"), built.subject.model, 0
    assert isinstance(model, models.Pruned)
    assert len(found.manifest.along) == (0 if case == "patches" else len(found.manifest.outputs))  # 17 is a number, not a dim
    with tpcompile.load(found.path) as engine, open_reference(found) as reference:
        for batch, length in [(1, 2), (1, 11), *([(2, 23), (5, 14)] if built.subject.batch == "ragged" else [(1, 30)])]:
            inputs = CASES[case][1](batch, length)
            outputs, kept = engine.kept_each(**{name: value.numpy() for name, value in inputs.items()})
            masked, _ = reference.kept_each(**{name: value.numpy() for name, value in inputs.items()})
            with torch.no_grad():
                eager, gathered = model(**inputs), built.compact(**inputs)
            for name, value in eager.items():
                assert outputs[name].shape == value.shape
                law(gathered[name].numpy(), value.numpy())
                law(outputs[name], masked[name])
            dropped += sum(len(one.masks[-1]) - one.counts[-1] for one in kept)
    assert dropped > 10


def law(got: np.ndarray, expected: np.ndarray) -> None:
    """``|gathered - masked| <= 1e-5 * max(1, max|masked|)``."""
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))


@torch.no_grad()
def test_hidden_states_of_every_layer_are_outputs_by_number(tmp_path: Path) -> None:
    """As the library returns them: a tuple in its output, whose last is ``last_hidden_state`` once more."""
    model = text("BertModel")
    model.config.output_hidden_states = True
    ids = torch.arange(5, 19).unsqueeze(0)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    masked = tpcompile.impose(model, given, dynamic={name: {1: "seq"} for name in given}, threshold=0.9)
    bundle = tpcompile.export(masked, out=tmp_path / "out", dims={"seq": (2, 14, 48)})
    with tpcompile.load(bundle.path) as engine:
        found = engine(**{name: value.numpy()[:, :11] for name, value in given.items()})
    want = masked(**{name: value[:, :11] for name, value in given.items()})
    assert list(found) == ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(4))]
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-5)
    assert not np.allclose(found["hidden_states.2"], model(**{n: v[:, :11] for n, v in given.items()}).hidden_states[2].numpy())
    assert tpcompile.validate(bundle.path).verdict == "PASSED"
