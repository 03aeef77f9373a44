import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tpcompile import compat


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
