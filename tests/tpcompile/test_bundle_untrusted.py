"""Bundles: untrusted when read."""

import json
import shutil
from pathlib import Path

import pytest
from bundle_parts import SHA, manifest

from tpcompile import bundle as storage
from tpcompile.bundle import MANIFEST, VECTORS, read, seal, stage, write_vectors
from tpcompile.errors import EnvironmentFault, IntegrityError, UsageError


def edit(made: Path, **changes: object) -> None:
    document = json.loads((made / MANIFEST).read_text())
    (made / MANIFEST).write_text(json.dumps(document | changes))


def refused(made: Path, match: str) -> IntegrityError:
    with pytest.raises(IntegrityError, match=match) as caught:
        read(made).verify()
    assert caught.value.exit_code == 9
    assert caught.value.fix
    return caught.value


def test_a_changed_byte(made: Path) -> None:
    (made / "model.onnx").write_bytes(b"pruned weightz")
    refused(made, "model.onnx was changed")


def test_a_truncated_file(made: Path) -> None:
    (made / "model.onnx").write_bytes(b"pruned")
    refused(made, "has 6 bytes, not 14")


def test_a_missing_file(made: Path) -> None:
    (made / "model.onnx").unlink()
    refused(made, "model.onnx is missing")


def test_an_unlisted_file(made: Path) -> None:
    (made / "extra.bin").write_bytes(b"?")
    refused(made, "extra.bin is not in the manifest")


def test_reports_and_hidden_files_are_free(made: Path) -> None:
    (made / "reports" / "bench.json").write_text("{}")
    (made / ".DS_Store").write_bytes(b"?")
    read(made).verify()


def test_primers_that_nobody_listed(made: Path) -> None:
    edit(made, primed=2)
    with pytest.raises(IntegrityError, match=r"prime\.safetensors is not in the manifest"):
        read(made).primers()


def test_a_changed_dense_part(made: Path) -> None:
    (made / "dense" / "model.onnx").write_bytes(b"dense weightz")
    refused(made, "model.onnx was changed")


def test_a_swapped_dense_part(made: Path) -> None:
    shutil.rmtree(made / "dense")
    (made / "dense").mkdir()
    (made / "dense" / "model.onnx").write_bytes(b"another")
    seal(made / "dense", manifest(role="dense"))
    refused(made, "is not the one")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a\\..\\b", "C:/x", "", ".", "a//b", "./a"])
def test_path_escape(made: Path, name: str) -> None:
    edit(made, files={name: {"sha256": SHA, "size": 1}})
    refused(made, "not a path inside")
    edit(made, files={}, parts={name: SHA})
    refused(made, "not a path inside")


def test_a_symlink_out_of_the_bundle(made: Path) -> None:
    outside = made.parent / "model.onnx"
    (made / "model.onnx").rename(outside)
    (made / "model.onnx").symlink_to(outside)
    refused(made, "leads outside")


def test_a_symlinked_folder_out_of_the_bundle(made: Path) -> None:
    for name in ("reference", "dense"):
        outside = made.parent / name
        (made / name).rename(outside)
        (made / name).symlink_to(outside)
        refused(made, "leads outside")


def test_a_symlinked_manifest(made: Path) -> None:
    (made / MANIFEST).rename(made.parent / MANIFEST)
    (made / MANIFEST).symlink_to(made.parent / MANIFEST)
    refused(made, "leads outside")


def test_a_link_to_the_whole_bundle_is_fine(made: Path) -> None:
    link = made.parent / "link"
    link.symlink_to(made)
    read(link).verify()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"surprise": 1}, "surprise"),
        ({"role": "evil"}, "role"),
        ({"target": "../onnx"}, "target"),
        ({"schema_version": "1"}, "schema_version"),
        ({"model": {"id": "x", "family": "f", "architecture": "a", "sha256": SHA, "code": "x"}}, "model.code"),
        ({"files": {"model.onnx": {"sha256": "abc", "size": 1}}}, "files.model.onnx.sha256"),
        ({"files": {"model.onnx": {"sha256": SHA, "size": -1}}}, "files.model.onnx.size"),
        ({"attended": ["nobody"]}, "the top: Value error, there is no input nobody"),
        ({"lengths": [8], "padding": "nobody"}, "the top: Value error, there is no input nobody"),
        ({"form": "staged", "copies": 2}, "the top: Value error, stages have no copies"),
        ({"lengths": [8, 4], "padding": "input_ids"}, "the top: Value error, 8, 4 is no rising list"),
        (
            {"stages": [{"steps": [{"op": "store", "reads": ["k", "p"], "gives": "i"}]}]},
            "stages.0.steps.0: Value error, store does not",
        ),
        ({"stages": [{"steps": [{"op": "take", "reads": ["k"], "gives": "i", "numbers": [0, 1]}]}]}, "stages.0.steps.0"),
    ],
)
def test_a_manifest_that_is_not_valid(made: Path, changes: dict[str, object], where: str) -> None:
    edit(made, **changes)
    refused(made, f"not valid at {where}")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_not_json(made: Path, text: bytes) -> None:
    (made / MANIFEST).write_bytes(text)
    refused(made, "is not valid at")


def test_a_huge_manifest(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_MANIFEST", 10)
    refused(made, "no usable")


def test_a_newer_schema(made: Path) -> None:
    edit(made, schema_version=2)
    with pytest.raises(EnvironmentFault, match="schema version 2"):
        read(made)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle at"):
        read(tmp_path / "nowhere")
    with pytest.raises(IntegrityError, match="no usable"):
        read(tmp_path)


def test_vectors_that_were_changed(made: Path) -> None:
    with (made / VECTORS).open("ab") as file:
        file.write(b"!")
    with pytest.raises(IntegrityError, match="bytes, not"):
        read(made).vectors()


def test_vectors_that_are_something_else(tmp_path: Path) -> None:
    for content in (b"junk that is no safetensors file", None):
        out = tmp_path / str(content is None)
        with stage(out) as folder:
            write_vectors(folder / VECTORS, [])
            if content is not None:
                (folder / VECTORS).write_bytes(content)
            seal(folder, manifest())
        if content is None:
            assert read(out).vectors() == ()
        else:
            with pytest.raises(IntegrityError, match="no test vectors"):
                read(out).vectors()
