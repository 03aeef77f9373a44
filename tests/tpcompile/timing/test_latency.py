"""Latency: order, phases, verdicts. Engines say what they take, so nothing here depends on real time."""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from tpcompile.data.load import Sample
from tpcompile.errors import InputError, UsageError
from tpcompile.flops import Counts
from tpcompile.timing.latency import bench
from tpcompile.timing.targets import Slo
from tpcompile.timing.turns import Tick

COUNT = 40


@dataclass(frozen=True)
class Formulas:
    tokens: tuple = ("t0", "t1")
    paper: tuple = ((1.0, ("t1",)),)
    graph: tuple = ((1.0, ("t1",)), (1.0, ("t0",)))
    dense: tuple = ((1.0, ("t0",)),)


class Machine:
    """Makes engines that take the time they say, and logs who ran what."""

    def __init__(self):
        self.log, self.opened, self.closed = [], [], []

    def engine(self, name, cost, cold=1.0, fail=False, wait=lambda tokens: 0.0, sleep=0.0, data=None):
        """An opener; ``cost(tokens, session)`` in ms, times ``cold`` for a new length; beside it ms in line for a core, and asleep."""
        machine, data = self, DATA if data is None else data

        class Engine:
            def __init__(self):
                machine.opened.append(name)
                self.seen, self.session = set(), machine.opened.count(name) - 1

            def __call__(self, index):
                if fail:
                    raise RuntimeError("broken")
                n = data[index].inputs["input_ids"].shape[1]
                machine.log.append((name, n))
                busy = int(cost(n, self.session) * (1.0 if n in self.seen else cold) * 1e6)
                queued = int(wait(n) * 1e6)
                self.seen.add(n)
                return Tick(busy + queued + int(sleep * 1e6), busy, queued, 100.0 if name == "dense" else 60.0)

            def close(self):
                machine.closed.append(name)

        return Engine


@pytest.fixture
def machine():
    return Machine()


DATA = [Sample(text="", inputs={"input_ids": np.ones((1, n), dtype=np.int64)}) for n in range(10, 10 + COUNT)]


def steady(factor):
    return lambda n, session: n * factor


def run(machine, factor=0.5, data=DATA, cold=1.0, **options):
    pruned, dense = machine.engine("pruned", steady(factor), cold, data=data), machine.engine("dense", steady(1.0), data=data)
    return bench(pruned, dense, data, **options)


def test_every_pass_keeps_the_order_and_alternates(machine):
    run(machine, repeats=2)
    for name in ("dense", "pruned"):
        assert [n for who, n in machine.log if who == name] == [sample.length for sample in DATA] * 4
    starts = [[machine.log[2 * COUNT * number + i][0] for i in (0, 2, 4)] for number in range(4)]
    assert ["".join(name[0] for name in start) for start in starts] == ["dpd", "pdp", "pdp", "dpd"]
    assert [machine.log[i][0] for i in range(8)] == ["dense", "pruned", "pruned", "dense"] * 2
    assert machine.opened == ["dense", "pruned", "pruned", "dense"]  # fresh engines each time, neither always first
    assert sorted(machine.closed) == sorted(machine.opened)


def test_cold_and_warm_are_apart(machine):
    found = run(machine, cold=4.0)
    assert found.cold.speedup.value == pytest.approx(0.5)
    assert found.warm.speedup.value == pytest.approx(2.0)
    assert found.cold.slower == COUNT
    assert found.warm.slower == 0
    assert found.noise == {"dense": 0.0, "pruned": 0.0, "ratio": 0.0}
    cold, warm = found.sentences()
    assert "pruned is SLOWER than dense, 2.00x the time" in cold
    assert "slower on 40 samples" in cold
    assert "pruned is 2.00x faster" in warm


def test_figures_and_raw_times(machine):
    found = run(machine)
    total = sum(range(10, 10 + COUNT))
    assert found.warm.dense.total == pytest.approx(total)
    assert found.warm.dense_ms.shape == found.cold.pruned_cpu_ms.shape == (4, COUNT)
    assert found.per_second["dense"] == pytest.approx(1e3 * COUNT / total)
    assert found.warm.dense.p90 is not None
    assert found.warm.dense.p95 is None  # 40 samples do not support it
    assert found.shapes == COUNT
    assert found.memory == {"dense": 100.0, "pruned": 60.0}


def test_realisation_is_speedup_over_flops_ratio(machine):
    counts = [Counts(sample.length, (sample.length // 2,), (sample.length // 2,)) for sample in DATA]
    found = run(machine, flops=Formulas(), counts=counts)
    ratio = sum(c.tokens for c in counts) / sum(c.alive[0] for c in counts)
    assert found.saving.paper == pytest.approx(ratio)
    assert found.warm.realisation["paper"] == pytest.approx(2.0 / ratio)
    assert found.saving.graph < 1
    assert found.to_json()["flops_ratio"]["paper"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("options", "verdict", "code"),
    [
        ({}, "PASSED", 0),
        ({"min_speedup": 1.9}, "PASSED", 0),
        ({"min_speedup": 2.1}, "FAILED", 8),
        ({"min_speedup": 1.9, "cold": 4.0}, "FAILED", 8),
        ({"min_speedup": 1.9, "cold": 4.0, "phases": ("warm",)}, "PASSED", 0),
        ({"slo": Slo.parse("p90<=25ms")}, "PASSED", 0),
        ({"slo": Slo.parse("p90<=10ms")}, "FAILED", 8),
        ({"slo": Slo.parse("p90<=22ms")}, "INCONCLUSIVE", 10),
        ({"slo": Slo.parse("p99<=1s")}, "INCONCLUSIVE", 10),
        ({"min_speedup": 2.1, "slo": Slo.parse("p99<=1s")}, "FAILED", 8),
        ({"min_speedup": 1.5, "data": DATA[:3]}, "INCONCLUSIVE", 10),
    ],
)
def test_verdicts(machine, options, verdict, code):
    found = run(machine, **options)
    assert (found.verdict, found.exit_code) == (verdict, code), found.reason


def test_reasons_say_what_is_missing(machine):
    assert "needs 299 samples, there are 40" in run(machine, slo=Slo.parse("p99<=1s")).reason
    assert "cold speed-up 2.00 (2.00 to 2.00), asked for 2.1" in run(machine, min_speedup=2.1).reason


def test_sessions_that_differ_widen_the_interval(machine):
    """Sessions that differ by 30 % cannot tell a speed-up of 2.0 from one of 1.9."""
    moody = machine.engine("pruned", lambda n, session: n * 0.5 * (1.3 if session == 3 else 1.0))
    found = bench(moody, machine.engine("dense", steady(1.0)), DATA, min_speedup=1.9)
    assert found.noise["pruned"] == pytest.approx(0.3)
    assert found.warm.speedup.low < 1.9 < found.warm.speedup.high
    assert found.verdict == "INCONCLUSIVE"


def test_a_drift_of_the_whole_machine_cancels_and_is_told(machine):
    """Both engines 10 % slower every session: the ratio stands, a latency target does not."""

    def drift(factor):
        return lambda n, session: n * factor * 1.1**session

    options = {"min_speedup": 1.9, "slo": Slo.parse("p90<=30ms")}
    found = bench(machine.engine("pruned", drift(0.5)), machine.engine("dense", drift(1.0)), DATA, **options)
    assert found.noise["ratio"] == pytest.approx(0)
    assert found.drift == pytest.approx(1.1**3 - 1)
    assert "the machine became 33% slower on the way, for both" in found.sentences()
    assert found.verdict == "INCONCLUSIVE"
    assert "speed-up" not in found.reason


def test_time_without_a_core_is_left_out_of_the_comparison(machine):
    """Another program takes the core during every second length of the pruned engine: the CPU's clock knows, the wall's does not."""
    disturbed = machine.engine("pruned", steady(0.5), wait=lambda n: 200.0 * (n % 2))
    found = bench(disturbed, machine.engine("dense", steady(1.0)), DATA, min_speedup=1.9, slo=Slo.parse("p90<=50ms"))
    assert found.warm.speedup.value == pytest.approx(2.0)
    assert found.warm.pruned_ms.max() > 200 > 30 > found.warm.pruned_cpu_ms.max()
    assert (found.ruler, found.waited > 0.5) == ("cpu", True)
    assert "other programs held the core for 69% of the time" in found.sentences()[2]
    assert found.verdict == "INCONCLUSIVE"  # the target would be met on a core of one's own; it was not seen to be
    assert "p90" in found.reason


def test_an_engine_that_works_elsewhere_is_timed_by_the_wall(machine):
    """On a GPU, say: neither on a core nor in line for one."""
    found = bench(machine.engine("pruned", steady(0.01), sleep=10.0), machine.engine("dense", steady(1.0)), DATA)
    assert (found.ruler, found.waited) == ("wall", 0.0)
    assert found.warm.pruned.p50 == pytest.approx(10.3, abs=0.1)


def test_a_target_is_about_calls_not_about_medians(machine):
    """One session in four takes 60 ms a call: the medians over passes do not know it, the callers did."""
    moody = machine.engine("pruned", lambda n, session: 60.0 if session == 3 else n * 0.5)
    found = bench(moody, machine.engine("dense", steady(1.0)), DATA, slo=Slo.parse("p90<=40ms"))
    assert found.warm.pruned.p90 < 40
    assert (found.verdict, "between" in found.reason, "60.00 ms" in found.reason) == ("INCONCLUSIVE", True, True)


def test_small_differences_have_no_name(machine):
    assert "cold: no clear difference, speed-up 1.01" in run(machine, factor=1 / 1.008).sentences()[0]
    assert "1.01x faster" in run(machine, factor=1 / 1.008, min_effect=0.005).sentences()[0]


def test_shapes_have_rows(machine):
    rows = run(machine, cold=4.0).by_shape
    assert len(rows) == 8
    assert sum(row.count for row in rows) == COUNT
    assert (rows[0].low, rows[-1].high) == (10, 49)
    assert all(a.high < b.low for a, b in itertools.pairwise(rows))
    assert (rows[0].cold, rows[0].warm) == (pytest.approx(0.5), pytest.approx(2.0))
    few = run(machine, data=DATA[:3] * 5).by_shape
    assert [(row.low, row.high, row.count, row.dense) for row in few] == [(n, n, 5, n) for n in (10, 11, 12)]


def test_engines_are_closed_when_one_breaks(machine):
    with pytest.raises(RuntimeError, match="broken"):
        bench(machine.engine("pruned", steady(1.0), fail=True), machine.engine("dense", steady(1.0)), DATA)
    assert sorted(machine.closed) == ["dense", "pruned"]


@pytest.mark.parametrize(
    ("text", "quantile", "limit"), [("p95<=8ms", 0.95, 8.0), ("p50 < 0.5s", 0.5, 500.0), ("p99=750us", 0.99, 0.75)]
)
def test_slo_is_read(text, quantile, limit):
    assert Slo.parse(text) == Slo(quantile, limit)


@pytest.mark.parametrize("text", ["", "p95", "p95>=8ms", "p42<=8ms", "p95<=8", "mean<=8ms", "p95<=-1ms"])
def test_other_slos_are_refused(text):
    with pytest.raises(UsageError, match="not a latency target") as caught:
        Slo.parse(text)
    assert "p95<=8ms" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"data": []}, InputError),
        ({"repeats": 1}, UsageError),
        ({"confidence": 1.0}, UsageError),
        ({"min_speedup": 0.0}, UsageError),
        ({"min_speedup": math.nan}, UsageError),
        ({"flops": Formulas()}, UsageError),
    ],
)
def test_bad_calls(machine, options, error):
    with pytest.raises(error) as caught:
        run(machine, **options)
    assert caught.value.fix
    assert not machine.opened


def test_json_is_strict(machine):
    document = json.loads(json.dumps(run(machine, data=DATA[:3]).to_json(), allow_nan=False))
    assert document["warm"]["speedup"]["high"] is None
    assert len(document["warm"]["dense_ms"]) == 4


def test_text_has_every_figure(machine):
    counts = [Counts(sample.length, (sample.length // 2,), (sample.length // 2,)) for sample in DATA]
    lines = run(machine, flops=Formulas(), counts=counts).text().splitlines()
    assert lines[0].startswith("cold: pruned is 2.00x faster")
    assert lines[2] == "cold dense   sum 1180 ms, p50 29.50, p90 45.10"
    assert lines[6].startswith("FLOPs ratio by paper 2.03, realised 0.98 cold, 0.98 warm")
    assert lines[-1] == "40 distinct lengths; warm passes differ by: dense 0.0%, pruned 0.0%, ratio 0.0%"
