"""What the packages are worked around with: torchvision of another build, and a busy collector."""

import gc
import importlib.util
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest

from tpcompile import compat
from tpcompile.compat import sparing_collector


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_imports_whatever_its_build() -> None:
    code = "from tpcompile.compat import ensure_torchvision as e; a = e(); import torchvision; print(a, e(), 'ok')"
    assert _run(code).split()[1:] == ["False", "ok"]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_schemas_are_declared_only_where_the_import_would_fail() -> None:
    plain = subprocess.run([sys.executable, "-W", "ignore", "-c", "import torchvision"], capture_output=True, timeout=300)
    declared = _run("from tpcompile.compat import ensure_torchvision; print(ensure_torchvision())").strip()
    assert declared == str(plain.returncode != 0)


def test_absent_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(compat, "_declared", [])
    monkeypatch.setattr(compat, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert compat.ensure_torchvision() is False


def test_importing_the_module_imports_no_torch() -> None:
    assert _run("import sys, tpcompile.compat; print('torch' in sys.modules)").strip() == "False"


class Ring:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.self = self


def test_the_collector_is_spared_what_was_there_and_frees_what_is_new() -> None:
    old = gc.get_freeze_count()
    with sparing_collector():
        assert gc.get_freeze_count() > 10_000
        during = weakref.ref(Ring())
        gc.collect()
        assert during() is None
    assert gc.get_freeze_count() == old == 0


def test_a_caller_who_froze_objects_keeps_them() -> None:
    gc.freeze()
    try:
        with sparing_collector():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
