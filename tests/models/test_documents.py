"""docs/add-a-method.md holds a method and its test: both are run here. docs/methods.md is the page of what was measured."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models import METHODS
from tpcompile.rows import Rows

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_example_is_a_method(tmp_path: Path, tiny_vit: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    method, test = next(b for b in BLOCKS if "class Loudest(" in b), next(b for b in BLOCKS if "def test_loudest" in b)
    (tmp_path / "loudest.py").write_text(method, encoding="utf-8")
    loudest = _module("loudest", tmp_path / "loudest.py")
    monkeypatch.setitem(METHODS, "loudest", loudest.Loudest)
    given = {"nn": nn, "Tensor": Tensor, "models": models, "tpcompile": tpcompile, "Rows": Rows, "torch": torch, "pytest": pytest}
    names: dict[str, Any] = {**given, "UsageError": UsageError}
    exec(compile(test, "add-a-method.md", "exec"), names)
    images = torch.randn(1, 3, 16, 12, generator=torch.Generator().manual_seed(5))
    names["test_loudest"](tiny_vit(), {"pixel_values": images})


def test_the_page_of_methods_is_the_one_of_its_measurements() -> None:
    script = _module("benchmark_methods", ROOT / "benchmarks" / "methods.py")
    found = json.loads((ROOT / "benchmarks" / "methods.json").read_text(encoding="utf-8"))
    assert found.keys() <= METHODS.keys()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == script.page(found)
    for method, entry in found.items():
        assert all("refused" in row or row["eager"] <= 1e-5 for row in entry["families"].values()), method
        assert all(gap <= 1e-5 for row in entry["families"].values() for gap in row.get("engines", {}).values()), method
        own, _ = script.HEADLINE[script.recipes()[method][1].model]
        assert "refused" not in entry["families"][own], method
