"""What a plan's session does around the library, with a library and a GPU made of numpy: shapes, ranges, graphs, sizes that arise."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tpcompile.backends.tensorrt.device import Buffer, CudaDevice
from tpcompile.backends.tensorrt.driver import gpus
from tpcompile.backends.tensorrt.runtime import SHAPES, PlanSession, open_plan
from tpcompile.errors import BuildFailed, EnvironmentFault, InputError, UsageError

INPUT, OUTPUT = "in", "out"


class HostDevice:
    """The six calls on numpy memory."""

    stream = 7

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.captured, self.capturing = 0, False

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        made = np.zeros(shape, dtype)
        self.memory[made.ctypes.data] = made
        return Buffer(made.ctypes.data, shape, dtype, made)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        assert (array.shape, array.dtype) == (buffer.shape, buffer.dtype)
        buffer.held[...] = array

    def read(self, buffer: Buffer, shape: tuple[int, ...] | None = None, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        if shape is None or dtype is None:
            return np.array(buffer.held)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.array(buffer.held.view(np.uint8)[:size].view(dtype).reshape(shape))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        self.capturing = True
        work()
        self.capturing = False
        return work


class Context:
    """``y = 2 x`` over ``x [1, n]``; with ``positions``, where x is above 0 as well: a size only the data tells."""

    def __init__(self, device: HostDevice, known: bool) -> None:
        self.device, self.known = device, known
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}
        self.fails = self.settled = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.settled = self.shapes.get(name) == shape and self.settled
        self.shapes[name] = shape
        return shape != (1, 599)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"] if name in ("x", "y") else (-1,)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostDevice.stream
        assert self.settled or not self.device.capturing, "a context cannot be captured before it ran its new shape"
        self.settled = True
        if self.fails:
            return False
        x, y = (self.device.memory[self.addresses[name]] for name in "xy")
        y[...] = 2 * x
        if not self.known:
            found = np.flatnonzero(x[0] > 0)
            pointer = self.allocators["positions"].reallocate_output_async("positions", 0, found.nbytes, 256, stream)
            self.device.memory[pointer].view(np.int64)[: len(found)] = found
            self.allocators["positions"].notify_shape("positions", found.shape)
        return True


def session(known: bool = True, captures: bool = True) -> tuple[PlanSession, Context, HostDevice, list[str]]:
    device = HostDevice()
    context = Context(device, known)
    names = ["x", "y"] if known else ["x", "y", "positions"]
    engine = SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=lambda i: names[i],
        get_tensor_mode=lambda name: INPUT if name == "x" else OUTPUT,
        get_tensor_dtype=lambda name: np.int64 if name == "positions" else np.float32,
        get_tensor_profile_shape=lambda name, profile: ((1, 2), (1, 16), (1, 600)),
    )
    library: Any = SimpleNamespace(nptype=lambda kind: kind, TensorIOMode=SimpleNamespace(INPUT=INPUT), IOutputAllocator=object)
    closed: list[str] = []
    made = PlanSession(library, engine, context, device, captures, lambda: closed.append("saved"))  # type: ignore[arg-type]
    return made, context, device, closed


def row(length: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(length, dtype=np.float32)[None] - 1}


def test_a_shape_is_captured_when_it_comes_again() -> None:
    opened, _, device, _ = session()
    for length in (5, 9, 5, 5, 9):
        np.testing.assert_array_equal(opened.run(row(length))["y"], 2 * row(length)["x"])
    assert device.captured == 2


def test_outputs_belong_to_the_caller() -> None:
    opened, *_ = session()
    first = opened.run(row(4))["y"]
    opened.run({"x": np.ones((1, 4), dtype=np.float32)})
    np.testing.assert_array_equal(first, 2 * row(4)["x"])


def test_of_many_shapes_the_oldest_goes() -> None:
    opened, _, device, _ = session()
    for length in (*range(2, 2 + SHAPES + 1), 2, 2):
        opened.run(row(length))
    assert device.captured == 1, "2 was forgotten, met again, and captured at the second call since"


def test_a_size_that_arises_is_never_captured() -> None:
    opened, _, device, _ = session(known=False)
    for length in (6, 6, 3, 600, 6):
        found = opened.run(row(length))
        np.testing.assert_array_equal(found["positions"], np.flatnonzero(row(length)["x"][0] > 0))
        np.testing.assert_array_equal(found["y"], 2 * row(length)["x"])
    none = opened.run({"x": np.zeros((1, 3), dtype=np.float32)})["positions"]
    assert (none.shape, none.dtype, device.captured) == ((0,), np.int64, 0)


@pytest.mark.parametrize("x", [row(1)["x"], row(601)["x"], np.zeros((2, 16), dtype=np.float32)])
def test_an_input_the_range_leaves_out(x: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"x has shape .*; the plan was built for \[1, 2\] to \[1, 600\]") as caught:
        session()[0].run({"x": x})
    assert caught.value.exit_code == 2


def test_a_gpu_that_refuses() -> None:
    opened, context, *_ = session()
    context.fails = True
    with pytest.raises(EnvironmentFault, match="could not enqueue"):
        opened.run(row(4))
    with pytest.raises(EnvironmentFault, match=r"could not take x as \[1, 599\]"):
        opened.run(row(599))


def test_closing_saves_once() -> None:
    opened, _, _, closed = session()
    with opened:
        opened.close()
    assert closed == ["saved"]
    with pytest.raises(UsageError, match="the session is closed"):
        opened.run(row(4))


class Kernels:
    """TensorRT for RTX with its cache of compiled kernels, as far as ``open_plan`` sees it."""

    def __init__(self) -> None:
        read: list[bytes] = []

        class Cache:
            def serialize(self) -> bytes:
                return b"kernels"

            def deserialize(self, blob: bytes) -> bool:
                read.append(bytes(blob))
                return True

        self.read = read
        self.config = SimpleNamespace(create_runtime_cache=Cache, set_runtime_cache=lambda cache: True)
        self.engine = SimpleNamespace(
            num_io_tensors=0, create_runtime_config=lambda: self.config, create_execution_context=lambda given: object()
        )
        self.library: Any = SimpleNamespace(
            __name__="fake",
            Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
            Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda blob: self.engine if blob == b"plan" else None),
            TensorIOMode=SimpleNamespace(INPUT=INPUT),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(NONE="none"),
            IRuntimeCache=Cache,
        )


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan in a bundle of its own, with the user's cache folder beside that."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.plan").write_bytes(b"plan")
    return tmp_path / "bundle" / "model.plan"


def test_compiled_kernels_lie_in_the_users_cache(plan: Path, tmp_path: Path) -> None:
    """What RTX compiled is read at the next start, and never from the bundle; a size that follows from data asks for none."""
    fake = Kernels()
    open_plan(fake.library, plan, HostDevice(), True, "this GPU").close()
    (kept,) = (tmp_path / "cache" / "tpcompile" / "kernels").iterdir()
    assert [path.name for path in plan.parent.iterdir()] == [plan.name]
    assert not hasattr(fake.config, "dynamic_shapes_kernel_specialization_strategy")
    plan.with_name(f".{plan.name}.cache").write_bytes(kept.read_bytes())
    open_plan(fake.library, plan, HostDevice(), True, "another GPU").close()
    assert not fake.read, "neither those of another GPU, nor what somebody put into the bundle"
    kept.write_bytes(kept.read_bytes()[:-1])
    open_plan(fake.library, plan, HostDevice(), True, "this GPU").close()
    assert not fake.read, "a file that was cut short"
    open_plan(fake.library, plan, HostDevice(), False, "this GPU").close()
    assert (fake.read, fake.config.dynamic_shapes_kernel_specialization_strategy) == ([b"kernels"], "none")


def test_kernels_that_cannot_be_kept_are_told_and_lose_nothing(
    plan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    opened = open_plan(Kernels().library, plan, HostDevice(), True, "this GPU")
    opened.close()
    assert [record.levelname for record in caplog.records if record.name == "tpcompile.kernels"] == ["WARNING"]
    assert "they cannot be kept: " in caplog.text


def test_a_library_without_kernels_to_keep(plan: Path, tmp_path: Path) -> None:
    fake = Kernels()
    del fake.library.IRuntimeCache
    fake.engine.create_execution_context, fake.engine.create_runtime_config = object, None  # TensorRT 10.8 asks for nothing
    open_plan(fake.library, plan, HostDevice(), True, "this GPU").close()
    assert not (tmp_path / "cache").exists()
    plan.write_bytes(b"other")
    with pytest.raises(BuildFailed, match=r"fake refused model\.plan"):
        open_plan(fake.library, plan, HostDevice(), True, "this GPU")


def test_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory goes there and back through its calls, is freed with its last reference, and what fails says its number."""
    import ctypes

    freed: list[Any] = []
    held: dict[int, Any] = {}

    def malloc(size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        held[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def copy(to: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        ctypes.memmove(to, source, size)
        return (0,)

    runtime = SimpleNamespace(
        cudaStreamCreate=lambda: (0, 11), cudaMalloc=malloc, cudaMemcpyAsync=copy, cudaStreamSynchronize=lambda stream: (0,),
        cudaFree=lambda pointer: freed.append(pointer) or (0,), cudaStreamBeginCapture=lambda stream, mode: (0,),
        cudaStreamEndCapture=lambda stream: (0, "graph"), cudaGraphInstantiate=lambda graph, flags: (0, f"{graph}!"),
        cudaGraphDestroy=lambda graph: freed.append(graph) or (0,), cudaGraphExecDestroy=lambda graph: freed.append(graph) or (0,),
        cudaGraphLaunch=lambda graph, stream: (900,), cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
    )  # fmt: skip
    device = CudaDevice(runtime)
    buffer = device.empty((2, 3), np.dtype(np.float32))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    device.write(buffer, array)
    np.testing.assert_array_equal(device.read(buffer), array)
    np.testing.assert_array_equal(device.read(buffer, (2,), np.dtype(np.int32)), array.view(np.int32)[0, :2])
    pointer = buffer.pointer
    del buffer
    assert freed == [pointer]
    with pytest.raises(EnvironmentFault, match="cudaGraphLaunch failed: CUDA error 900"):
        device.capture(lambda: None)()
    assert freed == [pointer, "graph", "graph!"], "what was recorded is given back, too"


def test_without_a_driver() -> None:
    assert gpus("libnosuchdriver.so.1").reason == "no NVIDIA driver on this machine"
