"""Files that are written whole or not at all."""

from pathlib import Path

import pytest

from tpcompile.files import replace_file, replacing


def test_a_text_is_written_with_its_folders_and_the_usual_mode(tmp_path: Path) -> None:
    path = replace_file(tmp_path / "a" / "b" / "c.txt", "één\n")
    assert path.read_bytes() == "één\n".encode()
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert replace_file(path, "two").read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["c.txt"]


def test_what_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = replace_file(tmp_path / "c.txt", "one")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"tw")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert path.read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "c") as first, replacing(tmp_path / "c") as second:
        first.write(b"1")
        second.write(b"2")
    assert (tmp_path / "c").read_bytes() == b"1"  # the last to end
