"""Samples as tensors on disk: what is written is read again, and nothing is unpickled."""

import json

import numpy as np
import pytest

from tpcompile.data.load import load_data
from tpcompile.data.samples import Sample
from tpcompile.data.tensors import save_worst
from tpcompile.errors import InputError, UsageError


def test_what_is_saved_is_data(tmp_path):
    samples = [Sample("one\ntwo", {"x": np.arange(6.0).reshape(1, 3, 2)}, label=4), Sample("", {"x": np.zeros((1, 5, 2))})]
    folder = save_worst(tmp_path / "worst", samples, [{"verdict": "failed"}, {"verdict": "equal"}])
    assert sorted(path.name for path in folder.iterdir()) == [
        "worst-0.safetensors", "worst-0.txt", "worst-1.safetensors", "worst-1.txt", "worst.json",
    ]  # fmt: skip
    read = load_data(folder, tmp_path, 512, names=("x",))
    assert [(row.text, row.label, row.length) for row in read] == [("one\ntwo", 4, 3), ("", None, 5)]
    np.testing.assert_array_equal(read[0].inputs["x"], samples[0].inputs["x"])
    assert len(load_data(folder, tmp_path, 512, 1, names=("x",))) == 1
    with pytest.raises(UsageError, match="exists"):
        save_worst(folder, samples, [])


def test_an_archive_and_what_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((1, 2)))
    assert load_data(tmp_path / "a.npz", tmp_path, 512, names=("x",))[0].length == 2
    with pytest.raises(InputError, match="no tensor 'y'"):
        load_data(tmp_path / "a.npz", tmp_path, 512, names=("x", "y"))
    np.savez(tmp_path / "b.npz", allow_pickle=True, x=np.array([{}], dtype=object))
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    for name in ("b.npz", "c.safetensors", "d.npz"):
        with pytest.raises(InputError):
            load_data(tmp_path / name, tmp_path, 512, names=("x",))


def quarter_float(file):
    head = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1, 2], "data_offsets": [0, 2]}}).encode()
    file.write(len(head).to_bytes(8, "little") + head + bytes(2))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npz", lambda file: np.save(file, np.ones(3)), "holds no tensors"),  # one array, no archive
        ("a.safetensors", quarter_float, "holds no tensors"),  # numpy has no such dtype
        ("a.npz", lambda file: np.savez(file, x=np.ones(4)), r"x is \[4\], not"),
        ("a.npz", lambda file: np.savez(file, x=np.ones((1, 2)), label=np.array([np.nan])), "the label is no class"),
        ("a.npz", lambda file: np.savez(file, x=np.ones((1, 2)), label=np.array([1, 2])), "the label is no class"),
        ("a.npz", lambda file: np.savez_compressed(file, x=np.zeros((1, 2**16))), "unpacks to"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, monkeypatch, name, write, message):
    monkeypatch.setattr("tpcompile.data.tensors.MAX_BYTES", 2**16)
    with (tmp_path / name).open("wb") as file:
        write(file)
    with pytest.raises(InputError, match=message) as caught:
        load_data(tmp_path / name, tmp_path, 512, names=("x",))
    assert caught.value.fix
