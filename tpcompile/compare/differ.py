"""What differs between two bundles, or two graphs: manifest, files, ops, weights. Nothing is run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tpcompile import bundle as bundles
from tpcompile.bundle import Bundle
from tpcompile.compare.graphdiff import GraphDiff, compare_graphs
from tpcompile.compare.graphview import Graph, read_graph
from tpcompile.errors import UsageError
from tpcompile.manifest import FileInfo

OUTSIDE = {"schema_version", "files", "parts", "environment", "measured"}
"""Fields of a manifest that are compared otherwise, or that do not say what was built."""
SHOWN = 20
"""Ops and weights of a graph that the text lists."""
TWICE = "openvino_taps.xml"
"""The same graph as ``openvino_model.xml``, with more outputs."""


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field of the manifest, such as ``method.parameters.thresholds[1]``, and its value in A and in B; None where there is none."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file: ``change`` is ``added``, ``removed`` or ``changed``; ``a`` and ``b`` are its hash and size."""

    name: str
    change: str
    a: FileInfo | None
    b: FileInfo | None


@dataclass(frozen=True)
class Difference:
    """The result of ``diff``.

    Attributes:
        a: what was compared.
        b: with what.
        fields: of the manifests, the dense baselines' too where it is not the same difference again.
        environment: versions and hardware the two were built with; they are no part of a bundle's identity.
        files: by name; those of the dense baseline begin with ``dense/``.
        graphs: of every graph whose file, or whose weights' file, differs.
    """

    a: Path
    b: Path
    fields: tuple[FieldChange, ...] = ()
    environment: tuple[FieldChange, ...] = ()
    files: tuple[FileChange, ...] = ()
    graphs: tuple[GraphDiff, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether anything but the environment does."""
        return bool(self.fields or self.files or any(graph.differs for graph in self.graphs))

    def to_json(self) -> dict[str, Any]:
        """A JSON document."""
        files = [
            {"name": f.name, "change": f.change, **{k: v and v.model_dump() for k, v in (("a", f.a), ("b", f.b))}}
            for f in self.files
        ]
        rows = {name: [asdict(row) for row in getattr(self, name)] for name in ("fields", "environment", "graphs")}
        return {"a": str(self.a), "b": str(self.b), "differs": self.differs, **rows, "files": files}

    def text(self) -> str:
        """The differences as lines, by kind."""
        rows = [*self._fields("field", self.fields), *self._files(), *(row for graph in self.graphs for row in _graph(graph))]
        rows += self._fields("built with", self.environment)
        return "\n".join(rows if self.differs else [*rows, "no differences"])

    def _fields(self, head: str, changes: Sequence[FieldChange]) -> Iterator[str]:
        width = max((len(change.field) for change in changes), default=0)
        yield from (f"{head:<11}{change.field:<{width}}  {_value(change.a)} -> {_value(change.b)}" for change in changes)

    def _files(self) -> Iterator[str]:
        for file in self.files:
            sizes = " -> ".join(f"{info.size:,}" for info in (file.a, file.b) if info is not None)
            yield f"{'file':<11}{file.name}  {file.change}, {sizes} B"


def diff(a: str | Path, b: str | Path) -> Difference:
    """Compare two bundles, two ``.onnx`` files, or two ``.pt2`` files.

    Args:
        a: before.
        b: after.

    Raises:
        UsageError: nothing there, or two things that cannot be compared.
        IntegrityError: a bundle's file is not what its manifest says.
        ModelError: a graph cannot be read.
    """
    first, second = Path(a), Path(b)
    kinds = [_kind(path) for path in (first, second)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{first} is {kinds[0]}, {second} is {kinds[1]}", fix="compare two of a kind")
    if first.is_dir():
        return _bundles(bundles.read(first), bundles.read(second))
    return Difference(first, second, graphs=(compare_graphs(first.name, _read(first), _read(second)),))


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        raise UsageError(f"nothing at {path}", fix="pass two bundles, two .onnx files or two .pt2 files")
    if path.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"{path} cannot be compared", fix="pass two bundles, two .onnx files or two .pt2 files")
    return f"an {path.suffix} file"


def _read(path: Path) -> Graph:
    if path.suffix != ".pt2":
        return read_graph(path)
    from tpcompile import subject
    from tpcompile.compare import fxview  # torch is not needed for anything else here

    return fxview.view(subject.read_pt2(path))


def _bundles(a: Bundle, b: Bundle) -> Difference:
    for bundle in (a, b):
        bundle.verify()
    fields = _fields(a, b)
    ours, theirs = _files(a), _files(b)
    files = []
    for name in sorted({*ours, *theirs}):
        old, new = ours.get(name), theirs.get(name)
        if old != new:
            files.append(FileChange(name, "removed" if new is None else "added" if old is None else "changed", old, new))
    environment = _changes(a.manifest.environment, b.manifest.environment, {"created"})
    graphs = [compare_graphs(name, read_graph(a.path / name), read_graph(b.path / name)) for name in _graphs(ours, theirs)]
    return Difference(a.path, b.path, fields, environment, tuple(files), tuple(graphs))


def _fields(a: Bundle, b: Bundle) -> tuple[FieldChange, ...]:
    """What the manifests say, and the dense baselines' where that is not the same again."""
    found = _changes(a.manifest.model_dump(mode="json"), b.manifest.model_dump(mode="json"), OUTSIDE)
    ours, theirs = a.dense, b.dense
    if ours is None or theirs is None:
        return found
    known = {(change.field, repr(change.a), repr(change.b)) for change in found}
    more = _changes(ours.manifest.model_dump(mode="json"), theirs.manifest.model_dump(mode="json"), OUTSIDE)
    fresh = (change for change in more if (change.field, repr(change.a), repr(change.b)) not in known)
    return (*found, *(FieldChange(f"dense.{change.field}", change.a, change.b) for change in fresh))


def _changes(a: Mapping[str, Any], b: Mapping[str, Any], without: set[str]) -> tuple[FieldChange, ...]:
    ours, theirs = ({key: value for key, value in one.items() if key not in without} for one in (a, b))
    return tuple(_compare("", ours, theirs))


def _compare(name: str, a: Any, b: Any) -> Iterator[FieldChange]:
    """Every place where two documents differ; what only one of them has is one change, a polynomial of FLOPs is one value."""
    if name.startswith("flops."):
        a, b = _formula(a), _formula(b)
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _compare(f"{name}.{key}".lstrip("."), a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list):
        for i, (old, new) in enumerate(zip_longest(a, b)):
            yield from _compare(f"{name}[{i}]", old, new)
    elif a != b:
        yield FieldChange(name, a, b)


def _formula(terms: Any) -> Any:
    """``2048 + 128 t1 t1`` for a polynomial; names as they are."""
    texts = [" ".join([f"{term[0]:.12g}", *term[1]]) for term in terms or () if isinstance(term, list)]
    return " + ".join(texts) if texts else terms


def _files(bundle: Bundle) -> dict[str, FileInfo]:
    """Every file, the dense baseline's under ``dense/``."""
    twin = bundle.dense
    return {**bundle.manifest.files, **({f"dense/{name}": info for name, info in twin.manifest.files.items()} if twin else {})}


def _graphs(a: Mapping[str, FileInfo], b: Mapping[str, FileInfo]) -> list[str]:
    """The graphs that both have, where the file or the one with its weights differs."""
    changed = {name for name in {*a, *b} if a.get(name) != b.get(name)}
    shared = [name for name in sorted(a.keys() & b.keys()) if name.endswith((".onnx", ".xml")) and not name.endswith(TWICE)]
    beside = {name: (name, f"{name}.data", str(Path(name).with_suffix(".bin"))) for name in shared}
    return [name for name in shared if changed & set(beside[name])]


def _graph(graph: GraphDiff) -> Iterator[str]:
    counts = [
        f"{verb} {', '.join(f'{kind} {n}' for kind, n in kinds.items())}"
        for verb, kinds in (("more", graph.added), ("fewer", graph.removed))
        if kinds
    ]
    if not graph.differs:
        yield f"{'graph':<11}{graph.file}: the same ops and weights; names or notes may differ"
        return
    yield f"{'graph':<11}{graph.file}: {len(graph.ops)} ops differ" + "".join(f"; {text}" for text in counts)
    yield from _few([f"  {row}" for row in (*graph.interface, *graph.ops)])
    yield f"{'weights':<11}{graph.file}: {graph.equal_weights} equal, {len(graph.weights)} differ"
    yield from _few([f"  {weight}" for weight in graph.weights])


def _few(rows: Sequence[str]) -> Iterator[str]:
    yield from rows[:SHOWN]
    if len(rows) > SHOWN:
        yield f"  ... and {len(rows) - SHOWN} more; --json lists all"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return "none" if value is None else str(value) if value != "" else "''"
