"""``verify``: vectors are judged as ``validate`` judges, and what is not here as it was is said."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tpcompile
from tpcompile import bundle as bundles
from tpcompile.bundle import VECTORS, Vector

Change = Callable[[Vector], Vector]


@pytest.fixture
def altered(text_bundles: dict[str, Path], tmp_path: Path) -> Callable[[Change | None], Path]:
    """``altered(change)``: a sealed copy whose test vectors are others; ``altered(None)``: one without."""

    def make(change: Change | None) -> Path:
        out = tmp_path / "out"
        shutil.copytree(text_bundles["onnx"], out)
        found = bundles.read(out)
        bundles.write_vectors(out / VECTORS, [change(vector) for vector in found.vectors() if change is not None])
        bundles.seal(out, found.manifest)
        return out

    return make


def flip(vector: Vector, far: float) -> Vector:
    """The token of lowest kept score, recorded as dropped, its score as so far below the highest dropped one."""
    mask, score = vector.kept[0].copy(), vector.scores[0].copy()
    low = int(np.where(mask[0], score[0], np.inf).argmin())
    dropped = np.flatnonzero(~mask[0])
    mask[0, low] = False
    score[0, dropped] = np.minimum(score[0, dropped], score[0, low] - 1e-3)
    score[0, low] -= far
    return replace(vector, kept=(mask, *vector.kept[1:]), scores=(score, *vector.scores[1:]))


def test_a_bundle_as_it_was_exported(text_bundles: dict[str, Path]) -> None:
    found = tpcompile.verify(text_bundles["onnx"])
    assert (found.verdict, found.exit_code, found.changes, found.flipped) == ("PASSED", 0, (), 0)
    assert found.outputs is not None
    assert found.outputs["pooler_output"].required < 1e-5
    (vector, *_) = bundles.read(text_bundles["onnx"]).vectors()
    assert [score.shape for score in vector.scores] == [mask.shape for mask in vector.kept]


def test_a_flip_inside_noise_is_forgiven_and_said(altered: Callable[[Change | None], Path]) -> None:
    found = tpcompile.verify(altered(lambda vector: flip(vector, 3e-8)))
    assert (found.verdict, found.exit_code, found.flipped) == ("INCONCLUSIVE", 10, 1)  # the bundle has one vector
    assert found.reason.endswith("1 of 1 vectors not judged: a token within float noise of its threshold")


def test_nothing_to_replay_is_no_pass(altered: Callable[[Change | None], Path]) -> None:
    found = tpcompile.verify(altered(None))
    assert (found.verdict, found.exit_code, found.vectors) == ("INCONCLUSIVE", 10, 0)


def test_a_flip_outside_noise_fails(altered: Callable[[Change | None], Path]) -> None:
    found = tpcompile.verify(altered(lambda vector: flip(vector, 1e-2)))
    assert (found.verdict, found.exit_code) == ("FAILED", 5)
    assert found.reason.startswith("1 of 1 vectors differ; vector 0: site 0: the engine kept token ")


def test_without_recorded_scores_no_flip_is_forgiven(altered: Callable[[Change | None], Path]) -> None:
    assert tpcompile.verify(altered(lambda vector: replace(flip(vector, 3e-8), scores=()))).exit_code == 5


def test_other_outputs_fail(altered: Callable[[Change | None], Path]) -> None:
    def off(vector: Vector) -> Vector:
        return replace(vector, outputs={name: value + 0.25 for name, value in vector.outputs.items()})

    found = tpcompile.verify(altered(off))
    assert (found.verdict, found.exit_code) == ("FAILED", 5)
    assert "vector 0: pooler_output needs a tolerance of" in found.reason


def test_another_version_and_processor_are_said(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(text_bundles["onnx"], out)
    manifest = bundles.read(out).manifest
    old = {"versions": {"onnxruntime": "1.0"}, "hardware": {"cpu": "a slide rule", "system": "CP/M", "abacus": "no longer known"}}
    bundles.seal(out, manifest.model_copy(update={"environment": old}))
    found = tpcompile.verify(out)
    assert found.verdict == "PASSED"
    assert [change.name for change in found.changes] == ["onnxruntime", "system", "cpu"]
    assert "exported with cpu a slide rule, here " in found.text()
