"""Several sessions of one engine, each for inputs of a few shapes: what a runtime prepares for a shape then stands until it comes again."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from tpcompile.backends.base import Shareable

Shapes = tuple[tuple[int, ...], ...]


class Copies(Shareable):
    """One session out of several; see :class:`~tpcompile.backends.base.Shareable`.

    Inputs of a shape seen before go where they went then. A new shape goes to a session that has none yet, else to the one whose shape
    was used least lately: which numbers come out does not depend on it.

    Args:
        sessions: of the same engine, one or more.
    """

    def __init__(self, sessions: Sequence[Shareable]) -> None:
        self._sessions = tuple(sessions)
        self._placed: OrderedDict[Shapes, int] = OrderedDict()

    def place(self, feeds: Mapping[str, np.ndarray]) -> int:
        """The number of the session that inputs of these shapes go to."""
        shapes = tuple(array.shape for array in feeds.values())
        if shapes in self._placed:
            self._placed.move_to_end(shapes)
        elif len(self._placed) < len(self._sessions):
            self._placed[shapes] = len(self._placed)
        else:
            self._placed[shapes] = self._placed.popitem(last=False)[1]
        return self._placed[shapes]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :class:`~tpcompile.backends.base.Session`."""
        return self._sessions[self.place(feeds)].run(feeds)

    def share(self) -> "Copies":
        """See :class:`~tpcompile.backends.base.Shareable`."""
        return Copies([one.share() for one in self._sessions])

    def close(self) -> None:
        """See :class:`~tpcompile.backends.base.Session`."""
        for one in self._sessions:
            one.close()
