"""The shell around every verb: options accepted before and after the verb, and exit codes for whatever goes wrong."""

import contextlib
import functools
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TextIO

import click

from tpcompile.cli.failures import failure_of, report
from tpcompile.cli.settings import Settings

LEVELS = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)


def common_options() -> list[click.Parameter]:
    """The options every verb takes, wherever they stand on the line."""

    def assign(name: str, value: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], None]:
        def callback(ctx: click.Context, _: click.Parameter, given: Any) -> None:
            if given:
                setattr(ctx.ensure_object(Settings), name, value(given))

        return callback

    option = functools.partial(click.Option, expose_value=False)
    return [
        option(["--json"], is_flag=True, callback=assign("json", bool), help="One JSON document on stdout; logs on stderr."),
        option(["-v", "--verbose"], count=True, callback=assign("verbosity", int), help="Say more; -vv: everything."),
        option(["-q", "--quiet"], is_flag=True, callback=assign("verbosity", lambda _: -1), help="Errors and verdicts only."),
        option(["--no-color"], is_flag=True, callback=assign("plain", bool), help="No colours."),
    ]


class Verb(click.Command):
    """A command that also takes the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(common_options())

    def invoke(self, ctx: click.Context) -> Any:
        """Set up logging, remember which verb runs, run it."""
        settings = ctx.ensure_object(Settings)
        settings.verb = ctx.command_path.split(" ", 1)[-1]
        level = LEVELS[min(settings.verbosity, 2) + 1]
        logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level=level, force=True)
        for handler in logging.getLogger().handlers:  # a library may set its own logger to DEBUG: the handler decides
            handler.setLevel(level)
        return super().invoke(ctx)


class VerbGroup(click.Group):
    """A group that takes the common options, as its commands do, and lists these in the order they were added."""

    command_class = Verb

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(common_options())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The order of the journey, not of the alphabet."""
        return list(self.commands)


class Program(VerbGroup):
    """The main group. Every way to end has an exit code; a deliberate error is text, never a traceback."""

    group_class = VerbGroup

    def main(  # type: ignore[override]  # click types the result by standalone_mode; here it always leaves
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> None:
        """Parse, run, report, leave with the exit code.

        Raises:
            SystemExit: always.
        """
        words = list(sys.argv[1:] if args is None else args)
        settings = Settings(json="--json" in words)
        extra.update(standalone_mode=False, obj=settings)
        with warnings.catch_warnings(), interruptible(settings):
            # A library's warning is for the log: it must neither break a JSON document nor hide the verdict line.
            warnings.showwarning = _log_warning
            try:
                code = super().main(words, prog_name or "tpcompile", **extra)
            except Exception as error:  # the one place where every error is turned into an exit code
                failure = failure_of(error, settings)
                report(failure, settings)
                code = failure.exit_code
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def interruptible(settings: Settings) -> Iterator[None]:
    """Note Ctrl-C besides raising it: a library's C code may turn the exception into an error of its own."""
    default = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        settings.interrupted = True
        signal.default_int_handler(number, frame)

    if default is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Python's warnings, as log lines that show from ``-v`` on."""
    logging.getLogger("tpcompile.warnings").info("%s:%d: %s: %s", filename, lineno, category.__name__, message)
