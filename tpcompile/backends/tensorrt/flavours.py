"""The two flavours, as data: TensorRT, which builds on the GPU it runs on, and TensorRT for RTX, which builds anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tpcompile.errors import BackendUnavailable, UsageError

LEAST = {"fp32": 80, "fp16": 75, "bf16": 80, "int8": 80, "fp8": 89}
"""Precision -> the first compute capability that has it in the builder."""


@dataclass(frozen=True)
class Flavour:
    """One library.

    Attributes:
        name: the target.
        module: what is imported.
        versions: first version that is known to do, and the first that is not.
        capabilities: what an engine can be built for without that GPU; empty: the GPU at hand only.
        usual: what it is built for where nobody says.
        nonzero: it has sizes that follow from data.
    """

    name: str
    module: str
    versions: tuple[tuple[int, ...], tuple[int, ...]]
    capabilities: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    nonzero: bool = True

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install 'tpcompile[{self.name}]'"

    def library(self) -> Any:
        """The module (``api.Library``).

        Raises:
            BackendUnavailable: it is not there, or of a version that is not known to do.
        """
        try:
            module: Any = import_module(self.module)
        except (ImportError, OSError) as error:
            raise BackendUnavailable(f"{self.module} cannot be imported: {error}", fix=self.install) from error
        least, beyond = self.versions
        version = getattr(module, "__version__", "")  # none: something else of that name, such as a folder
        if not least <= numbers(version) < beyond:
            raise BackendUnavailable(
                f"{self.module} is {version or module}; this backend is for {dotted(least)} up to, not including, {dotted(beyond)}",
                fix=self.install,
            )
        return module

    def targets(self, wanted: Sequence[str], precision: str) -> tuple[str, ...]:
        """The capabilities to build for.

        Args:
            wanted: asked for; none: the usual ones that have the precision.
            precision: must be there in each of them.

        Raises:
            UsageError: one that does not exist, or lacks the precision.
        """
        if precision not in LEAST:
            raise UsageError(f"target {self.name} has no precision {precision!r}", fix=f"use one of: {', '.join(LEAST)}")
        if not self.capabilities and wanted:
            raise UsageError(f"target {self.name} builds for the GPU at hand", fix="leave the capability out")
        for name in wanted:
            if name not in self.capabilities:
                raise UsageError(
                    f"target {self.name} has no compute capability {name!r}", fix=f"use one of: {', '.join(self.capabilities)}"
                )
            if number(name) < LEAST[precision]:
                raise UsageError(
                    f"{name} has no {precision}: it comes with sm{LEAST[precision]}",
                    fix="leave that capability out, or use another precision",
                )
        return tuple(wanted) or tuple(name for name in self.usual if number(name) >= LEAST[precision])


TENSORRT = Flavour("tensorrt", "tensorrt", ((10, 8), (12,)))
RTX = Flavour(
    "tensorrt-rtx", "tensorrt_rtx", ((1, 7), (2,)),
    capabilities=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"), usual=("sm80", "sm86", "sm89", "sm120"), nonzero=False,
)  # fmt: skip


def number(capability: str) -> int:
    """``sm86`` -> 86."""
    return int(capability.removeprefix("sm"))


def numbers(version: str) -> tuple[int, ...]:
    """``1.7.1.116`` -> its numbers."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def dotted(version: tuple[int, ...]) -> str:
    """The reverse."""
    return ".".join(map(str, version))
