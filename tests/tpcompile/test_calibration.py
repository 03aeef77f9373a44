"""Data to calibrate or fit on: what is read for which model, and what is refused before anything runs on it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tpcompile.calibration import ARRAYS, calibration
from tpcompile.errors import UsageError
from tpcompile.subject import Subject, subject_of


@pytest.fixture(scope="module")
def text(bert_folder: Path) -> Subject:
    return subject_of(bert_folder, None, None, "ltp", {"thresholds": [0.0, 0.04, 0.06]})


@pytest.fixture(scope="module")
def plain() -> Subject:
    """A module of the caller's own, without tokenizer or preprocessing."""
    return subject_of(nn.Linear(4, 4).eval(), {"input": torch.ones(1, 5, 4)}, {"input": {1: "n"}}, None, None)


@pytest.mark.parametrize("given", [[], "short.txt"])
def test_nothing_to_calibrate_on_is_refused(text: Subject, given: str | list[dict[str, np.ndarray]], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two words\n", encoding="utf-8")
    for asset in text.assets:
        (tmp_path / asset.name).write_bytes(asset.read_bytes())
    with pytest.raises(UsageError) as caught:
        calibration(tmp_path, text, tmp_path / given if isinstance(given, str) else given, (15, 20), "tuning times real inputs")
    name = tmp_path / given if isinstance(given, str) else "the caller"
    assert str(caught.value) == f"{name} gives no sample of 15 tokens or more\n  fix     {ARRAYS}"


def test_tensors_are_read_for_any_model(plain: Subject, tmp_path: Path) -> None:
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", input=np.ones((1, 3 + number, 4), np.float32))
    for given, lengths in ((tmp_path, [3, 4]), (str(tmp_path / "1.npz"), [4])):
        name, rows = calibration(tmp_path, plain, given, None, "tuning times real inputs")
        assert (name, [row.length for row in rows]) == (str(given), lengths)


def test_texts_are_refused_for_a_model_without_a_tokenizer_with_the_way_out_of_who_asked(plain: Subject, tmp_path: Path) -> None:
    for given, message in (
        ("docstrings", "docstrings cannot be read: this model has no tokenizer and no preprocessing"),
        (None, "tuning times real inputs, and none comes with this model"),
    ):
        with pytest.raises(UsageError) as caught:
            calibration(tmp_path, plain, given, None, "tuning times real inputs", "say so elsewhere")
        assert str(caught.value) == f"{message}\n  fix     say so elsewhere"
