"""Compile token-pruned transformers to engines that are really faster, with the proof beside them.

The names below load on first use: ``import tpcompile`` itself imports no framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpcompile.errors import TpcompileError

if TYPE_CHECKING:
    from tpcompile import models, ops
    from tpcompile.api import bench, export, impose, load, lower
    from tpcompile.bisection import bisect
    from tpcompile.bundle import Bundle
    from tpcompile.differ import diff
    from tpcompile.engine import Engine
    from tpcompile.latency import Latency
    from tpcompile.parity import Parity
    from tpcompile.program import Program
    from tpcompile.proving import validate
    from tpcompile.verification import verify

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundle", "Engine": "engine", "Latency": "latency", "Parity": "parity", "Program": "program",
    "bench": "api", "bisect": "bisection", "diff": "differ", "export": "api", "impose": "api", "load": "engine", "lower": "api",
    "validate": "proving", "verify": "verification",
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
