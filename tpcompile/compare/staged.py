"""A staged bundle as ``bisect`` looks at it: one graph over all stages and the gathers between them, with every inner value in reach."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tpcompile.backends import backend
from tpcompile.backends.base import Session
from tpcompile.bundle import Bundle
from tpcompile.chain import ChainSession, open_chain
from tpcompile.compare.graphview import Graph, Op, Weight, read_graph
from tpcompile.manifest import StageInfo

SUFFIXES = (".onnx", ".xml")
GATHERS = "gathers before "


@dataclass(frozen=True)
class Staged:
    """The stages as one graph.

    Attributes:
        graph: their ops and the gathers, in the order they run.
        homes: name of a value -> ``stage1``, or ``gathers before stage1``: what gives it.
        files: ``stage1`` -> its file.
    """

    graph: Graph
    homes: Mapping[str, str]
    files: Mapping[str, Path]


def read_staged(bundle: Bundle) -> Staged:
    """Read the stages of a bundle.

    Raises:
        ModelError: a file cannot be read.
    """
    files = dict(_files(bundle))
    joined = _Joined()
    for number, stage in enumerate(bundle.manifest.stages):
        name = f"stage{number}"
        joined.gathers(name, stage)
        if name in files:
            joined.stage(name, read_graph(files[name]))
    inputs = tuple(tensor.name for tensor in bundle.manifest.inputs)
    outputs = tuple(tensor.name for tensor in bundle.manifest.outputs)
    return Staged(Graph(tuple(joined.ops), inputs, outputs, joined.values, joined.weights), joined.homes, files)


def _files(bundle: Bundle) -> Iterator[tuple[str, Path]]:
    for number in range(len(bundle.manifest.stages)):
        for suffix in SUFFIXES:
            if f"stage{number}{suffix}" in bundle.manifest.files:
                yield f"stage{number}", bundle.path / f"stage{number}{suffix}"


class _Joined:
    """Graphs put one behind the other; ids are told apart by stage, values that travel keep theirs."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: dict[str, str] = {}
        self.weights: dict[str, Weight] = {}
        self.homes: dict[str, str] = {}

    def gathers(self, name: str, stage: StageInfo) -> None:
        """What the host does before a stage."""
        for step in stage.steps:
            reads = tuple(self.values.get(value, value) for value in step.reads)
            self.ops.append(Op(step.op, str(list(step.numbers)), reads, (step.gives,)))
            self._know(step.gives, step.gives, GATHERS + name)

    def stage(self, name: str, graph: Graph) -> None:
        """One stage's own ops."""
        known = {value: self.values.get(value, value) for value in graph.inputs}

        def global_(key: str) -> str:
            return known.get(key, key if not key or key.startswith("=") else f"{name}/{key}")

        for op in graph.ops:
            self.ops.append(replace(op, inputs=tuple(map(global_, op.inputs)), outputs=tuple(map(global_, op.outputs))))
        for value, key in graph.values.items():
            if value not in graph.inputs:
                self._know(value, global_(key), name)
        self.weights |= {global_(key): weight for key, weight in graph.weights.items()}

    def _know(self, value: str, key: str, home: str) -> None:
        """What is computed again in a later stage is the first one's."""
        self.values.setdefault(value, key)
        self.homes.setdefault(value, home)


def opener(bundle: Bundle, staged: Staged) -> Callable[[Sequence[str]], ChainSession]:
    """What opens the chain with these values in sight, wherever they are computed."""
    runtime, manifest = backend(bundle.manifest.target), bundle.manifest
    travelling = {tensor.name for stage in manifest.stages for tensor in stage.outputs}

    def open_(names: Sequence[str]) -> ChainSession:
        inner = [name for name in names if name not in travelling and staged.homes.get(name) in staged.files]

        def one(number: int) -> Session:
            taps = [name for name in inner if staged.homes[name] == f"stage{number}"]
            return runtime.open(bundle.path, taps=taps, precision=manifest.precision, stage=number)

        return open_chain(manifest, one, inner).tapped(tuple(names))

    return open_
