"""From the dense engine's time to the pruned one's in steps: what the FLOPs promise, and what the promise loses on the way."""

from dataclasses import dataclass

from tpcompile.timing.latency import Latency

OVERHEADS = (("score", "scores"), ("compaction", "positions and gathers"), ("shape", "sizes, casts, copies"))
"""Class of op -> what it is called here."""
PLUS, MINUS = "+", "\u2212"
WIDTH, ROW, LEFT, RIGHT = 640.0, 30.0, 208.0, 62.0
"""Of the picture: its width, a row's height, room for names and for numbers."""


@dataclass(frozen=True, slots=True)
class Step:
    """One bar.

    Attributes:
        name: what it is.
        ms: how much it adds; the whole, of a total.
        total: it stands for itself, and is not added.
        x: where the bar begins, in the picture.
        width: of the bar.
        y: of the row's upper edge.
    """

    name: str
    ms: float
    total: bool
    x: float
    width: float
    y: float

    @property
    def kind(self) -> str:
        """``total``, ``gain`` or ``loss``."""
        return "total" if self.total else "loss" if self.ms > 0 else "gain"

    @property
    def label(self) -> str:
        """Its number, signed where it is a change."""
        number = f"{abs(self.ms):.0f}" if abs(self.ms) >= 100 else f"{abs(self.ms):.1f}"
        return number if self.total else (PLUS if self.ms > 0 else MINUS) + number


def waterfall(latency: Latency) -> tuple[Step, ...]:
    """The steps over the stream, warm, then what new shapes cost; empty where the FLOPs are not known.

    The overheads come from the profile, scaled to the time without one, where ``bench`` attributed it. Everything else is mostly what the
    products lose, as fewer rows use a core less well; without a profile the overheads are in it too.
    """
    if latency.saving is None or not latency.saving.paper or not latency.saving.graph:
        return ()
    dense, warm, cold = latency.warm.dense.total, latency.warm.pruned.total, latency.cold.pruned.total
    paper, graph = dense / latency.saving.paper, dense / latency.saving.graph
    changes = [("FLOPs saved, by the paper", paper - dense), ("rows stored, work moved", graph - paper)]
    changes += (overheads := _overheads(latency))
    rest = warm - graph - sum(ms for _, ms in overheads)
    rows = [("dense, warm", dense, True), *((name, ms, False) for name, ms in changes), ("everything else", rest, False)]
    rows += [("pruned, warm", warm, True), ("new shapes", cold - warm, False), ("pruned, cold", cold, True)]
    return _placed(rows)


def _overheads(latency: Latency) -> list[tuple[str, float]]:
    found = latency.attribution
    if found is None or not found.pruned.wall or not found.dense.wall:
        return []
    scale = latency.warm.pruned.total / found.pruned.wall, latency.warm.dense.total / found.dense.wall
    return [(name, found.pruned.classes[key] * scale[0] - found.dense.classes[key] * scale[1]) for key, name in OVERHEADS]


def _placed(rows: list[tuple[str, float, bool]]) -> tuple[Step, ...]:
    """The rows with their bars; a total begins at nothing, a change where the one before ended."""
    ends, level = [], 0.0
    for _, ms, total in rows:
        start = 0.0 if total else level
        level = start + ms
        ends.append((min(start, level), max(start, level)))
    low, high = min(0.0, *(end[0] for end in ends)), max(end[1] for end in ends)
    scale = (WIDTH - LEFT - RIGHT) / (high - low)
    return tuple(
        Step(name, ms, total, LEFT + (begin - low) * scale, max(1.0, (end - begin) * scale), i * ROW)
        for i, ((name, ms, total), (begin, end)) in enumerate(zip(rows, ends, strict=True))
    )
