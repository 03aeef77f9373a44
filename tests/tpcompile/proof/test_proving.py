"""``validate`` on whole bundles: what was covered, float64, worst inputs; staged, ragged, bucketed, and gathered by the model itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tpcompile
from tpcompile import bundle as bundles
from tpcompile import models
from tpcompile.build import compile_subject, fill
from tpcompile.engine import open_reference
from tpcompile.errors import UsageError
from tpcompile.plan import Wish
from tpcompile.proof.float64 import Exact, Floor, measure
from tpcompile.subject import subject_of

LTP = {"method": "ltp", "parameters": {"thresholds": [0.0, 0.04, 0.06]}}
TEXTS = ["a quick brown fox jumps", "over the lazy dog", "tokens come and go", "one"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ragged(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny BERT in batches, from one compilation: as it is, in buckets of 8, and in stages."""
    compiled = compile_subject(subject_of(bert_folder, None, None, "ltp", LTP["parameters"], batch="ragged"))  # type: ignore[arg-type]
    found = {}
    for name, wish in (("bucketed", Wish("bucketed", "single", (8,))), ("staged", Wish("dynamic", "staged"))):
        found[name] = tmp_path_factory.mktemp("ragged") / name
        with bundles.stage(found[name]) as folder:
            fill(folder, compiled, "onnx", wish=wish)
    return found


def test_lengths_and_worst_inputs(text_bundles: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    bundle = text_bundles["onnx"]
    parity = tpcompile.validate(bundle, data=texts, atol={"pooler_output": 1e-4}, worst=tmp_path / "worst")
    assert (parity.verdict, parity.tolerances["pooler_output"].atol, parity.tolerance) == ("PASSED", 1e-4, 1e-5)
    assert {record.verdict for record in parity.probes} == {"equal"}
    assert set(parity.coverage.batches) == {"1"}
    assert parity.coverage.lengths[-1] == 64  # longer than any of the texts
    assert not parity.coverage.buckets
    assert all(0 < margin < 1 for margin in parity.margins)
    again = tpcompile.validate(bundle, data=parity.saved, probes=False, float64=0)
    assert (again.verdict, len(again.samples), again.probes, again.floor) == ("PASSED", 5, (), Floor())
    with pytest.raises(UsageError, match="exists"):
        tpcompile.validate(bundle, data=texts, worst=parity.saved)


def test_buckets_and_batch_mixes(ragged: dict[str, Path], texts: Path) -> None:
    parity = tpcompile.validate(ragged["bucketed"], data=texts, batch=4)
    assert parity.verdict == "PASSED"
    assert parity.coverage.batches.keys() == {"1", "2", "3", "4"}
    assert parity.coverage.mixed == 3
    assert len(parity.coverage.buckets) == 2
    for seen, gaps in zip(parity.coverage.buckets, parity.coverage.unseen, strict=True):
        assert sorted({*seen, *gaps}) == list(range(8, 72, 8))
        assert {8, 16} <= set(seen)
    assert "site 0 stored 8, 16" in parity.text()


def test_stages(ragged: dict[str, Path], texts: Path) -> None:
    parity = tpcompile.validate(ragged["staged"], data=texts)
    assert (parity.verdict, {record.verdict for record in parity.probes}) == ("PASSED", {"equal"})
    assert tpcompile.verify(ragged["staged"]).verdict == "PASSED"


def test_a_model_that_gathers_by_itself(tmp_path: Path) -> None:
    """Merged tokens: the reference gathers too; buckets, margins and float64 are of the method's own sites."""
    from tpcompile.models.library import timm

    torch.manual_seed(7)
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
    dense = timm().models.vision_transformer.VisionTransformer(**sizes).eval()
    pruned = models.prune(dense, "tome", r=3)
    bundle = tpcompile.export(pruned, {"pixel_values": torch.randn(1, 3, 16, 16)}, tmp_path / "out")
    parity = tpcompile.validate(bundle.path)
    assert (parity.verdict, parity.exit_code) == ("PASSED", 0), parity.reason
    assert {record.verdict for record in parity.probes} == {"equal"}
    assert parity.floor.outputs["logits"].required < 1e-5
    assert parity.task is not None


def test_a_batch_of_fixed_size(tmp_path: Path) -> None:
    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = x.norm(dim=-1)
            keep = score > 2.0
            return (tpcompile.ops.prune(x, keep, score).tanh() * keep.unsqueeze(-1)).sum(1)

    bundle = tpcompile.export(Pool().eval(), {"x": torch.randn(3, 9, 4)}, tmp_path / "out", batch="ragged")
    parity = tpcompile.validate(bundle.path)
    assert (parity.verdict, len(parity.samples), len(parity.probes)) == ("PASSED", 3, 3), parity.reason
    assert parity.coverage.batches == {"3": 2}
    with pytest.raises(UsageError, match="takes 3 samples"):
        tpcompile.validate(bundle.path, batch=2)


def test_float64_is_near_float32_and_no_nearer(text_bundles: dict[str, Path]) -> None:
    """The same graph with weights in float64 against eager torch in float64: only the order of sums differs."""
    found = bundles.read(text_bundles["onnx"])
    inputs = found.vectors()[0].inputs
    outputs, kept = Exact(found.reference, found.manifest)(inputs)
    assert outputs["pooler_output"].dtype == np.float64
    with open_reference(found) as masked:
        single, told = masked.kept_each(**inputs)
        floor = measure(masked.kept_each, found.reference, found.manifest, [], 4, None)  # type: ignore[arg-type]
    assert floor == Floor()
    gap = np.abs(single["pooler_output"] - outputs["pooler_output"]).max()
    assert 0 < gap < 1e-5
    for mask, right in zip(kept.masks, told[0].masks, strict=True):
        np.testing.assert_array_equal(mask, right)
