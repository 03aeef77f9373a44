"""An engine in a process of its own: it runs what is asked for, and what goes wrong there is said here."""

import errno
import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from tpcompile import backends
from tpcompile.errors import BuildFailed, InputError, IntegrityError, UsageError
from tpcompile.timing.alone import STATUS, _raised, _told, apart

GOOD, BAD = ({"pixel_values": np.full(shape, 0.5, dtype=np.float32)} for shape in ((1, 1, 8, 8), (1, 1, 8)))


def test_the_sample_asked_for_is_run_and_timed(image_bundle: Path) -> None:
    with apart([BAD, GOOD, GOOD], threads=1) as opener:
        first, second = (opener(image_bundle)() for _ in range(2))
        try:
            assert first.process.pid != second.process.pid
            found = [one(index) for one in (first, second) for index in (2, 1)]
            with pytest.raises(InputError, match="pixel_values") as caught:
                first(0)
            assert caught.value.fix
        finally:
            first.close()
            second.close()
    assert all(one.wall > 0 and one.cpu > 0 for one in found)
    assert first.process.returncode == second.process.returncode == 0


@pytest.mark.skipif(not STATUS.exists(), reason="this system does not tell a process's peak memory")
def test_memory_is_told(image_bundle: Path) -> None:
    with apart([GOOD], threads=1) as opener:
        engine = opener(image_bundle)()
        peaks = [engine(0).peak for _ in range(2)]
        engine.close()
    assert 0 < peaks[0] <= peaks[1] < 1000


def test_what_loading_raises_is_raised_here(image_bundle: Path, tmp_path: Path) -> None:
    with apart([GOOD], threads=1) as opener:
        with pytest.raises(IntegrityError, match="holds no usable"):
            opener(tmp_path)()
        copy = tmp_path / "copy"
        shutil.copytree(image_bundle, copy)
        (copy / "model.onnx").write_bytes(b"other")
        with pytest.raises(IntegrityError, match=r"model\.onnx") as caught:
            opener(copy)()
    assert caught.value.fix


def test_aprocess_that_ends_is_told(image_bundle: Path) -> None:
    with apart([GOOD], threads=1) as opener:
        engine = opener(image_bundle)()
        engine._said.write("a warning of no matter\n")
        engine._said.flush()
        engine.process.kill()  # as a system does that runs out of memory
        with pytest.raises(BuildFailed, match=r"own: a warning of no matter \(exit code -?\d+\)") as caught:
            engine(0)
        assert "tpcompile run" in caught.value.fix
        engine.close()


def raised(error: BaseException) -> BaseException:
    return _raised(**json.loads(json.dumps(_told(error))))


def test_errors_travel() -> None:
    class Plugged(UsageError):
        """A plug-in's own."""

    try:
        raise BuildFailed("no room", fix="free some") from OSError(errno.ENOSPC, "No space", "/there")
    except BuildFailed as error:
        again = raised(error)
    assert (type(again), str(again)) == (BuildFailed, "no room\n  fix     free some")
    assert (again.__cause__.errno, again.__cause__.filename) == (errno.ENOSPC, "/there")
    assert type(raised(Plugged("x", fix="y"))) is UsageError
    assert isinstance(raised(MemoryError()), MemoryError)
    denied = raised(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/there"))
    assert (type(denied), denied.filename) == (PermissionError, "/there")
    bug = raised(ZeroDivisionError("a bug"))
    assert type(bug) is RuntimeError
    assert "ZeroDivisionError: a bug" in str(bug)


def test_the_backend_of_a_plug_in_is_registered_there_too(image_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``import plugged_runtime`` registers it; the other process knows it by its class's module."""
    (tmp_path / "plugged_runtime.py").write_text(
        "from tpcompile.backends import register\n"
        "from tpcompile.backends.onnxruntime import OnnxRuntime\n"
        "class Plugged(OnnxRuntime):\n"
        "    name = 'plugged'\n"
        "register(Plugged())\n"
    )
    copy = tmp_path / "copy"
    shutil.copytree(image_bundle, copy)
    manifest = json.loads((copy / "tpcompile.json").read_text("utf-8"))
    (copy / "tpcompile.json").write_text(json.dumps({**manifest, "target": "plugged"}), "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "_REGISTRY", dict(backends._REGISTRY))
    import_module("plugged_runtime")
    with apart([GOOD], threads=1) as opener:
        engine = opener(copy)()
        assert engine(0).wall > 0
        engine.close()
