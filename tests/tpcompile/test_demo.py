"""The demo compiles for what runs here."""

import pytest

from tpcompile import demo
from tpcompile.backends import backends
from tpcompile.errors import BackendUnavailable


def test_a_target_without_a_device_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package may be installed all the same."""
    monkeypatch.setattr(demo, "runnable", lambda: ["openvino"])
    targets, left_out = demo.choice()
    assert targets == ["openvino"]
    assert len(left_out) == len(backends()) - 1
    assert left_out[0] == "onnx is left out: no device here runs its engines"


def test_where_nothing_runs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "runnable", list)
    with pytest.raises(BackendUnavailable) as caught:
        demo.choice()
    assert str(caught.value).endswith("\n  fix     pip install 'tpcompile[demo]'")
