"""The members of NVIDIA's Python bindings that this backend uses, as protocols of our own.

The bindings ship no types. A test compares these protocols with every flavour that can be imported, so that a member that a new version
drops is found there, and not in the middle of a build.
"""

from collections.abc import Callable
from typing import Any, Protocol


class Tensor(Protocol):
    """An input or output of a network."""

    name: str
    shape: Any


class Network(Protocol):
    """A network definition."""

    num_inputs: int
    num_layers: int
    get_input: Callable[[int], Tensor]


class Profile(Protocol):
    """An optimisation profile."""

    set_shape: Callable[..., None]


class Config(Protocol):
    """A builder configuration."""

    add_optimization_profile: Callable[[Profile], int]


class RtxConfig(Config, Protocol):
    """What TensorRT for RTX adds: the capabilities of an engine that is built without a GPU."""

    num_compute_capabilities: int
    set_compute_capability: Callable[[Any, int], bool]


class Builder(Protocol):
    """A builder."""

    create_network: Callable[[int], Network]
    create_builder_config: Callable[[], Config]
    create_optimization_profile: Callable[[], Profile]
    build_serialized_network: Callable[[Network, Config], Any]


class ParserError(Protocol):
    """What the ONNX parser says of a node."""

    node_name: Callable[[], str]
    node_operator: Callable[[], str]
    desc: Callable[[], str]


class Parser(Protocol):
    """The ONNX parser."""

    num_errors: int
    parse_from_file: Callable[[str], bool]
    get_error: Callable[[int], ParserError]


class Context(Protocol):
    """An execution context."""

    set_input_shape: Callable[[str, Any], bool]
    get_tensor_shape: Callable[[str], Any]
    set_tensor_address: Callable[[str, int], bool]
    set_output_allocator: Callable[[str, Any], bool]
    execute_async_v3: Callable[[int], bool]


class Engine(Protocol):
    """A deserialised engine."""

    num_io_tensors: int
    get_tensor_name: Callable[[int], str]
    get_tensor_mode: Callable[[str], Any]
    get_tensor_dtype: Callable[[str], Any]
    get_tensor_profile_shape: Callable[[str, int], Any]
    create_execution_context: Callable[..., Context]


class RtxEngine(Engine, Protocol):
    """What TensorRT for RTX adds."""

    create_runtime_config: Callable[[], Any]


class RtxContext(Context, Protocol):
    """What TensorRT for RTX adds."""

    is_stream_capturable: Callable[[int], bool]


class RtxRuntimeConfig(Protocol):
    """The runtime configuration of TensorRT for RTX."""

    create_runtime_cache: Callable[[], Any]
    set_runtime_cache: Callable[[Any], bool]
    dynamic_shapes_kernel_specialization_strategy: Any


class RtxCache(Protocol):
    """Kernels that were compiled for this GPU."""

    serialize: Callable[[], Any]
    deserialize: Callable[[Any], bool]


class Runtime(Protocol):
    """A runtime."""

    deserialize_cuda_engine: Callable[[bytes], Engine | None]


class Library(Protocol):
    """The module."""

    __version__: str
    Builder: Callable[[Any], Builder]
    OnnxParser: Callable[[Network, Any], Parser]
    Runtime: Callable[[Any], Runtime]
    ILogger: Any
    Logger: Any
    IOutputAllocator: Any
    NetworkDefinitionCreationFlag: Any
    TensorIOMode: Any
    nptype: Callable[[Any], Any]


CLASSES: dict[str, type] = {
    "INetworkDefinition": Network, "ITensor": Tensor, "IOptimizationProfile": Profile, "IBuilderConfig": Config, "Builder": Builder,
    "ParserError": ParserError, "OnnxParser": Parser, "IExecutionContext": Context, "ICudaEngine": Engine, "Runtime": Runtime,
}  # fmt: skip
"""Class of the bindings -> our protocol of it, in every flavour."""
RTX_CLASSES: dict[str, type] = {
    "IBuilderConfig": RtxConfig, "ICudaEngine": RtxEngine, "IExecutionContext": RtxContext, "IRuntimeConfig": RtxRuntimeConfig,
    "IRuntimeCache": RtxCache,
}  # fmt: skip
"""The same of what only TensorRT for RTX has."""
