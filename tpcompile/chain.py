"""A chain of stages as one session: the runtime computes each stage, this module gathers between them, in numpy.

Every value has a name, and waits under it for whoever reads it: a later stage, a gather, the caller. Which rows a site stores is
decided by ``tpcompile.rows.store``, as in eager torch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.backends.base import Session, Shareable
from tpcompile.errors import IntegrityError, UsageError
from tpcompile.manifest import Manifest
from tpcompile.rows import Rows, store

Array = NDArray[Any]
AGAIN = "export the bundle again"


def _store(numbers: Sequence[int], keep: Array, pinned: Array) -> Array:
    limit, *ladder = numbers
    return store(keep.astype(bool, copy=False), pinned.astype(bool, copy=False), Rows(tuple(ladder), limit))


def _take(numbers: Sequence[int], x: Array, index: Array) -> Array:
    """Whole rows of each sample; ``tpcompile.ops.take``."""
    batch, dim = numbers
    if x.shape[batch] == 1 == len(index):
        return _gather((dim,), x, index[0])
    rows = np.moveaxis(x, (batch, dim), (0, 1))
    samples = np.arange(len(rows))[:, None]  # of what all samples share there is one
    return np.ascontiguousarray(np.moveaxis(rows[samples, index], (0, 1), (batch, dim)))


def _gather(numbers: Sequence[int], x: Array, positions: Array) -> Array:
    rows: Array = np.take(x, positions, axis=numbers[0])
    return rows


def _row(numbers: Sequence[int], x: Array) -> Array:
    axis, position = numbers
    return np.ascontiguousarray(np.take(x, position, axis=axis))


def _reshape(numbers: Sequence[int], x: Array) -> Array:
    return x.reshape(numbers)


def _unsqueeze(numbers: Sequence[int], x: Array) -> Array:
    return np.expand_dims(x, tuple(numbers))


GATHERS: Mapping[str, Callable[..., Array]] = {
    "store": _store, "take": _take, "gather": _gather, "row": _row, "reshape": _reshape, "unsqueeze": _unsqueeze,
}  # fmt: skip
"""Op of a step -> how it is computed: its numbers, then the values it reads."""


class ChainSession(Session):
    """The stages of a bundle as one session; see :class:`~tpcompile.backends.base.Session`.

    Args:
        manifest: of the bundle.
        sessions: one for each stage that has outputs, in order.
        taps: ``site<i>.<what>`` values to return besides the outputs.
        inner: values inside stages that their sessions were opened to give.

    Raises:
        IntegrityError: the stages do not fit together.
        UsageError: a tap that the chain does not have.
    """

    def __init__(self, manifest: Manifest, sessions: Sequence[Session], taps: tuple[str, ...] = (), inner: Sequence[str] = ()) -> None:
        engines = iter(sessions)
        self._stages = [(stage, next(engines) if stage.outputs else None) for stage in manifest.stages]
        self._results = tuple(output.name for output in manifest.outputs)
        self._known = _check(manifest, self._results) | set(inner)
        self._wanted = (*self._results, *self._require(taps))

    def _require(self, taps: tuple[str, ...]) -> tuple[str, ...]:
        missing = [name for name in taps if name not in self._known]
        if missing:
            raise UsageError(f"the chain has no value {', '.join(missing)}", fix=AGAIN)
        return taps

    def tapped(self, taps: tuple[str, ...]) -> "ChainSession":
        """The same stages, giving these taps too: no second engine is opened."""
        other = copy(self)
        other._wanted = (*self._results, *self._require(taps))
        return other

    def share(self) -> "ChainSession":
        """See :class:`~tpcompile.backends.base.Shareable`.

        Raises:
            UsageError: the stages' runtime serves one caller.
        """
        other = copy(self)
        other._stages = [(stage, None if session is None else shared(session)) for stage, session in self._stages]
        return other

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute once."""
        values = dict(feeds)
        for stage, session in self._stages:
            for step in stage.steps:
                values[step.gives] = GATHERS[step.op](step.numbers, *(values[name] for name in step.reads))
            if session is not None:
                values |= session.run({tensor.name: values[tensor.name] for tensor in stage.inputs})
        return {name: values[name] for name in self._wanted}

    def close(self) -> None:
        """Close every stage; a second call does nothing."""
        for _, session in self._stages:
            if session is not None:
                session.close()


def shared(session: Session) -> Session:
    """A session for another caller.

    Raises:
        UsageError: the runtime serves one caller.
    """
    if not isinstance(session, Shareable):
        raise UsageError("this engine's runtime serves one caller at a time", fix="leave out --workers")
    return session.share()


def open_chain(manifest: Manifest, open_: Callable[[int], Session], inner: Sequence[str] = ()) -> ChainSession:
    """Open every stage of a bundle.

    Args:
        manifest: of the bundle.
        open_: opens the stage of that number.
        inner: see ``ChainSession``.

    Raises:
        IntegrityError: the stages do not fit together.
    """
    with ExitStack() as opened:
        engines = [opened.enter_context(open_(number)) for number, stage in enumerate(manifest.stages) if stage.outputs]
        chain = ChainSession(manifest, engines, inner=inner)
        opened.pop_all()
    return chain


def _check(manifest: Manifest, results: Sequence[str]) -> set[str]:
    """The names of all values of a chain whose every value exists before it is read."""
    known = {tensor.name for tensor in manifest.inputs}
    for number, stage in enumerate(manifest.stages):
        for step in stage.steps:
            _there(number, step.reads, known)
            known.add(step.gives)
        _there(number, [tensor.name for tensor in stage.inputs], known)
        known |= {tensor.name for tensor in stage.outputs}
    missing = [name for name in results if name not in known]
    if missing:
        raise IntegrityError(f"no stage gives {', '.join(missing)}", fix=AGAIN)
    return known


def _there(number: int, reads: Sequence[str], known: set[str]) -> None:
    missing = [name for name in reads if name not in known]
    if missing:
        raise IntegrityError(f"stage {number} reads {', '.join(missing)}, which nothing gives", fix=AGAIN)
