"""Inputs padded to a ladder of lengths, and shapes that are met when an engine is loaded: neither changes a number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpcompile import api, bundle
from tpcompile.errors import UsageError
from tpcompile.kept import Kept
from tpcompile.lengths import cuts, lengthen, shorten, unpadded
from tpcompile.manifest import Manifest, TensorInfo

SPEC = tuple(TensorInfo(name=name, dtype="int64", shape=(1, "seq")) for name in ("ids", "mask"))
PER_TOKEN = TensorInfo(name="states", dtype="float32", shape=(1, "seq", 4))


def manifest(**fields: object) -> Manifest:
    plain = {"target": "onnx", "role": "pruned", "model": {"id": "", "family": "", "architecture": "", "sha256": ""}}
    return Manifest.model_validate(
        {**plain, "inputs": SPEC, "outputs": (PER_TOKEN,), "dims": {"seq": (2, 20)}, "padding": "mask", "lengths": (8,), **fields}
    )


def arrays(length: int) -> dict[str, np.ndarray]:
    return {name: np.ones((1, length), dtype=np.int64) for name in ("ids", "mask")}


@pytest.mark.parametrize(("given", "runs"), [(3, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_inputs_run_at_the_next_length_that_the_engine_takes(given: int, runs: int) -> None:
    padded = lengthen(arrays(given), manifest())
    assert {value.shape for value in padded.values()} == {(1, runs)}
    assert int(padded["mask"].sum()) == given
    outputs = shorten({"states": np.zeros((1, runs, 4)), "logits": np.zeros((1, 2))}, manifest(), given)
    assert (outputs["states"].shape, outputs["logits"].shape) == ((1, given, 4), (1, 2))


def test_without_a_ladder_or_with_a_mask_of_another_kind_they_run_as_they_are() -> None:
    assert lengthen(arrays(3), manifest(lengths=()))["ids"].shape == (1, 3)
    odd = arrays(3)
    odd["mask"][0, 0] = 0
    assert lengthen(odd, manifest())["ids"].shape == (1, 3)


def test_what_is_kept_is_told_of_the_tokens_alone() -> None:
    kept = Kept((np.array([True, False, True, False]),), (2,), (np.arange(4.0),))
    assert [mask.tolist() for mask in unpadded(kept, 3).masks] == [[True, False, True]]
    assert unpadded(kept, 0) is kept


@pytest.fixture(scope="module")
def exported(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lengths") / "out"
    seen = [{"input_ids": np.full((1, n), 7), "attention_mask": np.ones((1, n), dtype=np.int64)} for n in (5, 6, 12)]
    api.export(
        bert_folder, out=out, method="ltp", parameters={"thresholds": [0.0, 0.04, 0.06]}, lengths=(8,), buckets=(8,), prime=True,
        calibrate=seen,
    )  # fmt: skip
    return out


def test_a_bundle_that_pads_is_exact(exported: Path) -> None:
    found = bundle.read(exported)
    assert (found.manifest.lengths, found.manifest.padding, found.manifest.primed) == ((8,), "attention_mask", 2)
    assert any(text.startswith("padding: ") for text in found.manifest.assumptions)
    assert found.dense is not None
    assert (found.dense.manifest.lengths, found.dense.manifest.primed) == ((), 0)
    parity = api.validate(exported, samples=12)
    assert parity.verdict == "PASSED", parity.text()


def test_what_is_run_at_load_shows_the_sizes_to_come(exported: Path) -> None:
    assert [inputs["input_ids"].shape[1] for inputs in bundle.read(exported).primers()] == [5, 12]


def test_one_input_is_cut_to_every_size_that_is_swept() -> None:
    swept = manifest(swept=[9, 8, 2], primed=1, lengths=())
    assert [cut["mask"].shape for cut in cuts(arrays(9), swept)] == [(1, 9), (1, 8), (1, 2)]
    assert [cut["ids"].shape for cut in cuts(arrays(5), swept)] == [(1, 5), (1, 5), (1, 2)], "it is not made longer"
    (alone,) = cuts(arrays(9), manifest())
    assert alone["ids"].shape == (1, 9)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"swept": [0]}, "greater"),
        ({"swept": [*range(1, 258)]}, "256"),
        ({"swept": [2], "primed": 2}, "one input is cut to sizes, along one dim"),
        ({"swept": [2], "dims": {}}, "one input is cut to sizes, along one dim"),
        ({"swept": [2], "dims": {"seq": (2, 20), "batch": (1, 4)}}, "one input is cut to sizes, along one dim"),
    ],
)
def test_one_input_is_swept_over_the_one_dim_of_the_engine_and_few_sizes(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        manifest(**{"primed": 1, **fields})


def test_lengths_are_refused_where_padding_is_not_proved(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the padded length is used as a number"):
        api.export(
            bert_folder, out=tmp_path / "out", method="ltp", lengths=(8,),
            parameters={"thresholds": [0.0, 0.04, 0.06], "n_ref": "padded"},
        )  # fmt: skip
    with pytest.raises(UsageError, match="lengths: 1 is no rising list of sizes from 2"):
        api.export(bert_folder, out=tmp_path / "out", method="ltp", lengths=(1,))
