"""Steps from dense to pruned: they add up, and say which way they go."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from tpcompile.flops import Saving
from tpcompile.report.waterfall import LEFT, WIDTH, waterfall
from tpcompile.timing.attribution import Share


def phase(dense, pruned):
    return SimpleNamespace(dense=SimpleNamespace(total=dense), pruned=SimpleNamespace(total=pruned))


def share(wall, **classes):
    return Share(wall, {"score": 0.0, "compaction": 0.0, "shape": 0.0, **classes}, 0.0, {}, 0.0, {})


@dataclass
class Timed:
    """As much of a Latency as is read."""

    saving: Saving | None = field(default_factory=lambda: Saving(400.0, 100.0, 400.0, 80.0))
    attribution: object = None
    warm: object = field(default_factory=lambda: phase(1000.0, 300.0))
    cold: object = field(default_factory=lambda: phase(1100.0, 420.0))


def test_steps_add_up():
    steps = waterfall(Timed())
    assert [(step.name, round(step.ms), step.kind) for step in steps] == [
        ("dense, warm", 1000, "total"),
        ("FLOPs saved, by the paper", -750, "gain"),
        ("rows stored, work moved", -50, "gain"),
        ("everything else", 100, "loss"),
        ("pruned, warm", 300, "total"),
        ("new shapes", 120, "loss"),
        ("pruned, cold", 420, "total"),
    ]
    assert [step.label for step in steps[:2]] == ["1000", "\u2212750"]
    assert all(step.x >= LEFT and step.x + step.width <= WIDTH for step in steps)
    assert steps[3].x == pytest.approx(steps[2].x)  # goes up from where the one before went down to


def test_overheads_come_from_the_profile_scaled_to_real_time():
    """The profile took twice as long as the stream: its milliseconds count half."""
    told = SimpleNamespace(dense=share(2000.0, shape=20.0), pruned=share(600.0, score=40.0, compaction=60.0, shape=20.0))
    steps = {step.name: step.ms for step in waterfall(Timed(attribution=told))}
    assert steps["scores"] == pytest.approx(20)
    assert steps["positions and gathers"] == pytest.approx(30)
    assert steps["sizes, casts, copies"] == pytest.approx(0)
    assert steps["everything else"] == pytest.approx(50)


def test_without_formulas_there_are_no_steps():
    assert waterfall(Timed(saving=None)) == ()
    assert waterfall(Timed(saving=Saving(0.0, 0.0, 0.0, 0.0))) == ()
