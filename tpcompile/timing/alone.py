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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile import errors
from tpcompile.backends import backend
from tpcompile.bundle import read
from tpcompile.errors import BuildFailed
from tpcompile.timing.turns import Opener, Tick, tick

Feeds = Sequence[Mapping[str, NDArray[Any]]]

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Linux's way to forget a process's peak, and to tell it; elsewhere memory is not told."""
PATIENCE = 10
"""Seconds that an engine has to close."""


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
        plugin = type(backend(read(bundle).manifest.target)).__module__
        command = [sys.executable, "-P", "-m", "tpcompile.timing.alone", str(bundle), str(feeds), str(threads), plugin]
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # a pipe that nobody reads would stop it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, encoding="utf-8"
        )
        try:
            self._answer()
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def __call__(self, index: int, /) -> Tick:
        """Run one sample.

        Raises:
            Exception: what the engine raises.
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
        try:
            self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._said.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        said: dict[str, Any] = json.loads(line)
        if "trace" in said:
            raise _raised(**said)
        return said

    def _ended(self) -> BuildFailed:
        code = self._process.wait()
        self._said.seek(0)
        last = "".join(f"{line} " for line in self._said.read().strip().splitlines()[-1:])
        fix = "see whether memory is short, and whether `tpcompile run` ends as well"
        return BuildFailed(f"{self._bundle} ended in a process of its own: {last}(exit code {code})", fix=fix)


def _told(error: BaseException) -> dict[str, Any]:
    """An error as JSON: a class of ours, what the system lacked, and its trace."""
    ours = next((kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__), "")
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    lacked = next(([one.errno, one.strerror, one.filename] for one in chain if isinstance(one, OSError) and one.errno), None)
    return {
        "ours": ours,
        "message": getattr(error, "message", ""),
        "fix": getattr(error, "fix", ""),
        "memory": any(isinstance(one, MemoryError) for one in chain),
        "lacked": lacked,
        "trace": "".join(traceback.format_exception(error)),
    }


def _raised(ours: str, message: str, fix: str, memory: bool, lacked: list[Any] | None, trace: str) -> Exception:
    """The error again, with what the system lacked as its cause; of another's class, its trace is the message."""
    cause = MemoryError() if memory else OSError(*lacked[:2], lacked[2]) if lacked else None
    if not ours:
        return cause or RuntimeError(trace)
    error: Exception = getattr(errors, ours)(message, fix=fix)
    error.__cause__ = cause
    return error


def serve(bundle: str, feeds: str, threads: str, plugin: str) -> None:
    """Open the engine, then run what is asked for until there are no more requests.

    Args:
        bundle: its folder.
        feeds: a file that ``apart`` wrote.
        threads: of the engine.
        plugin: the module of the target's backend: importing it registers what a plug-in brings.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        import_module(plugin)
        from tpcompile.engine import load

        with np.load(feeds, allow_pickle=False) as stream:
            names: dict[int, dict[str, str]] = {}
            for key in stream.files:
                number, _, name = key.partition("/")
                names.setdefault(int(number), {})[name] = key
            held = _peak(forget=True)
            with closing(load(bundle, threads=int(threads))) as engine:
                print("{}", file=answers)
                gc.disable()
                for line in sys.stdin:
                    feed = {name: stream[key] for name, key in names[int(line)].items()}
                    one, now = tick(partial(engine, **feed)), _peak()
                    del feed
                    peak = None if held is None or now is None else now - held
                    print(json.dumps(asdict(replace(one, peak=peak))), file=answers)
    except Exception as error:  # of any kind: it is raised where it is read
        print(json.dumps(_told(error)), file=answers)


def _peak(forget: bool = False) -> float | None:
    """The most MB that this process held; None where the system does not say."""
    try:
        if forget:
            CLEAR.write_text("5")
        return int(STATUS.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return None


if __name__ == "__main__":
    serve(*sys.argv[1:])
