"""Data to calibrate or fit on: what is read for which model, and what is refused before anything runs on it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tpcompile
from tpcompile.calibration import ARRAYS, calibration
from tpcompile.errors import InputError, UsageError
from tpcompile.inputs import Takes
from tpcompile.models.sources import DIGITS
from tpcompile.subject import Subject, subject_of


@pytest.fixture(scope="module")
def text(bert_folder: Path) -> Subject:
    return subject_of(bert_folder, None, None, "ltp", {"thresholds": [0.0, 0.04, 0.06]})


@pytest.fixture(scope="module")
def plain() -> Subject:
    """A module of the caller's own, without tokenizer or preprocessing."""
    return subject_of(nn.Linear(4, 4).eval(), {"input": torch.ones(1, 5, 4)}, {"input": {1: "n"}}, None, None)


def seq(subject: Subject, least: int, most: int) -> Takes:
    return replace(subject.takes, dims={**subject.takes.dims, "seq": (least, most)})


def arrays(length: int, token: float = 7, kind: str = "int64") -> dict[str, np.ndarray]:
    return {"input_ids": np.full((1, length), token, kind), "attention_mask": np.ones((1, length), np.int64)}


@pytest.mark.parametrize("given", [[], "short.txt"])
def test_nothing_to_calibrate_on_is_refused(text: Subject, given: str | list[dict[str, np.ndarray]], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two words\n", encoding="utf-8")
    for asset in text.assets:
        (tmp_path / asset.name).write_bytes(asset.read_bytes())
    with pytest.raises(UsageError) as caught:
        calibration(
            tmp_path, text, tmp_path / given if isinstance(given, str) else given, seq(text, 15, 20), "tuning times real inputs"
        )
    name = tmp_path / given if isinstance(given, str) else "the caller"
    assert str(caught.value) == f"{name} gives no sample of 15 tokens or more\n  fix     {ARRAYS}"


def test_tensors_are_read_for_any_model(plain: Subject, tmp_path: Path) -> None:
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", input=np.ones((1, 3 + number, 4), np.float32))
    for given, lengths in ((tmp_path, [3, 4]), (str(tmp_path / "1.npz"), [4])):
        name, rows = calibration(tmp_path, plain, given, plain.takes, "tuning times real inputs")
        assert (name, [row.length for row in rows]) == (str(given), lengths)


def test_texts_are_refused_for_a_model_without_a_tokenizer_with_the_way_out_of_who_asked(plain: Subject, tmp_path: Path) -> None:
    for given, message in (
        ("docstrings", "docstrings cannot be read: this model has no tokenizer and no preprocessing"),
        (None, "tuning times real inputs, and none comes with this model"),
    ):
        with pytest.raises(UsageError) as caught:
            calibration(tmp_path, plain, given, plain.takes, "tuning times real inputs", "say so elsewhere")
        assert str(caught.value) == f"{message}\n  fix     say so elsewhere"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (arrays(5, kind="float64"), "input_ids is float64, not int64"),
        (arrays(5, token=10**6), "input_ids holds values from 1000000 to 1000000; the engine takes 0 to "),
        (arrays(5, token=-1), "input_ids holds values from -1 to -1; the engine takes 0 to "),
        (arrays(40), "input_ids has seq = 40; the engine takes 20 at most"),
        ({"input_ids": arrays(5)["input_ids"]}, "missing input: attention_mask"),
        ({**arrays(5), "attention_mask": np.ones((1, 6), np.int64)}, "attention_mask has seq = 6, another input 5"),
    ],
    ids=["dtype", "vocabulary", "negative", "length", "missing", "two lengths"],
)
def test_what_no_engine_could_run_is_refused_before_torch_runs_it(
    text: Subject, row: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        calibration(tmp_path, text, [arrays(5), row], seq(text, 2, 20), "tuning times real inputs")
    assert str(caught.value).startswith(message)


def test_a_sample_comes_alone_whatever_the_batches_will_be(bert_folder: Path, tmp_path: Path) -> None:
    subject = subject_of(bert_folder, None, None, "ltp", {"thresholds": [0.0, 0.04, 0.06]}, batch="ragged")
    takes = replace(subject.takes, dims={**subject.takes.dims, "batch": (4, 8)})
    _, rows = calibration(tmp_path, subject, [arrays(5)], takes, "priming runs real inputs")
    assert [row.length for row in rows] == [5]
    with pytest.raises(InputError, match="input_ids has batch = 1; the engine takes 4 or more"):
        takes.check(rows[0].inputs)


def test_images_of_another_dtype_are_refused_where_a_ratio_is_fitted() -> None:
    with pytest.raises(InputError, match="pixel_values is float64, not float32"):
        tpcompile.fit(
            DIGITS,
            1.5,
            [{"pixel_values": np.ones((1, 1, 8, 8))}],
            method="evit",
            parameters={"base_keep_rate": 0.7, "drop_loc": [1]},
        )


def test_a_tensor_with_a_gradient_is_refused(plain: Subject, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input is not an array: .*grad") as caught:
        calibration(tmp_path, plain, [{"input": torch.ones(1, 5, 4, requires_grad=True)}], plain.takes, "it needs data")
    assert str(caught.value).endswith("pass a numpy array, of a tensor tensor.detach().cpu().numpy()")
