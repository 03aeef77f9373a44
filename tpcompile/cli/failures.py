"""From an exception to an exit code, a text and a JSON document."""

import errno
import os
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from tpcompile.cli.settings import Settings
from tpcompile.errors import EnvironmentFault, TpcompileError, UsageError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
VERDICTS = {"demo", "validate", "bench", "verify", "bisect"}


@dataclass(frozen=True)
class Failure:
    """How a run ended.

    Attributes:
        exit_code: of the process.
        kind: the error's class name.
        message: what happened.
        fix: the next step.
        details: ``at``, ``node``, ``during``, ``traceback``: what is known.
        report: a line per mask that was tried for a prune site.
        trace: the Python traceback.
    """

    exit_code: int
    kind: str
    message: str
    fix: str
    details: dict[str, str] = field(default_factory=dict)
    report: tuple[str, ...] = ()
    trace: str = ""

    def to_json(self) -> dict[str, Any]:
        """The ``error`` document of ``--json``."""
        body = {"class": self.kind, "message": self.message, "fix": self.fix, "exit_code": self.exit_code, **self.details}
        return {"error": {**body, "report": self.report} if self.report else body}

    def text(self) -> str:
        """``UsageError: message``, then one indented line per detail; the fix comes last."""
        rows = [*self.details.items(), ("fix", self.fix)]
        return "\n".join([f"{self.kind}: {self.message}", *(f"  {name:<7} {text}" for name, text in rows if text)])


def failure_of(error: BaseException, settings: Settings) -> Failure:
    """Find the exit code, the text and the next step for any exception."""
    trace = "".join(traceback.format_exception(error))
    if settings.interrupted or isinstance(error, click.Abort):
        return Failure(130, "Interrupted", "stopped before the end; nothing half-written is left", "run the same command again")
    if isinstance(error, click.ClickException):
        return _of_click(error, settings)
    error = _environment_fault(error) or error
    if isinstance(error, TpcompileError):
        details = {"at": str(error.where) if error.where else "", "node": error.node, "during": error.during}
        notes = "; ".join(getattr(error, "__notes__", ()))
        known = {name: text for name, text in {**details, "note": notes}.items() if text}
        return Failure(error.exit_code, type(error).__name__, error.message, error.fix, known, error.report, trace)
    path = _save(trace)
    message = f"this is a bug in tpcompile: {type(error).__name__}: {error}"
    fix = "please report it with that file; `--dump-ir DIR` on export adds every stage of the program"
    return Failure(1, "InternalError", message, fix, {"traceback": path}, trace=trace)


def report(failure: Failure, settings: Settings) -> None:
    """Write the text to stderr, with ``--json`` the document to stdout, and a gate's verdict as the last line."""
    if settings.verbosity > 0 and failure.trace:
        click.echo(failure.trace, err=True)
    click.echo(failure.text(), err=True)
    if settings.json:
        settings.emit(failure.to_json(), "")
    if settings.verb in VERDICTS:
        settings.verdict("INCONCLUSIVE" if failure.exit_code == 10 else "FAILED", failure.kind)


def _of_click(error: click.ClickException, settings: Settings) -> Failure:
    """A command line that does not parse is a UsageError like any other."""
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx is not None else "tpcompile"
    if ctx is not None and not settings.verb:
        settings.verb = path.partition(" ")[2]
    return Failure(UsageError.exit_code, UsageError.__name__, error.format_message(), f"see `{path} -h`")


def _environment_fault(error: BaseException) -> EnvironmentFault | None:
    """A full disk or too little memory anywhere in the chain of causes; a folder without access only as the error itself."""
    for link in _chain(error):
        if isinstance(link, MemoryError):
            return EnvironmentFault("out of memory", fix="close other programs, or use a smaller model or fewer samples")
        if isinstance(link, OSError) and link.errno in NO_SPACE:
            return EnvironmentFault(_about("no space left on the disk", link), fix="free some space, or write to another disk")
    if isinstance(error, OSError) and error.errno in NO_ACCESS:
        return EnvironmentFault(_about(os.strerror(error.errno).lower(), error), fix="choose a folder you may read and write")
    return None


def _about(message: str, error: OSError) -> str:
    return f"{message}: {error.filename}" if error.filename else message


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from or during."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _save(trace: str) -> str:
    """Keep a traceback for a bug report; where even that fails, say so instead of hiding the first error."""
    try:
        handle, path = tempfile.mkstemp(prefix="tpcompile-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(trace)
    except OSError as error:
        return f"(not saved: {error})"
    return path
