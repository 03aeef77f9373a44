"""What the common options say, and the two streams: the result on stdout, all else on stderr."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

SCHEMA_VERSION = 1

Progress = Callable[[str, int, int], None]


@dataclass
class Settings:
    """The common options of one run. Mutable: options before and after the verb add to it.

    Attributes:
        json: one JSON document on stdout instead of text.
        verbosity: -1 quiet, 0 normal, 1 and 2 for ``-v`` and ``-vv``.
        plain: no colours.
        verb: the verb that runs, such as ``passes show``.
        interrupted: Ctrl-C was pressed.
    """

    json: bool = False
    verbosity: int = 0
    plain: bool = False
    verb: str = ""
    interrupted: bool = False

    def emit(self, document: Mapping[str, Any], text: str) -> None:
        """Write the result to stdout: the document with ``--json``, else the text."""
        if self.json:
            head = {"schema_version": SCHEMA_VERSION, "verb": self.verb}
            click.echo(json.dumps({**head, **document}, indent=2, ensure_ascii=False, allow_nan=False, default=str))
        else:
            click.echo(text)

    def say(self, text: str) -> None:
        """Write a line for people to stderr, unless ``-q``."""
        if self.verbosity >= 0:
            click.echo(text, err=True)

    def verdict(self, word: str, detail: str) -> None:
        """Write the last line of a gate to stderr: ``PASSED validate out: ...``. Never silenced: scripts read it."""
        colour = {"PASSED": "green", "FAILED": "red"}.get(word, "yellow")
        click.echo(f"{click.style(word, fg=colour, bold=True)} {self.verb} {detail}", err=True, color=self._colour())

    @contextlib.contextmanager
    def work(self) -> Iterator[Progress | None]:
        """Do the work of a verb: stray prints of libraries go to stderr, and bars show where somebody watches.

        That is where stderr is a terminal, and neither ``--json`` nor ``-q`` was given.

        Yields:
            A callable ``(what, done, total)``, or None where nobody watches.
        """
        # A loader's own bar on stderr would break ours, and the last line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with contextlib.redirect_stdout(sys.stderr):
            if self.json or self.verbosity < 0 or not sys.stderr.isatty():
                yield None
                return
            with _bars(self._colour() is False) as progress:
                yield progress

    def _colour(self) -> bool | None:
        """False: no colours; None: let click look at the stream."""
        return False if self.plain or os.environ.get("NO_COLOR") else None


@contextlib.contextmanager
def _bars(plain: bool) -> Iterator[Progress]:
    """One line of rich per task, with the time it took and the time it still needs; removed when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True, no_color=plain), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress
