"""GPU memory and one stream, in six calls: through torch where it has CUDA, else through NVIDIA's ``cuda-python``.

Everything runs on a stream of its own: on the default stream TensorRT waits for the whole GPU at every call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tpcompile.errors import BackendUnavailable, EnvironmentFault

Launch = Callable[[], None]


@dataclass(frozen=True)
class Buffer:
    """Memory on the GPU.

    Attributes:
        pointer: its address.
        shape: of what it holds.
        dtype: of what it holds.
        held: what gives the memory back when nothing refers to it.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    held: Any


class Device(Protocol):
    """The six calls."""

    stream: int

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Memory of unknown content."""
        ...

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy an array of the buffer's shape and dtype to the GPU, on the stream."""
        ...

    def read(self, buffer: Buffer, shape: tuple[int, ...] | None = None, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """Wait for the stream, and copy to an array of the caller's own; of the front part as another shape and dtype, if asked."""
        ...

    def capture(self, work: Launch) -> Launch:
        """Record what is enqueued as a CUDA graph; what is returned launches it."""
        ...


class TorchDevice:
    """Through torch."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._stream = self._torch.cuda.Stream()
        self.stream = int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """See :class:`Device`."""
        kind = self._torch.from_numpy(np.empty(0, dtype)).dtype
        with self._torch.cuda.stream(self._stream):
            made = self._torch.empty(shape, dtype=kind, device="cuda")
        return Buffer(made.data_ptr(), shape, dtype, made)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """See :class:`Device`."""
        with self._torch.cuda.stream(self._stream):
            buffer.held.copy_(self._torch.from_numpy(array))

    def read(self, buffer: Buffer, shape: tuple[int, ...] | None = None, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """See :class:`Device`."""
        with self._torch.cuda.stream(self._stream):
            return _part(buffer.held.cpu().numpy(), shape, dtype)

    def capture(self, work: Launch) -> Launch:
        """See :class:`Device`."""
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            work()

        def launch() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return launch


class CudaDevice:
    """Through ``cuda.bindings.runtime``.

    Args:
        runtime: that module.
    """

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime
        self._stream = self._call("cudaStreamCreate")
        self.stream = int(self._stream)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """See :class:`Device`."""
        pointer = int(self._call("cudaMalloc", max(1, int(np.prod(shape)) * dtype.itemsize)))
        return Buffer(pointer, shape, dtype, _Freed(self, "cudaFree", pointer))

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """See :class:`Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", buffer.pointer, array.ctypes.data, array.nbytes, kind, self._stream)
        self._call("cudaStreamSynchronize", self._stream)  # the array is the caller's

    def read(self, buffer: Buffer, shape: tuple[int, ...] | None = None, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """See :class:`Device`."""
        array = np.empty(buffer.shape, buffer.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, buffer.pointer, array.nbytes, kind, self._stream)
        self._call("cudaStreamSynchronize", self._stream)
        return _part(array, shape, dtype)

    def capture(self, work: Launch) -> Launch:
        """See :class:`Device`."""
        self._call("cudaStreamBeginCapture", self._stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        finally:  # else every later call on the stream would be recorded
            recorded = self._call("cudaStreamEndCapture", self._stream)
        graph = self._call("cudaGraphInstantiate", recorded, 0)
        self._call("cudaGraphDestroy", recorded)
        held = _Freed(self, "cudaGraphExecDestroy", graph)
        return lambda: self._call("cudaGraphLaunch", held.what, self._stream)

    def free(self, how: str, what: Any) -> None:
        """Give memory or a graph back."""
        self._call(how, what)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        if int(error):
            raise EnvironmentFault(f"{name} failed: CUDA error {int(error)}", fix="see `tpcompile doctor`; free GPU memory")
        return results[0] if results else None


class _Freed:
    """Given back by this call with its last reference."""

    def __init__(self, device: CudaDevice, how: str, what: Any) -> None:
        self.what = what
        self._device, self._how = device, how

    def __del__(self) -> None:
        self._device.free(self._how, self.what)


def _part(array: np.ndarray, shape: tuple[int, ...] | None, dtype: np.dtype[Any] | None) -> np.ndarray:
    """The front of an array as another shape and dtype; a copy."""
    if shape is None or dtype is None:
        return array
    size = int(np.prod(shape)) * dtype.itemsize
    return array.reshape(-1).view(np.uint8)[:size].view(dtype).reshape(shape).copy()


def device() -> Device:
    """What this process can use.

    Raises:
        BackendUnavailable: torch has no CUDA, and cuda-python is not there.
    """
    import torch

    if torch.cuda.is_available():
        return TorchDevice()
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendUnavailable(
            "plans need GPU memory: this torch has no CUDA, and cuda-python is not installed", fix="pip install cuda-python"
        ) from error
    return CudaDevice(runtime)
