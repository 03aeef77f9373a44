"""The demo compiles for what runs here."""

from pathlib import Path
from typing import Any

import pytest

from tpcompile import demo
from tpcompile.errors import UsageError


def test_a_target_without_a_device_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package may be installed all the same."""
    built: list[str] = []

    def engine(folder: Path, name: str, *_: Any) -> None:
        built.append(name)
        raise UsageError("enough", fix="")

    monkeypatch.setattr(demo, "runnable", lambda: ["openvino"])
    monkeypatch.setattr(demo, "_engine", engine)
    monkeypatch.setattr(demo.build, "compile_subject", lambda subject: None)
    with pytest.raises(UsageError, match="enough"):
        demo.run(tmp_path)
    assert built == ["openvino"]
