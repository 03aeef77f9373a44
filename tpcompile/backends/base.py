"""What a backend is: three small types. A backend turns an ONNX file into a runtime's own files and opens them; nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Protocol, Self, runtime_checkable

import numpy as np


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a runtime can be used on this machine.

    Attributes:
        ok: True if ``build`` and ``open`` can work here.
        version: the runtime's version; empty when it cannot be imported.
        reason: why not, in one sentence; empty when ``ok``.
        fix: the next step, such as an install line; empty when ``ok``.
        devices: what the runtime can compute on, by its own names.
    """

    ok: bool
    version: str = ""
    reason: str = ""
    fix: str = ""
    devices: tuple[str, ...] = ()


class Session(Protocol):
    """An opened engine: feeds in, outputs out. One caller at a time."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute once.

        Args:
            feeds: every input by name, of the right dtype and shape: the Engine checks, as some runtimes do not.

        Returns:
            The model's outputs and the taps asked for at ``open``, by name; arrays the caller owns.
        """
        ...

    def close(self) -> None:
        """Give memory and threads back. A second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@runtime_checkable
class Shareable(Session, Protocol):
    """A session whose compiled engine several callers can use at once."""

    def share(self) -> Session:
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


class Backend(Protocol):
    """A runtime that engines are built for. The runtime is imported inside these methods only."""

    name: ClassVar[str]

    def probe(self) -> Availability:
        """Say whether the runtime can be used here. Never raises."""
        ...

    def build(self, model: Path, out: Path, precision: str, stage: int | None = None) -> None:
        """Write the runtime's own files.

        Args:
            model: an ``.onnx`` file, external data beside it. Values named ``site<i>.<what>`` are taps and must stay reachable.
            out: an existing folder; file names are the runtime's usual ones. The same input gives the same bytes.
            precision: ``fp32``, or one the backend names.
            stage: number of a stage of a chain: the files' names begin with ``stage<n>``; what stages share may be one file. Nothing
                but the model's outputs is asked of a stage.

        Raises:
            UsageError: a precision this backend does not have.
            BackendUnavailable: the runtime cannot be used here.
            BuildFailed: the runtime refused the graph; its own message is in the text.
        """
        ...

    def open(
        self, folder: Path, *, taps: Sequence[str] = (), threads: int = 0, precision: str = "fp32", stage: int | None = None
    ) -> Session:
        """Open what ``build`` wrote.

        Args:
            folder: where the files lie.
            taps: internal values to return besides the outputs, by name.
            threads: threads for one inference; 0 is the runtime's default.
            precision: as at ``build``.
            stage: as at ``build``.

        Raises:
            UsageError: a precision or a tap the engine does not have.
            BackendUnavailable: the runtime, or the precision, cannot be used here.
            BuildFailed: the runtime refused the files.
        """
        ...
