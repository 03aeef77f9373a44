"""Samples for any program: of several lengths, the same every time, inside what the program takes."""

from pathlib import Path

import numpy as np
import pytest

from tpcompile.data.probes import Wants, apart, gather, groups, made
from tpcompile.data.samples import collate
from tpcompile.errors import InputError
from tpcompile.spec import TensorSpec

IDS, MASK = TensorSpec("input_ids", "int64", (1, "seq")), TensorSpec("attention_mask", "int64", (1, "seq"))
TEXT = Wants((IDS, MASK), {"seq": (2, 40)}, {"input_ids": (5, 9), "attention_mask": (0, 1)})


def test_lengths_go_from_short_to_the_longest() -> None:
    rows = made(TEXT, 6)
    lengths = [row.length for row in rows]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 6
    assert lengths[-1] == 40
    for row in rows:
        assert {value.shape for value in row.inputs.values()} == {(1, row.length)}
        assert 5 <= row.inputs["input_ids"].min() <= row.inputs["input_ids"].max() <= 9
        assert row.inputs["attention_mask"][0, 0] == 1
    assert any(row.inputs["attention_mask"].min() == 0 for row in rows)


def test_the_same_every_time() -> None:
    for a, b in zip(made(TEXT, 3), made(TEXT, 3), strict=True):
        assert all(np.array_equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


def test_the_first_dim_is_one_sample() -> None:
    wants = Wants([TensorSpec("x", "float32", ("batch", "n", 4))], {"batch": (1, 512), "n": (3, 9)})
    assert [row.inputs["x"].shape for row in made(wants, 3)] == [(1, 4, 4), (1, 6, 4), (1, 9, 4)]


def test_values_follow_the_examples() -> None:
    example = {"x": np.full((1, 5, 4), 100, dtype=np.float32), "t": np.array([[3, 8]])}
    wants = Wants([TensorSpec("x", "float32", (1, 5, 4)), TensorSpec("t", "int64", (1, 2))], {}, examples=[example])
    (row,) = made(wants, 1)
    assert abs(row.inputs["x"].mean() - 100) < 2
    assert 3 <= row.inputs["t"].min() <= row.inputs["t"].max() <= 8
    assert gather(wants, 3)[0].text == "example"


def test_a_bool_mask_keeps_the_first() -> None:
    wants = Wants([TensorSpec("keep", "bool", (1, "n"))], {"n": (2, 30)})
    values = [row.inputs["keep"] for row in made(wants, 4)]
    assert all(value[0, 0] for value in values)
    assert not all(value.all() for value in values)


def test_real_texts_where_there_is_a_tokenizer(bert_folder: Path) -> None:
    wants = Wants((IDS, MASK), {"seq": (2, 300)}, folder=bert_folder)
    rows = gather(wants, 5)
    assert len({row.length for row in rows}) == 5
    assert {row.text for row in rows}.isdisjoint({"made up", "example"})
    short = Wants((IDS, MASK), {"seq": (2, 20)}, {"input_ids": (0, 9)}, folder=bert_folder)  # no docstring is that short
    assert {row.text for row in gather(short, 3)} == {"made up"}


def test_the_callers_data_is_all_there_is(bert_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abc\nde", encoding="utf-8")
    wants = Wants((IDS, MASK), {"seq": (2, 40)}, folder=bert_folder)
    assert [row.text for row in gather(wants, 5, tmp_path / "t.txt")] == ["de", "abc"]
    with pytest.raises(InputError):
        gather(Wants((IDS, MASK), {"seq": (2, 4)}, folder=bert_folder), 5, tmp_path / "t.txt")


def test_batches_hold_what_fits_together() -> None:
    rows = made(TEXT, 5)
    assert list(groups(rows, 2)) == [[0, 1], [2, 3], [4]]
    assert collate(rows[:2])["input_ids"].shape == (2, rows[1].length)
    floats = made(Wants([TensorSpec("x", "float32", (1, "n", 4))], {"n": (2, 30)}), 3)
    assert list(groups(floats, 2)) == [[0], [1], [2]]


def test_an_example_apart() -> None:
    example = {"x": np.arange(4).reshape(2, 2)}
    assert [one["x"].tolist() for one in apart(example, True)] == [[[0, 1]], [[2, 3]]]
    assert [one["x"].tolist() for one in apart(example, False)] == [[[0, 1], [2, 3]]]
