"""What the tests of official numbers share: a graph with its taps in a runtime."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tpcompile.backends import Session, backend
from tpcompile.onnx.emit import OnnxModel

Opened = Callable[[str, OnnxModel], AbstractContextManager[Session]]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """``opened(target, model)``: a session of one thread that gives the outputs and every tap."""

    def build(target: str, model: OnnxModel) -> AbstractContextManager[Session]:
        model.save(tmp_path / "model.onnx")
        (tmp_path / "out").mkdir()
        backend(target).build(tmp_path / "model.onnx", tmp_path / "out", "fp32")
        return backend(target).open(tmp_path / "out", taps=model.taps, threads=1, precision="fp32")

    return build
