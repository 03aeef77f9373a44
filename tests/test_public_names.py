"""The public face: what ``__all__`` says is what there is, and asking for it costs nothing."""

import subprocess
import sys

import tpcompile

FIXED = {"lower", "export", "load", "validate", "bench", "models", "TpcompileError"}
"""Names that may never go away."""

HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "transformers", "timm", "numpy", "scipy"}


def test_all_names_exist_and_nothing_else_is_public() -> None:
    assert sorted(set(tpcompile.__all__)) == sorted(tpcompile.__all__)
    assert [name for name in tpcompile.__all__ if getattr(tpcompile, name, None) is None] == []
    ours = {name for name, value in vars(tpcompile).items() if getattr(value, "__module__", "").startswith("tpcompile")}
    assert sorted(name for name in ours if not name.startswith("_") and name not in tpcompile.__all__) == []


def test_the_fixed_names_are_public() -> None:
    assert sorted(FIXED - set(tpcompile.__all__)) == []


def test_import_brings_nothing_heavy() -> None:
    code = "import sys, tpcompile; print(*sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(HEAVY & set(done.stdout.split())) == []
