"""How far two sets of outputs are apart, and how far they may be: the law of design.md 4.7, with a tolerance for each output."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.errors import UsageError
from tpcompile.proof.agreement import cosine

TOLERANCE = 1e-5
"""The law: ``|engine - masked| <= TOLERANCE * max(1, max|masked|)`` in float32, given equal kept sets."""

NOISE = 1e-6
"""Float32 noise of a score, relative to the largest score of its site."""

Bound = float | Mapping[str, float]
"""One tolerance for every output, or one by name or pattern (``logits``, ``*_hidden``); the last that fits counts."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What one output may be off by: the larger of ``atol`` and ``rtol`` times the largest reference value."""

    atol: float
    rtol: float


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What every output may be off by.

    Attributes:
        default: for outputs that no pattern of ``atol`` fits.
        atol: pattern and absolute tolerance; the last that fits counts.
        rtol: pattern and relative tolerance; where none fits it is the absolute one, which is the law.
    """

    default: float = TOLERANCE
    atol: tuple[tuple[str, float], ...] = ()
    rtol: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, default: float, atol: Bound | None = None, rtol: Bound | None = None) -> "Tolerances":
        """From what a caller gives: a number, a number for each name or pattern, or nothing."""
        return cls(default, _pairs(atol), _pairs(rtol))

    def allowed(self, name: str) -> Allowed:
        """For one output."""
        atol = _last(self.atol, name, self.default)
        return Allowed(atol, _last(self.rtol, name, atol))

    def check(self, names: Iterable[str]) -> None:
        """Refuse a tolerance that is not positive and finite, and a pattern that fits no output.

        Raises:
            UsageError: one of the two.
        """
        known = list(names)
        for pattern, value in (("*", self.default), *self.atol, *self.rtol):
            if not 0 < value < math.inf:
                raise UsageError(f"the tolerance {value} is not positive and finite", fix="the law's own is 1e-5")
            if known and not any(fnmatchcase(name, pattern) for name in known):
                raise UsageError(f"no output is called {pattern!r}", fix=f"the outputs are {', '.join(known)}")


def _pairs(bound: Bound | None) -> tuple[tuple[str, float], ...]:
    if bound is None:
        return ()
    return tuple(bound.items()) if isinstance(bound, Mapping) else (("*", bound),)


def _last(pairs: Iterable[tuple[str, float]], name: str, default: float) -> float:
    return next((value for pattern, value in reversed(list(pairs)) if fnmatchcase(name, pattern)), default)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one output is from the reference.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: largest difference relative to the reference's own value, where that is not 0.
        cosine: of the flattened outputs; 1 for two zero vectors.
        required: the smallest absolute tolerance under which the law holds; infinite when a value is not finite or a shape differs.
        mean_abs: mean absolute difference.
    """

    max_abs: float
    max_rel: float
    cosine: float
    required: float
    mean_abs: float = 0.0


def compare_outputs(
    got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], law: Tolerances | None = None
) -> dict[str, Difference]:
    """Every output of ``expected``; one that is missing, of another shape or not finite requires an infinite tolerance.

    Args:
        got: what the engine gave.
        expected: what the reference gave.
        law: says how an output's relative tolerance stands to its absolute one; without it they are the same number.
    """
    found = {}
    for name, value in expected.items():
        allowed = (law or Tolerances()).allowed(name)
        found[name] = _difference(got.get(name), value, allowed.rtol / allowed.atol)
    return found


def _difference(got: NDArray[Any] | None, expected: NDArray[Any], scale: float) -> Difference:
    hopeless = Difference(math.inf, math.inf, math.nan, math.inf, math.inf)
    if got is None or got.shape != expected.shape:
        return hopeless
    a, b = got.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return hopeless
    gap, size = np.abs(a - b), np.abs(b)
    max_abs = float(gap.max(initial=0.0))
    relative = gap[size > 0] / size[size > 0]
    required = max_abs / max(1.0, scale * float(size.max(initial=0.0)))
    return Difference(max_abs, float(relative.max(initial=0.0)), cosine(a, b), required, float(gap.mean()) if gap.size else 0.0)


def worst(each: Iterable[Mapping[str, Difference]]) -> dict[str, Difference]:
    """The worst figure of each kind, by output."""
    rows = list(each)
    found = {}
    for name in rows[0] if rows else ():
        some = [row[name] for row in rows]
        found[name] = Difference(
            max(d.max_abs for d in some), max(d.max_rel for d in some), min(d.cosine for d in some), max(d.required for d in some),
            max(d.mean_abs for d in some),
        )  # fmt: skip
    return found
