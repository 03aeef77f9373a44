"""OpenVINO: target ``openvino``. Writes ``openvino_model.xml/.bin``, and ``openvino_taps.xml`` where the model has taps.

Why two graphs on one weights file: OpenVINO drops what no output needs, when it converts and when it reads, so a tap's name
cannot be counted on (``site0.index`` is lost as soon as nothing but the tap reads it). The model is therefore converted with the
taps as outputs and saved as ``openvino_taps.xml``; the plain file is the same text without those outputs. What proves the engine
is the engine.

The stages of a chain are ``stage0.xml/.bin``, ``stage1.xml/.bin``, ...: a reader finds weights by the graph's own name, so a weight that
two stages read stands in both files.
"""

import re
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tpcompile.backends.base import ANY, Availability, Extent, OpTime, Session, Shareable, without_choice
from tpcompile.backends.copies import Copies
from tpcompile.backends.files import data_files, place, read_graph
from tpcompile.backends.settle import settle
from tpcompile.compat import return_memory
from tpcompile.errors import BackendUnavailable, BuildFailed, UsageError
from tpcompile.manifest import TAP

PLAIN, TAPPED, WEIGHTS = "openvino_model.xml", "openvino_taps.xml", "openvino_model.bin"
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f32"}
"""Precision -> what the CPU plugin computes in. ``fp16`` is storage only: half the file, float32 arithmetic."""
NUMBERED = re.compile(r"[A-Za-z]\w*_\d+")


class OpenVino:
    """Builds OpenVINO IR and opens it on the CPU plugin with the latency hint."""

    name: ClassVar[str] = "openvino"
    profiled: ClassVar[bool] = False
    verified_on: ClassVar[tuple[str, ...]] = ("cpu",)

    def probe(self) -> Availability:
        """See :class:`~tpcompile.backends.base.Backend`."""
        try:
            openvino = _import()
            devices = tuple(openvino.Core().available_devices)
        except (ImportError, OSError, RuntimeError) as error:
            return Availability(False, reason=f"openvino cannot be used: {error}", fix="pip install 'tpcompile[openvino]'")
        if "CPU" not in devices:
            return Availability(False, openvino.__version__, "openvino has no CPU device", "reinstall openvino", devices)
        return Availability(True, version=openvino.__version__, devices=devices)

    def targets(self, precision: str, capabilities: Sequence[str]) -> tuple[str, ...]:
        """See :class:`~tpcompile.backends.base.Backend`."""
        _hint(precision)
        return without_choice(self.name, capabilities)

    def build(self, model: Path, out: Path, precision: str, stage: int | None = None, extent: Extent = ANY) -> None:
        """See :class:`~tpcompile.backends.base.Backend`. Compiles once: what the plugin refuses must fail here, not at load."""
        _hint(precision)
        openvino = _runtime()
        with tempfile.TemporaryDirectory(dir=out, prefix=".convert") as folder:
            scratch = Path(folder)
            names, taps = _expose(model, scratch / "model.onnx")
            try:
                graph = openvino.convert_model([[scratch / "model.onnx"]])  # a bare path would be split at its commas
                graph.set_rt_info(model.name, ["conversion_parameters", "input_model"])  # not the folder, which is gone
                settle(graph, HINTS[precision])
                _label(graph, names)
                openvino.save_model(graph, scratch / "ir.xml", compress_to_fp16=precision == "fp16")
            except Exception as error:  # the converter raises bare RuntimeError and Exception
                raise _refused(model.name, error) from error
            plain, weights = _files(stage)
            (scratch / "ir.bin").replace(out / weights)
            (out / plain).write_bytes(_without(scratch / "ir.xml", taps))
            if taps:
                (scratch / "ir.xml").replace(out / TAPPED)
            del graph  # with its weights, before the plugin makes its own
        return_memory()
        self.open(out, precision=precision, stage=stage).close()

    def open(
        self,
        folder: Path,
        *,
        taps: Sequence[str] = (),
        threads: int = 0,
        precision: str = "fp32",
        stage: int | None = None,
        callers: int = 1,
    ) -> "OpenVinoSession":
        """See :class:`~tpcompile.backends.base.Backend`."""
        return OpenVinoSession(*self._compiled(folder, taps, threads * callers, precision, stage, **_streams(callers)))

    def open_copies(self, folder: Path, copies: int, *, threads: int = 0, precision: str = "fp32", callers: int = 1) -> Session:
        """See :class:`~tpcompile.backends.base.Copier`. One model in memory is compiled so many times: its weights' file is shared."""
        made = self._compiled(folder, (), threads * callers, precision, None, copies, **_streams(callers))
        return Copies([OpenVinoSession(one) for one in made])

    def profile(self, folder: Path, *, threads: int = 0, precision: str = "fp32", stage: int | None = None) -> "OpenVinoProfile":
        """See :class:`~tpcompile.backends.base.Profiler`."""
        return OpenVinoProfile(*self._compiled(folder, (), threads, precision, stage, PERF_COUNT=True))

    def _compiled(
        self, folder: Path, taps: Sequence[str], threads: int, precision: str, stage: int | None, copies: int = 1, **more: Any
    ) -> list[Any]:
        """The compiled model, so many times."""
        hint = _hint(precision)
        openvino = _runtime()
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **more}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            plain, weights = _files(stage)
            graph = core.read_model(folder / (TAPPED if taps and stage is None else plain), folder / weights)
        except RuntimeError as error:
            raise _refused(folder.name, error) from error
        if taps:
            _select(graph, taps, stage is None)
        try:
            compiled = [core.compile_model(graph, "CPU", config) for _ in range(copies)]
        except RuntimeError as error:
            raise _refused(folder.name, error) from error
        _require(compiled[0], hint)
        return compiled


class OpenVinoSession(Shareable):
    """One compiled model with one request; see :class:`~tpcompile.backends.base.Session`."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._names = [port.get_any_name() for port in compiled.outputs]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :class:`~tpcompile.backends.base.Session`."""
        if self._request is None:
            raise UsageError("the session is closed", fix="open the engine again")
        results = self._request.infer(dict(feeds))
        return {name: np.array(results[i]) for i, name in enumerate(self._names)}

    def share(self) -> "OpenVinoSession":
        """See :class:`~tpcompile.backends.base.Shareable`: a request of its own."""
        return OpenVinoSession(self._compiled)

    def close(self) -> None:
        """See :class:`~tpcompile.backends.base.Session`."""
        self._compiled = self._request = None


class OpenVinoProfile(OpenVinoSession):
    """A session with performance counters; see :class:`~tpcompile.backends.base.Profiled`."""

    def __init__(self, compiled: Any) -> None:
        super().__init__(compiled)
        self._runs: list[list[OpTime]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute once, and read the counters."""
        outputs = super().run(feeds)
        counted = ((one.node_name, one.node_type, one.real_time.total_seconds() * 1e6) for one in self._request.profiling_info)
        self._runs.append([OpTime(*one) for one in counted])
        return outputs

    def ops(self, after: int = 0) -> tuple[OpTime, ...]:
        """Add the runs up."""
        self.close()
        found = dict[tuple[str, str], float]()
        for one in (one for run in self._runs[after:] for one in run if one.us):
            found[one.name, one.kind] = found.get((one.name, one.kind), 0.0) + one.us
        return tuple(OpTime(*key, us) for key, us in found.items())


def _streams(callers: int) -> dict[str, int]:
    """A stream for each caller."""
    return {"NUM_STREAMS": callers} if callers > 1 else {}


def _files(stage: int | None) -> tuple[str, str]:
    """Names of the graph and its weights."""
    return (PLAIN, WEIGHTS) if stage is None else (f"stage{stage}.xml", f"stage{stage}.bin")


def _import() -> Any:
    """The module ``openvino``, without its usage reports: it sends one at import unless that package is out of reach."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None is Python's mark for "not importable"
    import openvino

    return openvino


def _runtime() -> Any:
    found = OpenVino().probe()
    if not found.ok:
        raise BackendUnavailable(found.reason, fix=found.fix)
    return _import()


def _hint(precision: str) -> str:
    if precision not in HINTS:
        raise UsageError(f"target openvino has no precision {precision!r}", fix=f"use one of: {', '.join(HINTS)}")
    return HINTS[precision]


def _refused(name: str, error: Exception) -> BuildFailed:
    return BuildFailed(f"OpenVINO refused {name}: {str(error).strip()}", fix="export again; if it stays, try target onnx")


def _expose(model: Path, out: Path) -> tuple[list[str], list[str]]:
    """Write a copy of the model whose taps are outputs too; weights in a file of their own stay there, and are linked.

    Returns:
        ``(names, taps)``: all output names in graph order, and those of the taps among them.

    Raises:
        BuildFailed: the file is not ONNX, or its data is missing.
        UsageError: its data lies elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

    try:
        proto = read_graph(model)
    except (DecodeError, FileNotFoundError) as error:
        raise _refused(model.name, error) from error
    for name in data_files(proto):
        try:
            place(model.parent / name, out.parent / name)
        except FileNotFoundError as error:
            raise _refused(model.name, error) from error
    present = {output.name for output in proto.graph.output}
    taps = [name for node in proto.graph.node for name in node.output if TAP.fullmatch(name) and name not in present]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps)
    onnx.save(proto, out)
    return [output.name for output in proto.graph.output], taps


def _label(graph: Any, names: Sequence[str]) -> None:
    """Give every output its one ONNX name, and numbered nodes their place in this graph: OpenVINO counts since process start."""
    for port, name in zip(graph.outputs, names, strict=True):
        port.get_tensor().set_names({name})
    for i, node in enumerate(graph.get_ordered_ops()):
        if NUMBERED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{i}")


def _without(path: Path, taps: Sequence[str]) -> bytes:
    """The IR text without the outputs of these names; layers that nothing reads any more are ignored by the reader."""
    tree = ET.parse(path)
    root = tree.getroot()
    layers, edges = root.find("layers"), root.find("edges")
    if layers is None or edges is None:
        raise BuildFailed("OpenVINO wrote an IR without layers", fix="report this with your openvino version")
    gone = [layer for layer in layers if layer.get("type") == "Result" and layer.get("output_names") in set(taps)]
    if len(gone) != len(taps):
        raise BuildFailed(f"OpenVINO kept {len(gone)} of {len(taps)} taps", fix="report this with your openvino version")
    ids = {layer.get("id") for layer in gone}
    for layer in gone:
        layers.remove(layer)
    for edge in [edge for edge in edges if edge.get("to-layer") in ids]:
        edges.remove(edge)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def _select(graph: Any, taps: Sequence[str], drop: bool) -> None:
    """Make outputs of inner values that were asked for, and ``drop`` tap outputs that were not: a stage needs all of its own.

    Raises:
        UsageError: a value the model does not have.
    """
    have = {result.output(0).get_any_name(): result for result in graph.get_results()}
    inner = [name for name in taps if name not in have]
    ports = {name: port for op in graph.get_ordered_ops() for port in op.outputs() for name in port.get_names() if name in inner}
    missing = sorted(set(inner) - ports.keys())
    if missing:
        raise UsageError(
            f"{TAPPED} has no value {', '.join(missing)}", fix="export the bundle again with this version of tpcompile"
        )
    for name, result in have.items():
        if drop and TAP.fullmatch(name) and name not in taps:
            graph.remove_result(result)
    for name in inner:
        graph.add_outputs(ports[name])
        ports[name].get_tensor().set_names({name})


def _require(compiled: Any, hint: str) -> None:
    """Refuse a plugin that quietly computes in another precision."""
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != hint:
        raise BackendUnavailable(f"this CPU computes in {used}, not in {hint}", fix="export with precision fp32")
