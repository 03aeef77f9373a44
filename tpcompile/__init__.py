"""Compile token-pruned transformers to engines that are really faster, with the proof beside them.

The names below load on first use: ``import tpcompile`` itself imports no framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpcompile.errors import TpcompileError

if TYPE_CHECKING:
    from tpcompile import models, ops
    from tpcompile.api import bench, export, fit, impose, load, lower
    from tpcompile.bundle import Bundle
    from tpcompile.compare.bisection import bisect
    from tpcompile.compare.differ import diff
    from tpcompile.engine import Engine
    from tpcompile.program import Program
    from tpcompile.proof.parity import Parity
    from tpcompile.proof.proving import validate
    from tpcompile.proof.verification import verify
    from tpcompile.timing.latency import Latency

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundle", "Engine": "engine", "Latency": "timing.latency", "Parity": "proof.parity", "Program": "program",
    "bench": "api", "bisect": "compare.bisection", "diff": "compare.differ",
    "export": "api", "fit": "api", "impose": "api", "load": "engine", "lower": "api",
    "validate": "proof.proving", "verify": "proof.verification",
}  # fmt: skip

__all__ = [
    "Bundle",
    "Engine",
    "Latency",
    "Parity",
    "Program",
    "TpcompileError",
    "bench",
    "bisect",
    "diff",
    "export",
    "fit",
    "impose",
    "load",
    "lower",
    "models",
    "ops",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("models", "ops"):
        return import_module(f"tpcompile.{name}")
    if name in _HOMES:
        return getattr(import_module(f"tpcompile.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tpcompile' has no attribute {name!r}")
