"""An engine in a process of its own, told over a pipe which sample to run.

oneDNN keeps the kernels that it makes per process: of two engines in one, the second to meet a size finds the first one's, and so does a
fresh session the last one's. Only alone is a first pass cold; and in a process with two engines nobody can tell whose a page is.

A request is a line, the number of a sample; an answer is a line of JSON.
"""

import gc
import json
import os
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
from tpcompile.timing.pipe import Pipe
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


class Alone(Pipe):
    """A bundle's engine in a process of its own.

    Args:
        bundle: its folder.
        feeds: a file that ``apart`` wrote.
        threads: of the engine.
    """

    def __init__(self, bundle: Path, feeds: Path, threads: int) -> None:
        plugin = type(backend(read(bundle).manifest.target)).__module__
        command = [sys.executable, "-P", "-m", "tpcompile.timing.alone", str(bundle), str(feeds), str(threads), plugin]
        super().__init__(str(bundle), command)
        try:
            self.answer()
        except BaseException:
            super().close()
            raise

    def __call__(self, index: int, /) -> Tick:
        """Run one sample; raises what the engine raises, and BuildFailed where the process ends."""
        return Tick(**self.ask(index))

    def answer(self) -> Any:
        """The next line, or the error that it tells."""
        said = super().answer()
        if "trace" in said:
            raise _raised(**said)
        return said

    def close(self, patience: float = PATIENCE) -> None:
        """Let the engine be closed, and end the process."""
        super().close(patience)


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
