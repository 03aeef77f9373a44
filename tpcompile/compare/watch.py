"""Two sides of a comparison that can be run with their inner values in sight: an engine, a reference, a program at any stage."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.backends import backend
from tpcompile.backends.base import Session
from tpcompile.bundle import Bundle
from tpcompile.compare import fxview
from tpcompile.compare.graphview import Graph, read_graph
from tpcompile.compare.staged import opener, read_staged
from tpcompile.data.samples import Sample, collate, split
from tpcompile.engine import Engine, load
from tpcompile.kept import Kept, compose
from tpcompile.program import Program
from tpcompile.proof.difference import NOISE, TOLERANCE, Difference, compare_outputs
from tpcompile.proof.keptsets import compare_kept

ENGINES = {"onnx": ("model.onnx",), "openvino": ("openvino_taps.xml", "openvino_model.xml")}
"""Target -> the file with the graph that is opened when taps are asked for; the first that is there."""


@dataclass(frozen=True)
class Side:
    """One thing that can be run.

    Attributes:
        name: for people.
        graph: its ops and values.
        outputs: names of what it gives.
        sites: per site, whether it has a score.
        gathered: whether dropped rows are gone, so that each site has an index.
        open: a session that gives the outputs and these values, by name.
        file: the ONNX file it runs, of several the first; None where it runs something else.
        homes: of a staged engine, name of a value -> ``stage1``, or ``gathers before stage1``: what gives it.
        blind: why no inner value can be seen; empty where they can. Then ``graph`` is empty, and only outputs and kept sets are known.
    """

    name: str
    graph: Graph
    outputs: tuple[str, ...]
    sites: tuple[bool, ...]
    gathered: bool
    open: Callable[[Sequence[str]], Session]
    file: Path | None = None
    homes: Mapping[str, str] = field(default_factory=dict)
    blind: str = ""

    def file_of(self, value: str) -> Path | None:
        """The ONNX file that computes a value."""
        if self.file is None or value not in self.homes:
            return self.file
        path = self.file.with_name(f"{self.homes[value]}.onnx")
        return path if path.is_file() else None

    @property
    def taps(self) -> tuple[str, ...]:
        """What its sites decide, by name."""
        kinds = {"keep": (True,) * len(self.sites), "score": self.sites, "index": (self.gathered,) * len(self.sites)}
        return tuple(f"site{i}.{kind}" for i in range(len(self.sites)) for kind, has in kinds.items() if has[i])


def program_side(name: str, program: Program) -> Side:
    """A program of any stage, in eager torch."""
    taps = {f"{site.name}.{kind}": getattr(site, kind) for site in program.sites for kind in ("keep", "score", "index")}
    graph = fxview.view(program.exported, program.output_names, {tap: node for tap, node in taps.items() if node})
    sites = tuple(bool(site.score) for site in program.sites)
    gathered = any(site.index for site in program.sites)
    return Side(name, graph, program.output_names, sites, gathered, partial(_Eager, program, graph.values))


class _Eager(Session):
    """A program as a session; see ``tpcompile.backends.base.Session``."""

    def __init__(self, program: Program, nodes: Mapping[str, str], names: Sequence[str]) -> None:
        self._program, self._nodes = program, {name: nodes[name] for name in (*program.output_names, *names) if name in nodes}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute once."""
        seen = self._program.values(set(self._nodes.values()), **feeds)
        return {name: seen[node].numpy() for name, node in self._nodes.items()}

    def close(self) -> None:
        """Nothing is held."""


def onnx_side(name: str, folder: Path, outputs: tuple[str, ...], sites: tuple[bool, ...], gathered: bool) -> Side:
    """A folder with ``model.onnx``, in ONNX Runtime."""
    file = folder / "model.onnx"
    return Side(name, read_graph(file), outputs, sites, gathered, lambda names: backend("onnx").open(folder, taps=names), file)


def engine_side(bundle: Bundle) -> Side:
    """A bundle's engine, in its own runtime."""
    manifest = bundle.manifest
    name, outputs, sites = str(bundle.path), tuple(output.name for output in manifest.outputs), _scores(bundle)
    if manifest.form == "staged":
        staged = read_staged(bundle)
        first = bundle.path / "stage0.onnx"
        file = first if first in staged.files.values() else None
        return Side(name, staged.graph, outputs, sites, bool(sites), opener(bundle, staged), file, staged.homes)
    files = [file for file in ENGINES.get(manifest.target, ()) if file in manifest.files]
    if not files:
        blind = f"the inner values of an engine for {manifest.target}, form {manifest.form}, cannot be seen"
        return Side(name, Graph((), (), outputs, {}, {}), outputs, sites, False, lambda _: _Plain(load(bundle.path)), blind=blind)
    runtime, graph = backend(manifest.target), bundle.path / files[0]

    def open_(names: Sequence[str]) -> Session:
        return runtime.open(bundle.path, taps=names, precision=manifest.precision)

    return Side(name, read_graph(graph), outputs, sites, bool(sites), open_, graph if graph.suffix == ".onnx" else None)


class _Plain(Session):
    """An engine as a session: its outputs, and what it kept as the taps of a program in masked form."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute once."""
        outputs, kept = self._engine.kept_each(**feeds)
        taps = {}
        for i, site in enumerate(self._engine.manifest.sites):
            taps[f"site{i}.keep"] = np.stack([one.masks[i] for one in kept])
            taps |= {f"site{i}.score": np.stack([one.scores[i] for one in kept])} if site.score else {}
        return {**outputs, **taps}

    def close(self) -> None:
        """See :class:`~tpcompile.engine.Engine`."""
        self._engine.close()


def _scores(bundle: Bundle) -> tuple[bool, ...]:
    return tuple(site.score for site in bundle.manifest.sites)


def reference_side(bundle: Bundle) -> Side:
    """A bundle's masked reference, in ONNX Runtime."""
    outputs = tuple(output.name for output in bundle.manifest.outputs)
    return onnx_side("the masked reference", bundle.reference.parent, outputs, _scores(bundle), False)


# --- what a side gives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Samples that are run together: their numbers, the samples, the inputs."""

    numbers: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def feeds(self) -> dict[str, NDArray[Any]]:
        """The inputs, padded to the longest."""
        return collate(self.samples)


@dataclass(frozen=True, eq=False)
class Seen:
    """What one batch gave.

    Attributes:
        outputs: per sample, by name, without padding.
        kept: per sample, what each site decided; empty without sites.
        positions: per sample and level, int64 ``[K]``: the original position of every stored row; level 0 is the input.
    """

    outputs: tuple[dict[str, NDArray[Any]], ...]
    kept: tuple[Kept, ...]
    positions: tuple[tuple[NDArray[np.int64], ...], ...]


def observe(side: Side, batches: Sequence[Batch], along: Mapping[str, int]) -> list[Seen]:
    """Run every batch, and note outputs and kept tokens.

    Args:
        side: what to run.
        batches: the samples.
        along: output name -> the dim that runs over an input's tokens.
    """
    found = []
    with side.open(side.taps) as session:
        for batch in batches:
            values = session.run(batch.feeds)
            outputs = {name: values[name] for name in side.outputs}
            each = split(outputs, batch.samples, along) if len(batch.samples) > 1 else [outputs]
            length = values["site0.keep"].shape[1] if side.sites else max(row.length for row in batch.samples)
            taps = [{tap: values[tap][b : b + 1] for tap in side.taps} for b in range(len(batch.samples))]
            kept = tuple(compose(row, len(side.sites), length) for row in taps) if side.sites else ()
            found.append(Seen(tuple(each), kept, tuple(_positions(row, len(side.sites), length) for row in taps)))
    return found


def _positions(taps: Mapping[str, NDArray[Any]], sites: int, length: int) -> tuple[NDArray[np.int64], ...]:
    """Where the rows stored after each site stand in the input; a site without an index stores all it sees."""
    levels = [np.arange(length)]
    for i in range(sites):
        index = taps.get(f"site{i}.index")
        levels.append(levels[-1] if index is None else levels[-1][index.reshape(-1)])
    return tuple(levels)


@dataclass(frozen=True, slots=True)
class Law:
    """What counts as equal: see ``tpcompile.proof.parity``."""

    tolerance: float = TOLERANCE
    noise: float = NOISE


@dataclass(frozen=True, slots=True)
class Judged:
    """One sample.

    Attributes:
        number: of the sample.
        verdict: ``equal``, ``noise`` (a token within float noise of its threshold changed sides) or ``differs``.
        what: the output, or ``site2.keep``, that differs most.
        difference: of that output; infinite where kept sets differ.
    """

    number: int
    verdict: str
    what: str = ""
    difference: Difference = field(default_factory=lambda: Difference(0.0, 0.0, 1.0, 0.0))


def judge(batches: Sequence[Batch], got: Sequence[Seen], outputs: Sequence[Seen], kept: Sequence[Seen], law: Law) -> list[Judged]:
    """Compare sample by sample.

    Args:
        batches: the samples.
        got: what is judged.
        outputs: whose outputs are right.
        kept: whose kept sets are right; they are compared where both have sites.
        law: what counts as equal.
    """
    rows = []
    for batch, one, right, truth in zip(batches, got, outputs, kept, strict=True):
        for b, number in enumerate(batch.numbers):
            pair = (one.kept[b], truth.kept[b]) if one.kept and truth.kept else None
            rows.append(_judge(number, one.outputs[b], right.outputs[b], pair, law))
    return rows


def _judge(
    number: int, got: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[Any]], kept: tuple[Kept, Kept] | None, law: Law
) -> Judged:
    flips = compare_kept(*kept, len(kept[1].masks[0]))[0] if kept is not None else ()
    differences = compare_outputs(got, right)
    worst = max(differences, key=lambda name: differences[name].required)
    if any(flip.margin > law.noise for flip in flips):
        hopeless = Difference(differences[worst].max_abs, math.inf, differences[worst].cosine, math.inf)
        return Judged(number, "differs", f"site{flips[0].site}.keep", hopeless)
    if flips and math.isfinite(differences[worst].required):
        return Judged(number, "noise")
    verdict = "differs" if differences[worst].required > law.tolerance else "equal"
    return Judged(number, verdict, worst, differences[worst])
