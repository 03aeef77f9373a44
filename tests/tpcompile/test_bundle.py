"""Bundles: whole or not at all, and deterministic; what is read of a stranger's is in test_bundle_untrusted.py."""

import errno
from pathlib import Path

import numpy as np
import pytest
from bundle_parts import fill, manifest, vectors

from tpcompile import bundle as storage
from tpcompile.bundle import VECTORS, Bundle, read, seal, stage
from tpcompile.errors import BuildFailed, EnvironmentFault, IntegrityError, StageError, UsageError
from tpcompile.flops import evaluate
from tpcompile.manifest import canonical


def interrupted(out: Path, error: BaseException, force: bool = False) -> None:
    with stage(out, force) as folder:
        fill(folder, created="later")
        raise error


# staging


def test_a_clean_exit_leaves_one_verified_bundle(made: Path) -> None:
    assert [path.name for path in made.parent.iterdir()] == ["out"]
    opened = read(made)
    opened.verify()
    assert sorted(opened.manifest.files) == ["model.onnx", "reference/model.onnx", VECTORS]
    assert opened.manifest.files["model.onnx"].size == 14
    assert opened.dense is not None
    assert opened.manifest.parts == {"dense": opened.dense.identity}
    assert opened.dense.dense is None
    assert opened.reference == made / "reference" / "model.onnx"


def test_the_mode_is_the_users_own(made: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    assert made.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        interrupted(tmp_path / "deep" / "er" / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_forgetting_the_seal_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="never sealed"), stage(tmp_path / "out") as folder:
        (folder / "model.onnx").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(EnvironmentFault, match="is full") as caught, stage(tmp_path / "out") as folder:
        fill(folder)
    assert caught.value.exit_code == 3
    assert "free at least" in caught.value.fix
    assert str(tmp_path) in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_flush", no_space)
    with pytest.raises(EnvironmentFault, match="is full"), stage(tmp_path / "out") as folder:
        fill(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_reported_by_a_library(tmp_path: Path) -> None:
    def save() -> None:
        try:
            no_space()
        except OSError as error:
            raise BuildFailed("the runtime could not save", fix="") from error

    with pytest.raises(EnvironmentFault, match="is full"), stage(tmp_path / "out"):
        save()
    with pytest.raises(EnvironmentFault, match="is full"), stage(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_too_little_space_is_known_before(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="is full") as caught, stage(tmp_path / "out", need=2**60):
        pytest.fail("the block ran")
    assert f"{2**40} MB" in caught.value.fix


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="cannot be written"), stage(tmp_path / "file" / "out"):
        pytest.fail("the block ran")


def test_existing_output(made: Path) -> None:
    before = read(made).identity
    with pytest.raises(UsageError, match="exists") as caught, stage(made):
        pytest.fail("the block ran")
    assert "--force" in caught.value.fix
    assert read(made).identity == before


def test_force_replaces_at_the_very_end(made: Path) -> None:
    before = read(made).identity
    with stage(made, force=True) as folder:
        (folder / "model.onnx").write_bytes(b"new")
        seal(folder, manifest(role="dense"))
        read(made).verify()
    after = read(made)
    after.verify()
    assert after.identity != before
    assert [path.name for path in made.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_force_and_failure_keep_the_old_bundle(made: Path, error: BaseException) -> None:
    before = read(made).identity
    with pytest.raises(type(error)):
        interrupted(made, error, force=True)
    read(made).verify()
    assert read(made).identity == before
    assert [path.name for path in made.parent.iterdir()] == ["out"]


def test_a_failing_rename_brings_the_old_bundle_back(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.replace

    def fails_on_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fails_on_new)
    with pytest.raises(KeyboardInterrupt), stage(made, force=True) as folder:
        fill(folder, created="later")
    read(made).verify()
    assert read(made).manifest.environment == {"created": "today"}


def test_force_never_replaces_what_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name in ("photos", "link"):
        with pytest.raises(UsageError, match="is not a bundle"), stage(tmp_path / name, force=True):
            pytest.fail("the block ran")
    assert (tmp_path / "photos" / "cat.png").exists()


# identity


def test_a_plan_is_no_part_of_the_identity(made: Path) -> None:
    """A builder's bytes differ from build to build; every other file counts."""
    manifest = read(made).manifest
    entry = next(iter(manifest.files.values()))
    for name, same in (("stage1.plan", True), ("stage1.plan.json", True), ("plan.onnx", False)):
        other = manifest.model_copy(update={"files": {**manifest.files, name: entry}})
        assert (other.identity == manifest.identity) is same


def test_the_same_content_gives_the_same_identity_and_files(made: Path, tmp_path: Path) -> None:
    with stage(tmp_path / "again") as folder:
        fill(folder, created="tomorrow")
    one, two = read(made), read(tmp_path / "again")
    assert one.identity == two.identity
    assert one.manifest.files == two.manifest.files
    assert one.manifest != two.manifest


def test_identity_is_of_everything_but_environment_and_measured(made: Path) -> None:
    first = read(made)
    second = first.record("parity", {"max_abs": 1e-6})
    assert read(made).manifest.measured == second.manifest.measured == {"parity": {"max_abs": 1e-6}}
    assert second.identity == first.identity
    for change in ({"precision": "bf16"}, {"dims": {"seq": (1, 65)}}, {"assumptions": ("more",)}, {"parts": {"dense": "1" * 64}}):
        assert first.manifest.model_copy(update=change).identity != first.identity


def test_identity_survives_the_file(made: Path, tmp_path: Path) -> None:
    with stage(tmp_path / "third") as folder:
        sealed = fill(folder)
    assert read(tmp_path / "third").manifest == sealed
    assert read(made).identity == sealed.identity


def test_canonical_json() -> None:
    assert canonical({"b": [1, 1e-5], "a": "é"}) == '{"a":"\\u00e9","b":[1,1e-05]}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))


def test_flops_polynomial() -> None:
    assert evaluate(manifest().flops.paper, {"t0": 4, "t1": 2}) == 8 * 4 + 2.5 * 4 * 2
    assert evaluate((), {}) == 0


# vectors


def test_vectors_come_back_in_order(made: Path) -> None:
    for read_back, written in zip(read(made).vectors(), vectors(), strict=True):
        np.testing.assert_array_equal(read_back.inputs["input_ids"], written.inputs["input_ids"])
        np.testing.assert_array_equal(read_back.outputs["logits"], written.outputs["logits"])
        assert [mask.tolist() for mask in read_back.kept] == [mask.tolist() for mask in written.kept]
        assert read_back.kept[0].dtype == np.bool_


def test_a_bundle_without_extras(tmp_path: Path) -> None:
    with stage(tmp_path / "bare") as folder:
        (folder / "model.onnx").write_bytes(b"x")
        seal(folder, manifest())
    bare: Bundle = read(tmp_path / "bare")
    assert bare.dense is None
    assert bare.vectors() == ()
    with pytest.raises(IntegrityError, match="holds no reference"):
        _ = bare.reference
