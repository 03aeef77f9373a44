"""Methods that gather by themselves, compiled: small models, every runtime, batches, ties, and the sample of which nothing is left."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tpcompile
from tpcompile import models
from tpcompile.backends import backend, runnable
from tpcompile.errors import MarkError, UsageError
from tpcompile.kept import compose
from tpcompile.models.library import timm
from tpcompile.models.methods.predictor import ATTRIBUTE, Predictor
from tpcompile.onnx.emit import OnnxModel, emit
from tpcompile.passes import DEFAULT, Lower
from tpcompile.plan import Wish, settle
from tpcompile.program import Program

TARGETS = runnable()
STAGES = [
    {"block": 0, "iterations": 5, "similar": 0.25, "keep": 0.75},
    {"block": 1, "iterations": 1, "similar": 0.0, "keep": 0.5},
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "etps": ("tps", {"variant": "etps", "prune_loc": [0, 1], "keep_ratio": 0.6}),
    "zero_tprune": ("zero_tprune", {"stages": STAGES}),
    "jmp": ("jmp", {"locations": [0, 1], "keep_rate": 0.6, "tau": 0.2, "choice": "token"}),
    "ltm": ("ltmp", {"merge_thresholds": [0.3, 0.5]}),
    "nothing-left": ("ltmp", {"merge_thresholds": [0.9, 0.9], "prune_thresholds": [1.0, 0.0]}),
}


def vit(**changes: Any) -> nn.Module:
    """A vision transformer of 2 blocks, width 24, 3 heads and 16 patches; its predictors are random."""
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3} | changes
    torch.manual_seed(7)
    model: nn.Module = timm().models.vision_transformer.VisionTransformer(**sizes)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    model.add_module(ATTRIBUTE, nn.ModuleList(Predictor(24) for _ in range(2)))
    return model.eval()


def images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def run(model: OnnxModel, target: str, folder: Path, batches: list[torch.Tensor]) -> list[dict[str, np.ndarray]]:
    """Build an engine and run it, taps and all."""
    model.save(folder / "model.onnx")
    (folder / target).mkdir()
    backend(target).build(folder / "model.onnx", folder / target, "fp32")
    with backend(target).open(folder / target, taps=model.taps, threads=1, precision="fp32") as session:
        return [session.run({"pixel_values": pixels.numpy()}) for pixels in batches]


def same(program: Program, values: dict[str, np.ndarray], pixels: torch.Tensor) -> None:
    """Outputs within float32 noise, kept tokens and groups equal, sample by sample."""
    trace = program.trace(pixel_values=pixels)
    expected = trace.outputs["logits"].numpy()
    np.testing.assert_allclose(values["logits"], expected, rtol=0, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
    length = values["site0.keep"].shape[1]
    for b in range(pixels.shape[0]):
        got = compose({n: v[b : b + 1] for n, v in values.items() if n != "logits"}, len(program.sites), length)
        right = compose({n: v[b : b + 1].numpy() for n, v in trace.taps.items()}, len(program.sites), length)
        np.testing.assert_array_equal(got.masks, right.masks)
        np.testing.assert_array_equal(got.groups, right.groups)
        assert got.counts == right.counts


@pytest.mark.parametrize("case", CASES)
def test_engines_equal_eager(case: str, tmp_path: Path) -> None:
    method, parameters = CASES[case]
    model, pixels = models.prune(vit(), method, **parameters), images()
    program = tpcompile.lower(model, {"pixel_values": pixels})
    written = emit(program)
    for target in TARGETS:
        values = run(written, target, tmp_path, [pixels])[0]
        same(program, values, pixels)
        np.testing.assert_allclose(values["logits"], model(pixels)["logits"].detach().numpy(), rtol=0, atol=1e-5)
        assert case != "nothing-left" or values["site0.keep"].sum() == 1


@pytest.mark.parametrize("case", ["evit", "ltmp"])
def test_batches(case: str, tmp_path: Path) -> None:
    """A fixed count makes rectangles; where counts differ, rows stored though dead are hidden. Every sample is computed as it is alone."""
    evit = {"base_keep_rate": 0.5, "drop_loc": [0, 1]}
    ltmp = {"merge_thresholds": [0.8, 0.8], "prune_thresholds": [0.06, 0.06]}
    model = models.prune(vit(), case, **(evit if case == "evit" else ltmp))
    dynamic = {"pixel_values": {0: "batch"}}
    program = tpcompile.lower(model, {"pixel_values": images(2)}, dynamic=dynamic, batch="ragged")
    many = images(4)
    for pixels, values in zip([many, many[:1]], run(emit(program), "onnx", tmp_path, [many, many[:1]]), strict=True):
        same(program, values, pixels)
    alone = torch.cat([model(pixels)["logits"] for pixels in many.split(1)]).detach().numpy()
    np.testing.assert_allclose(program(pixel_values=many)["logits"].numpy(), alone, rtol=0, atol=1e-5)
    if case == "ltmp":
        counts = program.trace(pixel_values=many).keep[-1].sum(dim=1)
        assert len(set(counts.tolist())) > 1


def test_ties_are_taken_in_order(tmp_path: Path) -> None:
    """All patches alike: equal scores, and every runtime keeps the first of them."""
    dense = vit()
    nn.init.zeros_(dense.pos_embed)  # type: ignore[arg-type]  # a parameter
    pixels = torch.ones(1, 3, 16, 16)
    program = tpcompile.lower(
        models.prune(dense, "evit", base_keep_rate=0.5, drop_loc=[0], fuse_token=False), {"pixel_values": pixels}
    )
    written = emit(program)
    for target in TARGETS:
        values = run(written, target, tmp_path, [pixels])[0]
        assert values["site0.index"].tolist() == [list(range(9))]
        same(program, values, pixels)


def test_bundle(tmp_path: Path) -> None:
    """The whole way: the bundle brings reference and dense model, and `validate` and `load` know its sites."""
    model = models.prune(vit(), "tome", r=3)
    bundle = tpcompile.export(model, {"pixel_values": images()}, tmp_path / "out")
    assert (bundle.manifest.lowering, bundle.manifest.form) == ("static", "single")
    assert [site.form for site in bundle.manifest.sites] == ["merged"] * 2
    assert tpcompile.validate(bundle.path).verdict == "PASSED"
    with tpcompile.load(bundle.path) as engine:
        outputs, kept = engine.kept(pixel_values=images().numpy())
    np.testing.assert_allclose(outputs["logits"], model(images())["logits"].detach().numpy(), rtol=0, atol=1e-5)
    assert kept.counts == (14, 11)
    assert [len(set(groups.tolist())) for groups in kept.groups] == [14, 11]


def test_what_a_fixed_count_cannot_be_given() -> None:
    program = tpcompile.lower(models.prune(vit(), "tome", r=3), {"pixel_values": images()})
    with pytest.raises(UsageError, match="lowering bucketed has no place: the model gathers constant counts by itself"):
        settle(Wish(buckets=(8,)), "onnx", program, lambda: ("", []))
    with pytest.raises(UsageError, match="one graph"):
        settle(Wish(form="staged"), "onnx", program, lambda: ("", []))
    with pytest.raises(UsageError, match="nothing to lower"):
        Lower(buckets="8")(program)


class _Own(nn.Module):
    """A stranger's model that gathers, and may mask too."""

    def __init__(self, both: bool = False, wrong: bool = False) -> None:
        super().__init__()
        self.linear, self.both, self.wrong = nn.Linear(4, 4), both, wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = x.sum(dim=2).topk(3, dim=1).indices
        rows = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        rows = tpcompile.ops.gathered(rows, x, index.int() if self.wrong else index)
        if self.both:
            rows = tpcompile.ops.prune(rows, rows.sum(dim=2) > 0)
        y: torch.Tensor = self.linear(rows).sum(dim=1)
        return y


def test_a_strangers_model_passes_through() -> None:
    x = torch.randn(1, 7, 4)
    model = _Own().eval()
    program = tpcompile.lower(model, {"x": x})
    assert program.trace(x=x).keep[0].sum() == 3
    torch.testing.assert_close(program(x=x)[program.output_names[0]], model(x).detach())
    with pytest.raises(UsageError, match="has no dense form in it"):
        tpcompile.export(model, {"x": x}, "unused")


def test_refusals_of_a_mark() -> None:
    x = torch.randn(1, 7, 4)
    with pytest.raises(MarkError, match="gathers by itself at one site, and masks at another"):
        tpcompile.lower(_Own(both=True).eval(), {"x": x})
    with pytest.raises(MarkError, match="an int64 index"):
        tpcompile.lower(_Own(wrong=True).eval(), {"x": x})
    with pytest.raises(MarkError, match="the batch policy is one"):
        DEFAULT(tpcompile.capture.capture(_Own().eval(), {"x": torch.randn(2, 7, 4)}))
