"""Backends by target name. The runtimes themselves are imported only when one is used."""

from collections.abc import Mapping
from types import MappingProxyType

from tpcompile.backends.base import ANY, Availability, Backend, Closable, Copier, Extent, Session
from tpcompile.backends.onnxruntime import OnnxRuntime
from tpcompile.backends.openvino import OpenVino
from tpcompile.backends.tensorrt import TensorRt, TensorRtRtx
from tpcompile.errors import UsageError

__all__ = [
    "ANY",
    "Availability",
    "Backend",
    "Closable",
    "Copier",
    "Extent",
    "Session",
    "backend",
    "backends",
    "copier",
    "register",
    "runnable",
]

_REGISTRY: dict[str, Backend] = {one.name: one for one in (OnnxRuntime(), OpenVino(), TensorRt(), TensorRtRtx())}


def backends() -> Mapping[str, Backend]:
    """Every backend by target name, built-in ones first; a read-only view."""
    return MappingProxyType(_REGISTRY)


def runnable() -> list[str]:
    """The targets whose engines run on this machine: their package is here, and a device that it computes on."""
    return [name for name, one in _REGISTRY.items() if one.probe().devices]


def backend(name: str) -> Backend:
    """The backend of a target.

    Raises:
        UsageError: no backend has this name.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    raise UsageError(f"unknown target {name!r}", fix=f"use one of: {', '.join(_REGISTRY)}")


def copier(name: str) -> Copier:
    """The backend of a target, where several of an engine are worth having.

    Raises:
        UsageError: a change of shape costs it nothing.
    """
    found = backend(name)
    if not isinstance(found, Copier):
        raise UsageError(f"target {name} has no copies: a change of shape costs it nothing", fix="export without copies")
    return found


def register(new: Backend) -> None:
    """Add a plug-in's backend.

    Raises:
        UsageError: the name is taken; both classes are named.
    """
    old = _REGISTRY.setdefault(new.name, new)
    if old is not new:
        both = " and ".join(f"{type(one).__module__}.{type(one).__qualname__}" for one in (old, new))
        raise UsageError(f"two backends are called {new.name!r}: {both}", fix="uninstall one of the two plug-ins")
