"""What an engine was built with, and what runs it: versions of packages, and the machine."""

import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

BUILT_WITH = ("tpcompile", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt-rtx", "transformers")
"""Packages whose version may change what an engine computes."""
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""Vector extensions that runtimes choose their kernels by."""


def versions(names: tuple[str, ...] = BUILT_WITH) -> dict[str, str]:
    """Installed versions; ``absent`` where there is none."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def hardware() -> dict[str, Any]:
    """Machine, system, processor and its vector extensions, where the system tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "machine": platform.machine(), "system": platform.system(), "python": platform.python_version(),
        "cpu": facts.get("model name", ""), "isa": [name for name in ISA if name in flags],
    }  # fmt: skip


def cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def changes(recorded: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Where this machine differs from the one in a manifest's ``environment``: what, then, now. What was not recorded is not compared."""
    now: dict[str, Mapping[str, Any]] = {"versions": versions(), "hardware": hardware()}
    for part, fields in now.items():
        old = recorded.get(part)
        for name, value in fields.items():
            if isinstance(old, Mapping) and name in old and old[name] != value:
                yield name, _shown(old[name]), _shown(value)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
