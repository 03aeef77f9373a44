"""Where the time of both engines goes, and from where on pruning should pay.

A profile of each engine is folded into classes, and stands beside the work that the formulas count and the least time this machine needs
for it. Profiling slows an engine: the shares are what counts, and ``bench`` gives the times. What no op accounts for is the runtime's
own; in a chain of stages it is the gathers between them.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from tpcompile.backends import backend
from tpcompile.backends.base import Profiled, Profiler
from tpcompile.bundle import Bundle
from tpcompile.chain import ChainSession
from tpcompile.compare.graphview import read_graph
from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.flops import Counts, evaluate
from tpcompile.manifest import Manifest
from tpcompile.timing.breakeven import BreakEven, break_even
from tpcompile.timing.folding import CLASSES, classes, fold, matmul_bytes
from tpcompile.timing.roofline import Roofline, roofline
from tpcompile.timing.stats import as_json

Array = NDArray[np.float64]

NAMES: Mapping[str, tuple[str, str]] = {"onnx": ("model.onnx", "stage{}.onnx"), "openvino": ("openvino_model.xml", "stage{}.xml")}
"""Target -> its graph's file, and a stage's."""


@dataclass(frozen=True, slots=True)
class Share:
    """One engine over the stream, in ms.

    Attributes:
        wall: all of it, while profiled.
        classes: class -> its ops.
        runtime: what no op accounts for.
        flops: of ``matmul`` and ``attention``, by the formulas; empty where they are not known.
        bytes: of weights that products stream.
        floor: the least time of ``matmul`` and ``attention`` on this machine.
    """

    wall: float
    classes: Mapping[str, float]
    runtime: float
    flops: Mapping[str, float]
    bytes: float
    floor: Mapping[str, float]


@dataclass(frozen=True)
class Attribution:
    """Both engines, the machine, and from where on pruning pays."""

    dense: Share
    pruned: Share
    machine: Roofline
    pays: BreakEven | None

    def to_json(self) -> dict[str, object]:
        """Strict JSON."""
        found: dict[str, object] = as_json(self)
        return found

    def text(self) -> str:
        """A table, and the break-even in words."""
        rows = [f"{'class':<12}{'dense ms':>10}{'pruned ms':>11}{'least, dense / pruned':>24}"]
        for name in CLASSES:
            floor = "" if name not in self.dense.floor else f"{self.dense.floor[name]:.1f} / {self.pruned.floor[name]:.1f}"
            rows.append(f"{name:<12}{self.dense.classes[name]:>10.1f}{self.pruned.classes[name]:>11.1f}{floor:>24}")
        rows.append(f"{'runtime':<12}{self.dense.runtime:>10.1f}{self.pruned.runtime:>11.1f}")
        rows.append(f"this machine at best: {self.machine.gflops:.0f} GFLOP/s, {self.machine.gbytes:.1f} GB/s")
        return "\n".join([*rows, *filter(None, [self.words()])])

    def words(self) -> str:
        """From where on pruning should pay; empty where that cannot be told."""
        return _words(self.pays) if self.pays is not None else ""


def _words(pays: BreakEven) -> str:
    seen = f" (measured: {pays.measured_length})" if pays.measured_length else ""
    known = [
        (pays.length, f"from {pays.length} tokens on{seen}"),
        (pays.keep, f"where every site keeps at most {pays.keep or 0:.0%} of the tokens"),
        (pays.batch, "with one sample an inference already" if pays.batch == 1 else f"from {pays.batch} samples an inference on"),
    ]
    said = [text for value, text in known if value is not None]
    checked = f"off by {pays.error:.0%} on samples not fitted on, right about the faster one on {pays.agrees:.0%}"
    return f"Pruning should pay {', '.join(said) or 'nowhere in range'}; {checked}"


def attribute(
    pruned: Bundle, dense: Bundle, samples: Sequence[Sample], counts: Sequence[Counts], threads: int, times: tuple[Array, Array]
) -> Attribution:
    """Profile both engines on the stream.

    Args:
        pruned: the bundle.
        dense: its dense baseline.
        samples: the stream.
        counts: what the pruned engine kept of every sample in it.
        threads: of each engine.
        times: warm ms ``[n]`` of dense and pruned, from ``bench``.

    Raises:
        UsageError: a runtime that says nothing about its ops.
    """
    machine, flops = roofline(threads, pruned.manifest.precision), pruned.manifest.flops
    works = _work(pruned.manifest, counts) if flops.tokens else ({}, {})
    shares = [_share(bundle, samples, work, machine, threads) for bundle, work in zip((dense, pruned), works, strict=True)]
    return Attribution(shares[0], shares[1], machine, break_even(flops, counts, *times))


def _work(manifest: Manifest, counts: Sequence[Counts]) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs of dense and pruned by class: a product of two token sets is attention, with one it is a product with weights."""
    found: tuple[dict[str, float], dict[str, float]] = ({}, {})
    flops = manifest.flops
    for one in counts:
        held = one.held or one.tokens
        full, left = dict.fromkeys(flops.tokens, held), dict(zip(flops.tokens, (held, *one.stored), strict=True))
        for work, formula, sizes in zip(found, (flops.dense, flops.graph), (full, left), strict=True):
            for name, degree in (("matmul", {0, 1}), ("attention", {2})):
                part = [term for term in formula if len(term[1]) in degree]
                work[name] = work.get(name, 0.0) + evaluate(part, sizes)
    return found


def _share(bundle: Bundle, samples: Sequence[Sample], flops: Mapping[str, float], machine: Roofline, threads: int) -> Share:
    manifest = bundle.manifest
    runtime = backend(manifest.target)
    if not isinstance(runtime, Profiler) or manifest.target not in NAMES:
        raise UsageError(f"target {manifest.target} says nothing about its ops", fix="leave out --attribute")
    numbers = [i for i, stage in enumerate(manifest.stages) if stage.outputs] if manifest.form == "staged" else [None]
    names = [bundle.path / (NAMES[manifest.target][number is not None].format(number)) for number in numbers]
    with ExitStack() as opened:
        profiles = (runtime.profile(bundle.path, threads=threads, precision=manifest.precision, stage=number) for number in numbers)
        sessions = [opened.enter_context(closing(profile)) for profile in profiles]
        whole = sessions[0] if manifest.form != "staged" else ChainSession(manifest, sessions)
        for sample in samples:
            whole.run(sample.inputs)
        begin = perf_counter()
        for sample in samples:
            whole.run(sample.inputs)
        wall = (perf_counter() - begin) * 1e3
        return _added(wall, sessions, names, len(samples), flops, machine)


def _added(
    wall: float, sessions: Sequence[Profiled], files: Sequence[Path], runs: int, flops: Mapping[str, float], machine: Roofline
) -> Share:
    """The profiles of all stages together."""
    spent, streamed = dict.fromkeys(CLASSES, 0.0), 0.0
    for session, file in zip(sessions, files, strict=True):
        graph = read_graph(file)
        streamed += matmul_bytes(graph) * runs
        for name, us in fold(session.ops(after=runs), classes(graph)).items():
            spent[name] += us / 1e3
    sizes = {"matmul": streamed, "attention": 0.0}
    floor = {name: machine.floor_ms(work, sizes[name]) for name, work in flops.items()}
    return Share(wall, spent, max(0.0, wall - sum(spent.values())), flops, streamed, floor)
