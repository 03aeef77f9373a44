"""What a backend is: three small types. A backend turns an ONNX file into a runtime's own files and opens them; nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from tpcompile.errors import UsageError


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a runtime can be used on this machine.

    Attributes:
        ok: True if ``build`` and ``open`` can work here.
        version: the runtime's version; empty when it cannot be imported.
        reason: why not, in one sentence; empty when ``ok``.
        fix: the next step, such as an install line; empty when ``ok``.
        devices: what the runtime can compute on here, by its own names; none where engines can be built and not run.
        note: what a user must know though it is ``ok``, such as that engines are built here and cannot run.
    """

    ok: bool
    version: str = ""
    reason: str = ""
    fix: str = ""
    devices: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Extent:
    """What an engine is built for beyond its graph. A backend whose engines take any size and machine reads none of it.

    Attributes:
        sizes: dim name -> least, usual and largest size.
        capabilities: compute capabilities, such as ``sm86``; empty: the backend's own choice.
    """

    sizes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()


ANY = Extent()
"""Nothing said."""


class Closable(Protocol):
    """What holds memory and threads until it is closed, by hand or at the end of a ``with``."""

    def close(self) -> None:
        """Give memory and threads back. A second call does nothing."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Session(Closable, Protocol):
    """An opened engine: feeds in, outputs out. One caller at a time."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute once.

        Args:
            feeds: every input by name, of the right dtype and shape: the Engine checks, as some runtimes do not.

        Returns:
            The model's outputs and the taps asked for at ``open``, by name; arrays the caller owns.
        """
        ...


@runtime_checkable
class Shareable(Session, Protocol):
    """A session whose compiled engine several callers can use at once."""

    def share(self) -> "Shareable":
        """A session for another caller, on the same compiled engine."""
        ...


@dataclass(frozen=True, slots=True)
class OpTime:
    """Time of one op of a runtime's own graph: its name and kind there, and microseconds in all runs together."""

    name: str
    kind: str
    us: float


class Profiled(Session, Protocol):
    """A session that notes what every op takes; slower than a plain one."""

    def ops(self, after: int = 0) -> tuple[OpTime, ...]:
        """What each op took in the runs behind the first ``after``. Ends the session."""
        ...


@runtime_checkable
class Profiler(Protocol):
    """A backend that can say what every op takes."""

    def profile(self, folder: Path, *, threads: int = 0, precision: str = "fp32", stage: int | None = None) -> Profiled:
        """Open what ``build`` wrote for profiling; as ``open``."""
        ...


@runtime_checkable
class Copier(Protocol):
    """A backend whose engines prepare anew whenever the shape differs from the inference before, so that several are worth having."""

    def open_copies(self, folder: Path, copies: int, *, threads: int = 0, precision: str = "fp32", callers: int = 1) -> Session:
        """Open what ``build`` wrote so many times, for inputs of different shapes; as ``open``, without taps or stages."""
        ...


class Backend(Protocol):
    """A runtime that engines are built for. The runtime is imported inside these methods only."""

    name: ClassVar[str]
    profiled: ClassVar[bool]
    """Its engines take a range of every size, and are made for the usual one."""
    verified_on: ClassVar[tuple[str, ...]]
    """Kinds of device that this project's tests have run engines on; empty: never."""

    def probe(self) -> Availability:
        """Say whether the runtime can be used here. Never raises."""
        ...

    def targets(self, precision: str, capabilities: Sequence[str]) -> tuple[str, ...]:
        """Check before any work what an export asks for.

        Args:
            precision: of the engine.
            capabilities: to build for; none: the backend's own choice.

        Returns:
            The capabilities to build for; empty where there is nothing to choose.

        Raises:
            UsageError: the backend does not have one of them.
        """
        ...

    def build(self, model: Path, out: Path, precision: str, stage: int | None = None, extent: Extent = ANY) -> None:
        """Write the runtime's own files.

        Args:
            model: an ``.onnx`` file, external data beside it. Values named ``site<i>.<what>`` are taps and must stay reachable.
            out: an existing folder; file names are the runtime's usual ones. The same input gives the same bytes.
            precision: ``fp32``, or one the backend names.
            stage: number of a stage of a chain: the files' names begin with ``stage<n>``; what stages share may be one file. Nothing
                but the model's outputs is asked of a stage.
            extent: the sizes and machines it must fit.

        Raises:
            UsageError: a precision or capability this backend does not have.
            BackendUnavailable: the runtime cannot be used here.
            BuildFailed: the runtime refused the graph; its own message is in the text.
        """
        ...

    def open(
        self,
        folder: Path,
        *,
        taps: Sequence[str] = (),
        threads: int = 0,
        precision: str = "fp32",
        stage: int | None = None,
        callers: int = 1,
    ) -> Session:
        """Open what ``build`` wrote.

        Args:
            folder: where the files lie.
            taps: internal values to return besides the outputs, by name.
            threads: threads for one inference; 0 is the runtime's default.
            precision: as at ``build``.
            stage: as at ``build``.
            callers: sessions shared from this one that may compute at once, each on ``threads`` threads.

        Raises:
            UsageError: a precision or a tap the engine does not have.
            BackendUnavailable: the runtime, or the precision, cannot be used here.
            BuildFailed: the runtime refused the files.
        """
        ...


def without_choice(name: str, capabilities: Sequence[str]) -> tuple[str, ...]:
    """``Backend.targets`` of a backend that builds for the machine it is on.

    Raises:
        UsageError: a capability was asked for.
    """
    if capabilities:
        raise UsageError(f"target {name} has no compute capabilities to choose from", fix="leave the capability out")
    return ()
