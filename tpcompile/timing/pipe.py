"""A process that is asked by lines and answers by lines of JSON."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, ClassVar

from tpcompile.errors import BuildFailed, TpcompileError


class Pipe:
    """The end that asks.

    Args:
        name: of what answers, for errors.
        command: that starts it.

    Attributes:
        fault: what is raised where it ends before it has answered.
        fix: its next step.
    """

    fault: ClassVar[type[TpcompileError]] = BuildFailed
    fix: ClassVar[str] = "see whether memory is short, and whether `tpcompile run` ends as well"

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self._name = name
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # a pipe that nobody reads would stop it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, encoding="utf-8"
        )

    def ask(self, what: object) -> Any:
        """Send a request, and wait for its answer.

        Raises:
            TpcompileError: ``fault``: the process ended, with its last words.
        """
        assert self.process.stdin is not None
        try:
            print(what, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return self.answer()

    def answer(self) -> Any:
        """The next line; raises what ``ask`` does."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def close(self, patience: float = 0.0) -> None:
        """End the process, after so many seconds in which it may end by itself; a second call does nothing."""
        if self._said.closed:
            return
        try:
            self.process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self._said.close()

    def _ended(self) -> TpcompileError:
        code = self.process.wait()
        self._said.seek(0)
        last = "".join(f"{line[:200]} " for line in self._said.read().strip().splitlines()[-1:])
        return self.fault(f"{self._name} ended in a process of its own: {last}(exit code {code})", fix=self.fix)
