"""ONNX Runtime: target ``onnx``. The bundle's file is the emitted ONNX model, its rows written as matrices."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tpcompile.backends.base import ANY, Availability, Extent, OpTime, Shareable, without_choice
from tpcompile.backends.files import data_files, place, read_graph
from tpcompile.errors import BackendUnavailable, BuildFailed, InputError, UsageError

if TYPE_CHECKING:
    import onnx

FILE = "model.onnx"
SLOWER = ("SkipLayerNormFusion", "BiasGeluFusion")
"""Rewritings of the runtime that make transformers slower on a CPU than the ops they stand for (docs/decisions/0016)."""
TIMED = "_kernel_time"
"""How a trace ends an op's name."""


class OnnxRuntime:
    """Builds and opens ``model.onnx`` (with ``model.onnx.data`` where weights are external) on the CPU provider.

    The stages of a chain are ``stage0.onnx``, ``stage1.onnx``, ... and read their weights from one ``model.onnx.data``.
    """

    name: ClassVar[str] = "onnx"
    profiled: ClassVar[bool] = False
    verified_on: ClassVar[tuple[str, ...]] = ("cpu",)

    def probe(self) -> Availability:
        """See :class:`~tpcompile.backends.base.Backend`."""
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            return Availability(False, reason=f"onnxruntime cannot be imported: {error}", fix="pip install onnxruntime")
        return Availability(True, version=onnxruntime.__version__, devices=tuple(onnxruntime.get_available_providers()))

    def targets(self, precision: str, capabilities: Sequence[str]) -> tuple[str, ...]:
        """See :class:`~tpcompile.backends.base.Backend`."""
        _check_precision(precision)
        return without_choice(self.name, capabilities)

    def build(self, model: Path, out: Path, precision: str, stage: int | None = None, extent: Extent = ANY) -> None:
        """Write the model beside its data, then let the runtime compile it once: what it refuses must fail here, not at load."""
        import onnx_ir as ir

        from tpcompile.onnx.flat import flatten_rows

        _check_precision(precision)
        _runtime()
        with _refusals(model):
            external = data_files(read_graph(model))
            written = ir.load(model)
        flatten_rows(written)
        for name in external:
            place(model.parent / name, out / name)
        ir.save(written, out / _file(stage))
        self.open(out, stage=stage).close()

    def open(
        self,
        folder: Path,
        *,
        taps: Sequence[str] = (),
        threads: int = 0,
        precision: str = "fp32",
        stage: int | None = None,
        callers: int = 1,
    ) -> "OnnxSession":
        """See :class:`~tpcompile.backends.base.Backend`. Taps become further outputs of a copy in memory."""
        _check_precision(precision)
        runtime = _runtime()
        path = folder / _file(stage)
        options = _options(runtime, threads)
        source: str | bytes = str(path)
        with _refusals(path):
            if taps:
                source = _tapped(path, taps).SerializeToString()
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            return OnnxSession(_inference(runtime, source, options))

    def profile(self, folder: Path, *, threads: int = 0, precision: str = "fp32", stage: int | None = None) -> "OnnxProfile":
        """See :class:`~tpcompile.backends.base.Profiler`."""
        _check_precision(precision)
        runtime, path = _runtime(), folder / _file(stage)
        scratch = tempfile.TemporaryDirectory(prefix="tpcompile-profile-")
        options = _options(runtime, threads)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch.name) / "ops")
        with _refusals(path):
            return OnnxProfile(_inference(runtime, str(path), options), scratch)


class OnnxSession(Shareable):
    """One ``InferenceSession``; see :class:`~tpcompile.backends.base.Session`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :class:`~tpcompile.backends.base.Session`.

        Raises:
            InputError: an index beyond a table; what else the runtime raises is no fault of the input, and passes.
        """
        if self._session is None:
            raise UsageError("the session is closed", fix="open the engine again")
        try:
            return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))
        except _beyond() as error:
            raise InputError(
                f"ONNX Runtime cannot compute this input: {error}",
                fix="where a table in the model ends before the longest input it admits, export with --dim NAME=MIN:OPT:MAX",
            ) from error

    def share(self) -> "OnnxSession":
        """See :class:`~tpcompile.backends.base.Shareable`: ``run`` takes several callers."""
        return OnnxSession(self._session)

    def close(self) -> None:
        """See :class:`~tpcompile.backends.base.Session`."""
        self._session = None


class OnnxProfile(OnnxSession):
    """A session that writes a trace; see :class:`~tpcompile.backends.base.Profiled`."""

    def __init__(self, session: Any, scratch: "tempfile.TemporaryDirectory[str]") -> None:
        super().__init__(session)
        self._scratch = scratch

    def ops(self, after: int = 0) -> tuple[OpTime, ...]:
        """Read the trace: the ops of a run stand before the run itself."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self.close()
        runs, found = 0, dict[tuple[str, str], float]()
        for event in events:
            runs += event["name"] == "model_run"
            if event["cat"] == "Node" and event["name"].endswith(TIMED) and runs >= after:
                key = (event["name"].removesuffix(TIMED), event["args"]["op_name"])
                found[key] = found.get(key, 0.0) + event["dur"]
        return tuple(OpTime(*key, us) for key, us in found.items())

    def close(self) -> None:
        """See :class:`~tpcompile.backends.base.Session`; the trace goes too."""
        super().close()
        self._scratch.cleanup()


def _options(runtime: Any, threads: int) -> Any:
    """How every session is opened."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it logs as an error it also raises
    if threads:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def _inference(runtime: Any, source: str | bytes, options: Any) -> Any:
    """What is timed and what is profiled is the same graph."""
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOWER))


def _runtime() -> Any:
    """The module ``onnxruntime``, its usage events off.

    Raises:
        BackendUnavailable: it cannot be imported.
    """
    found = OnnxRuntime().probe()
    if not found.ok:
        raise BackendUnavailable(found.reason, fix=found.fix)
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _file(stage: int | None) -> str:
    return FILE if stage is None else f"stage{stage}.onnx"


def _check_precision(precision: str) -> None:
    if precision != "fp32":
        raise UsageError(f"target onnx has no precision {precision!r}", fix="use fp32, or target openvino for bf16 and fp16")


def _beyond() -> type[Exception]:
    """What the runtime raises where an index is beyond its table."""
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    found: type[Exception] = InvalidArgument
    return found


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn what onnx or the runtime says about a file into BuildFailed; tpcompile's own errors and the disk's pass."""
    import onnxruntime.capi.onnxruntime_pybind11_state as status
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

    try:
        yield
    except (
        DecodeError,
        FileNotFoundError,
        status.Fail,
        status.InvalidArgument,
        status.InvalidGraph,
        status.InvalidProtobuf,
        status.NoSuchFile,
        status.NotImplemented,
        status.RuntimeException,
    ) as error:
        raise BuildFailed(
            f"ONNX Runtime refused {path.name}: {error}", fix="export again; if it stays, try target openvino"
        ) from error


def _tapped(path: Path, taps: Sequence[str]) -> "onnx.ModelProto":
    """The model with internal values as further outputs; the runtime infers their types itself.

    Raises:
        UsageError: a name no node produces.
    """
    import onnx

    model = read_graph(path)
    produced = {name for node in model.graph.node for name in node.output}
    missing = sorted(set(taps) - produced)
    if missing:
        raise UsageError(
            f"{path.name} has no value {', '.join(missing)}", fix="export the bundle again with this version of tpcompile"
        )
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps if name not in present)
    return model
