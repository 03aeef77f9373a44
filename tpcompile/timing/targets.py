"""Targets of ``bench``: what must be reached, and whether what was measured reaches it, misses it, or cannot tell."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpcompile.errors import Inconclusive, TargetMissed, UsageError
from tpcompile.timing.stats import Interval, bounds, least

SLO = re.compile(r"p(50|90|95|99)\s*(?:<=?|=)\s*(\d+(?:\.\d+)?)\s*(us|ms|s)")
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
VERDICTS = {"PASSED": 0, "INCONCLUSIVE": Inconclusive.exit_code, "FAILED": TargetMissed.exit_code}
"""Verdict to exit code, best first."""

Judged = tuple[str, str]
"""A verdict and its reason."""


@dataclass(frozen=True, slots=True)
class Slo:
    """A latency target for one percentile of the pruned engine, such as ``p95<=8ms`` or ``p95=8ms``."""

    quantile: float
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read ``p95<=8ms``; percentiles 50, 90, 95, 99; units us, ms, s.

        Raises:
            UsageError: another form.
        """
        match = SLO.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"{text!r} is not a latency target", fix="write p95<=8ms: p50, p90, p95 or p99, and us, ms or s")
        return cls(int(match[1]) / 100, float(match[2]) * UNITS[match[3]])

    def __str__(self) -> str:
        return f"p{self.quantile * 100:.0f}<={self.limit:g}ms"

    def judge(self, phase: str, wall: NDArray[np.float64], own: NDArray[np.float64], confidence: float) -> Judged:
        """Hold it against the calls of the pruned engine: met where every pass meets it, missed where every pass misses it.

        Args:
            phase: ``cold`` or ``warm``, for the reason.
            wall: ms ``[passes, n]`` by the wall clock: with these it is met.
            own: ms ``[passes, n]`` without what other programs took: with these it is missed.
            confidence: of either side, in a pass.
        """
        high = max(bounds(one, self.quantile, confidence)[1] for one in wall)
        low = min(bounds(one, self.quantile, confidence)[0] for one in own)
        reason = f"{phase} p{self.quantile * 100:.0f} between {low:.2f} and {high:.2f} ms, asked for {self}"
        if not np.isfinite(high):
            reason += f"; it needs {least(self.quantile, confidence)} samples, there are {wall.shape[1]}"
        return _side(high <= self.limit, low > self.limit), reason


def judge_speedup(phase: str, ratio: Interval, wanted: float, count: int) -> Judged:
    """Hold a measured speed-up over ``count`` samples against the one asked for."""
    reason = f"{phase} speed-up {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), asked for {wanted:g}"
    if not np.isfinite(ratio.high):
        reason += f"; too few samples to bound it: {count}"
    return _side(ratio.low >= wanted, ratio.high < wanted), reason


def worst(judged: Sequence[Judged]) -> Judged:
    """The worst verdict and its reasons; PASSED where nothing was asked for."""
    if not judged:
        return "PASSED", "measured; no target was set"
    order = list(VERDICTS)
    verdict = max((entry[0] for entry in judged), key=order.index)
    return verdict, "; ".join(reason for entry, reason in judged if entry == verdict)


def _side(passed: bool, failed: bool) -> str:
    return "PASSED" if passed else "FAILED" if failed else "INCONCLUSIVE"
