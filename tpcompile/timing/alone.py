"""An engine in a process of its own, told over a pipe which sample to run.

oneDNN keeps the kernels that it makes per process: of two engines in one, the second to meet a size finds the first one's, and so does a
fresh session the last one's. Only alone is a first pass cold; and in a process with two engines nobody can tell whose a page is.

A request is a line, the number of a sample; an answer is a line of JSON.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile import errors
from tpcompile.errors import BuildFailed, TpcompileError
from tpcompile.timing.turns import Opener, Tick, tick

Feeds = Sequence[Mapping[str, NDArray[Any]]]

CLEAR = Path("/proc/self/clear_refs")
"""Linux's way to forget a process's peak; elsewhere memory is not told."""


@contextmanager
def apart(feeds: Feeds, threads: int) -> Iterator[Callable[[Path], Opener]]:
    """Put a stream where other processes find it.

    Args:
        feeds: inputs by name, of every sample.
        threads: of each engine.

    Yields:
        bundle -> what opens it in a process of its own. Opening raises what ``load`` does, and BuildFailed where the process ends.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "feeds.npz"
        arrays = {f"{i}/{name}": value for i, one in enumerate(feeds) for name, value in one.items()}
        np.savez(path, allow_pickle=False, **arrays)
        yield lambda bundle: partial(Alone, bundle, path, threads)


class Alone:
    """A bundle's engine in a process of its own.

    Args:
        bundle: its folder.
        feeds: a file that ``apart`` wrote.
        threads: of the engine.
    """

    def __init__(self, bundle: Path, feeds: Path, threads: int) -> None:
        self._bundle = bundle
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the process: a pipe nobody reads would stop it
        command = [sys.executable, "-P", "-m", "tpcompile.timing.alone", str(bundle), str(feeds), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, encoding="utf-8"
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __call__(self, index: int, /) -> Tick:
        """Run one sample.

        Raises:
            TpcompileError: what the engine raises.
            BuildFailed: the process ended, with its last words.
        """
        assert self._process.stdin is not None
        try:
            print(index, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return Tick(**self._answer())

    def close(self) -> None:
        """End the process; the engine is closed in it."""
        self._process.communicate()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise getattr(errors, said["error"])(said["message"], fix=said["fix"])
        return said

    def _ended(self) -> BuildFailed:
        code = self._process.wait()
        self._said.seek(0)
        last = (self._said.read().strip().splitlines() or [f"exit code {code}"])[-1]
        fix = "see whether memory is short, and whether `tpcompile run` ends as well"
        return BuildFailed(f"{self._bundle} ended in a process of its own: {last}", fix=fix)


def serve(bundle: str, feeds: str, threads: str) -> None:
    """Open the engine, then run what is asked for until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    from tpcompile.engine import load

    try:
        with np.load(feeds, allow_pickle=False) as stream:
            held = _peak(forget=True)
            with closing(load(bundle, threads=int(threads))) as engine:
                print("{}", file=answers)
                gc.disable()
                for line in sys.stdin:
                    number = f"{int(line)}/"
                    feed = {key.removeprefix(number): stream[key] for key in stream.files if key.startswith(number)}
                    one, now = tick(partial(engine, **feed)), _peak()
                    peak = None if held is None or now is None else now - held
                    print(json.dumps(asdict(replace(one, peak=peak))), file=answers)
    except TpcompileError as error:
        print(json.dumps({"error": type(error).__name__, "message": error.message, "fix": error.fix}), file=answers)


def _peak(forget: bool = False) -> float | None:
    """The most MB that this process held; None where the system does not say."""
    if not CLEAR.exists():
        return None
    if forget:
        CLEAR.write_text("5")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    serve(*sys.argv[1:])
