"""A plan as a session: shapes, addresses, CUDA graphs, and outputs whose size only the data tells.

What a shape needs is found once: its buffers, and at the second call a CUDA graph, which is launched from then on instead of some hundred
kernels.
Engines with a size that follows from data cannot be captured; their outputs come through an allocator that learns sizes as they arise.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tpcompile.backends.base import Session
from tpcompile.backends.tensorrt.device import Buffer, Device, Launch
from tpcompile.errors import BuildFailed, EnvironmentFault, InputError, UsageError
from tpcompile.files import replacing

if TYPE_CHECKING:
    from tpcompile.backends.tensorrt.api import Context, Engine, Library

SHAPES = 32
"""Shapes whose buffers and graphs are kept; of more, the one longest not seen goes."""
DIGEST = hashlib.sha256().digest_size
"""Bytes before the kernels of a cache."""
LOG = logging.getLogger("tpcompile.kernels")
Shape = tuple[int, ...]


@dataclass
class _Bound:
    """What one combination of input shapes needs. Mutable: the graph comes behind the second call."""

    inputs: dict[str, Buffer]
    outputs: dict[str, Buffer]
    calls: int = 0
    graph: Launch | None = None


@dataclass
class Growing:
    """Memory for an output of unknown size: what ``IOutputAllocator`` is told. Mutable: it learns while the engine runs.

    Attributes:
        device: gives the memory.
        buffer: the largest so far.
        shape: of the last result.
    """

    device: Device
    buffer: Buffer | None = None
    shape: Shape = field(default=())

    def reallocate(self, size: int) -> int:
        """Address of at least so many bytes; memory that is large enough stays."""
        if self.buffer is None or self.buffer.shape[0] < size:
            self.buffer = self.device.empty((max(1, size),), np.dtype(np.uint8))
        return self.buffer.pointer

    def read(self, dtype: np.dtype[Any]) -> np.ndarray:
        """The last result."""
        if self.buffer is None:
            return np.empty(self.shape, dtype)
        return self.device.read(self.buffer, self.shape, dtype)


class PlanSession(Session):
    """One execution context; see :class:`~tpcompile.backends.base.Session`.

    Args:
        library: the bindings.
        engine: deserialised.
        context: of it.
        device: memory and stream.
        captures: no size in it follows from data.
        close: called once, at the end.
    """

    def __init__(
        self, library: "Library", engine: "Engine", context: "Context", device: Device, captures: bool, close: Callable[[], None]
    ) -> None:
        self._engine, self._context, self._device, self._close = engine, context, device, close
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        taken = [name for name in names if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT]
        self._inputs = {name: np.dtype(library.nptype(engine.get_tensor_dtype(name))) for name in taken}
        self._outputs = {n: np.dtype(library.nptype(engine.get_tensor_dtype(n))) for n in names if n not in taken}
        self._bound: OrderedDict[tuple[Shape, ...], _Bound] = OrderedDict()
        self._growing: dict[str, Growing] = {}
        self._captures = captures
        self._allocators: list[Any] = []  # the bindings hold no reference
        self._library = library
        self._open = True

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :class:`~tpcompile.backends.base.Session`.

        Raises:
            InputError: a shape outside the range that the plan was built for.
            EnvironmentFault: the GPU refused.
        """
        if not self._open:
            raise UsageError("the session is closed", fix="open the engine again")
        arrays = {name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in self._inputs.items()}
        key = tuple(array.shape for array in arrays.values())
        bound = self._bound[key] if key in self._bound else self._bind(key)
        self._bound.move_to_end(key)
        for name, array in arrays.items():
            self._device.write(bound.inputs[name], array)
        self._launch(bound)
        found = {name: self._device.read(buffer) for name, buffer in bound.outputs.items()}
        return found | {name: one.read(self._outputs[name]) for name, one in self._growing.items()}

    def close(self) -> None:
        """See :class:`~tpcompile.backends.base.Session`."""
        if not self._open:
            return
        self._open = False
        for held in (self._bound, self._growing, self._allocators):
            held.clear()
        try:
            self._close()
        finally:  # the engine's own memory, whoever still holds the session
            del self._context, self._engine

    def _bind(self, key: tuple[Shape, ...]) -> _Bound:
        """Buffers for these shapes."""
        for name, shape in zip(self._inputs, key, strict=True):
            self._require(name, shape)
            self._shape(name, shape)
        inputs = {n: self._device.empty(shape, self._inputs[n]) for n, shape in zip(self._inputs, key, strict=True)}
        shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        for name in [name for name, shape in shapes.items() if min(shape, default=0) < 0 and name not in self._growing]:
            self._grow(name)
        known = {n: self._device.empty(shape, self._outputs[n]) for n, shape in shapes.items() if n not in self._growing}
        self._bound[key] = _Bound(inputs, known)
        if len(self._bound) > SHAPES:
            self._bound.popitem(last=False)
        return self._bound[key]

    def _require(self, name: str, shape: Shape) -> None:
        least, _, most = (tuple(one) for one in self._engine.get_tensor_profile_shape(name, 0))
        fits = len(shape) == len(least) and all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if not fits:
            raise InputError(
                f"{name} has shape {list(shape)}; the plan was built for {list(least)} to {list(most)}",
                fix="give an input within that, or export again with --dim NAME=MIN:OPT:MAX",
            )

    def _grow(self, name: str) -> None:
        growing = self._growing[name] = Growing(self._device)
        self._allocators.append(_allocator(self._library, growing))
        _require_done(self._context.set_output_allocator(name, self._allocators[-1]), f"take an allocator for {name}")
        self._captures = False

    def _launch(self, bound: _Bound) -> None:
        bound.calls += 1
        if bound.graph is not None:
            bound.graph()
            return
        for name, buffer in bound.inputs.items():
            self._shape(name, buffer.shape)
        for name, buffer in (*bound.inputs.items(), *bound.outputs.items()):
            _require_done(self._context.set_tensor_address(name, buffer.pointer), f"take the address of {name}")
        self._enqueue()
        if self._captures and bound.calls == 2:  # behind a plain call: what a new shape changes in the context cannot be captured
            bound.graph = self._device.capture(self._enqueue)

    def _shape(self, name: str, shape: Shape) -> None:
        _require_done(self._context.set_input_shape(name, shape), f"take {name} as {list(shape)}")

    def _enqueue(self) -> None:
        _require_done(self._context.execute_async_v3(self._device.stream), "enqueue the plan")


def _require_done(done: bool, what: str) -> None:
    """The library says by a bool whether it did as it was told.

    Raises:
        EnvironmentFault: it did not.
    """
    if not done:
        raise EnvironmentFault(f"TensorRT could not {what}", fix="see the log lines above, and `tpcompile doctor`")


def _allocator(library: Any, growing: Growing) -> Any:
    """The bindings' own kind of allocator around ours."""

    class Allocator(library.IOutputAllocator):  # type: ignore[misc]  # a class of the bindings
        def __init__(self) -> None:
            super().__init__()

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return growing.reallocate(size)

        def notify_shape(self, name: str, shape: Any) -> None:
            growing.shape = tuple(shape)

    return Allocator()


def open_plan(library: Any, plan: Path, device: Device, captures: bool, stamp: str) -> PlanSession:
    """Deserialise a plan whose label fits.

    Args:
        library: the bindings.
        plan: the file.
        device: memory and stream.
        captures: of the label.
        stamp: this plan's digest, library and GPU: what the kernels are good for that TensorRT for RTX compiles here.

    Raises:
        BuildFailed: the library refused the file.
    """
    log = library.Logger(library.Logger.ERROR)
    engine = library.Runtime(log).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise BuildFailed(f"{library.__name__} refused {plan.name}", fix="export again on this machine; see `tpcompile doctor`")
    if hasattr(library, "IRuntimeCache"):
        config = engine.create_runtime_config()
        cache = _cache(library, config, captures, stamp)
        context = engine.create_execution_context(config)
    else:
        cache, context = (lambda: None), engine.create_execution_context()
    if context is None:
        raise BuildFailed(f"{library.__name__} made no context for {plan.name}", fix="free GPU memory; see `tpcompile doctor`")
    if captures and hasattr(context, "is_stream_capturable"):
        captures = context.is_stream_capturable(device.stream)
    return PlanSession(library, engine, context, device, captures, cache)


def _cache(library: Any, config: Any, captures: bool, stamp: str) -> Callable[[], None]:
    """Give TensorRT for RTX the kernels that it compiled in an earlier process; what is returned saves them for the next.

    Kernels are code, so they lie in the user's own cache folder and never in a bundle, which others may have written. Those of another
    plan, library or GPU have another name; a file that was cut short is made anew.
    """
    from platformdirs import user_cache_path

    if not captures:  # counts differ from call to call: none is worth kernels of its own
        config.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.NONE
    path = user_cache_path("tpcompile") / "kernels" / hashlib.sha256(stamp.encode()).hexdigest()
    cache = config.create_runtime_cache()
    kept = path.read_bytes() if path.is_file() else b""
    if kept[:DIGEST] == hashlib.sha256(kept[DIGEST:]).digest():
        cache.deserialize(kept[DIGEST:])
    config.set_runtime_cache(cache)

    def save() -> None:
        kernels = bytes(memoryview(cache.serialize()))
        try:
            with replacing(path) as file:
                file.write(hashlib.sha256(kernels).digest() + kernels)
        except OSError as error:  # the user's result is computed already: a slower next start must not lose it
            LOG.warning("the next start compiles its kernels anew, they cannot be kept: %s", error)

    return save
