"""A method's dial: which of its parameters move together, so that fewer tokens stay, and how. One factor turns them all."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

DIGITS = 6
"""Significant digits of a turned value: what is measured is what a file holds."""

Law = Literal["times", "from one", "over"]


@dataclass(frozen=True)
class Dial:
    """One parameter of a dial. A factor of 1 leaves a value within its ends as it is; a smaller one keeps more tokens, a larger one fewer.

    Attributes:
        parameter: its name; ``stages.keep`` is a field of every part of ``stages``. Of a list every value moves.
        law: ``times``: the factor times the value, for thresholds and numbers of merges. ``from one``: the distance from 1 is multiplied,
            for shares that stay and for cosines. ``over``: the value over the factor, for counts that stay.
        least: the value goes no lower.
        most: nor higher.
    """

    parameter: str
    law: Law = "times"
    least: float = 0.0
    most: float = math.inf

    @property
    def name(self) -> str:
        """Of the method's parameter that it is, or is a part of."""
        return self.parameter.partition(".")[0]

    def moved(self, value: float, factor: float) -> float:
        """A value under a factor above 0; a whole number stays one."""
        moved = {"times": value * factor, "from one": 1 - (1 - value) * factor, "over": value / factor}[self.law]
        moved = min(max(moved, self.least), self.most)
        return round(moved) if isinstance(value, int) else float(f"{moved:.{DIGITS}g}")


def turned(dials: Sequence[Dial], parameters: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A method's parameters, JSON-able, with its dial turned by a factor above 0."""
    found = dict(parameters)
    for dial in dials:
        if found.get(dial.name) is not None:
            found[dial.name] = _each(found[dial.name], dial.parameter.split(".")[1:], partial(dial.moved, factor=factor))
    return found


def moving(dials: Sequence[Dial], parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The parameters of a dial that a factor moves: those that are given, and not at the end where every token stays."""
    given = dict(parameters)
    return tuple(dial.parameter for dial in dials if any(turned([dial], given, factor) != given for factor in (0.5, 2.0)))


def _each(value: Any, path: Sequence[str], change: Callable[[Any], Any]) -> Any:
    """A parameter with every value on the path changed."""
    if isinstance(value, list):
        return [_each(part, path, change) for part in value]
    if path:
        return {**value, path[0]: _each(value[path[0]], path[1:], change)}
    return change(value)
