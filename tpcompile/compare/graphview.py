"""A graph as ``diff`` and ``bisect`` look at it, whatever runtime it is for: ops in order, values, weights, and where each op came from.

Files are untrusted: what cannot be read is a ``ModelError``, and no data outside the file's own folder is opened.
"""

import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.errors import ModelError, UsageError, Where, first_line
from tpcompile.frames import user_frame

if TYPE_CHECKING:
    import onnx

ANONYMOUS = re.compile(r"(val|Constant|scalar_tensor_default|onnx::\w+?)?_?\d*|\d+:\d+")
"""Names that an exporter counted out; any other is the program's own."""
SMALL = 8
"""Constants without a name of up to so many numbers are shown where they are used; larger ones are weights."""
CAPTURED = "captured."
"""The name under which capture holds the model; it tells a reader nothing."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        kind: its type, such as ``MatMul`` or ``aten.add.Tensor``.
        detail: its attributes, as text; the same attributes give the same text.
        inputs: ids of values and weights; ``=`` and the number for a small constant; empty where an optional one is left out.
        outputs: ids of its results.
        where: the module and the user's line.
        name: what the file calls it; a runtime's profile says so too.
    """

    kind: str
    detail: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    where: Where = field(default_factory=Where)
    name: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant tensor: ``name`` as a reader knows it, and how to read its numbers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class Graph:
    """A graph.

    Attributes:
        ops: in an order in which they can run.
        inputs: names of what it takes; ids as well.
        outputs: names of what it gives.
        values: name -> id of every value that has a name of its own, outputs included.
        weights: id -> weight.
        interface: ``input x`` or ``output y`` -> dtype and shape, as far as the file says.
    """

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, str]
    weights: Mapping[str, Weight]
    interface: Mapping[str, str] = field(default_factory=dict)

    @property
    def producers(self) -> dict[str, Op]:
        """Id of a value -> the op that gives it."""
        return {value: op for op in self.ops for value in op.outputs}


def read_graph(path: Path) -> Graph:
    """Read an ``.onnx`` file, or an OpenVINO ``.xml`` with its weights beside it.

    Raises:
        UsageError: there is no such file, or it is of another kind.
        ModelError: it cannot be read.
    """
    readers = {".onnx": read_onnx, ".xml": read_openvino}
    if path.suffix not in readers:
        raise UsageError(f"{path} is no graph", fix="pass an .onnx file, or a bundle")
    if not path.is_file():
        raise UsageError(f"no file {path}", fix="check the path")
    with _unreadable(path):
        return readers[path.suffix](path)


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Turn whatever a parser says about a malformed file into one error."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

    try:
        yield
    except (DecodeError, ET.ParseError, ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError) as error:
        raise ModelError(f"{path} cannot be read as a graph: {first_line(error)}", fix="export it again") from error


def is_anonymous(name: str) -> bool:
    """Whether an exporter made this name up by counting."""
    return ANONYMOUS.fullmatch(name) is not None


def literal(value: NDArray[Any]) -> str:
    """A small constant as text; float32 in nine digits, which tell any two apart."""

    def text(part: Any) -> str:
        if isinstance(part, list):
            return f"[{', '.join(map(text, part))}]"
        return f"{part:.9g}" if isinstance(part, float) else str(part)

    return f"={text(value.tolist())}"


# --- ONNX -------------------------------------------------------------------------------------------------------------------


def read_onnx(path: Path) -> Graph:
    """Read an ONNX file; weights are read later, one at a time, from it or from data beside it."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: found for node in graph.node if (found := _constant(node)) is not None}
    small = {name: text for name, tensor in constants.items() if (text := _literal(name, tensor))}
    ops = []
    for node in graph.node:
        if node.output and node.output[0] in constants:
            continue
        kind = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        detail = ", ".join(sorted(_attribute(attribute) for attribute in node.attribute))
        inputs = tuple(small.get(name, name) for name in node.input)
        ops.append(Op(kind, detail, inputs, tuple(node.output), _where(node), node.name))
    weights = {name: tensor for name, tensor in constants.items() if name not in small}
    names = _weight_names(weights, ops, {})
    given = tuple(value.name for value in graph.input if value.name not in constants)
    outputs = tuple(value.name for value in graph.output)
    own = {value: value for op in ops for value in op.outputs if value and (value in outputs or not is_anonymous(value))}
    read = partial(_array, folder=path.parent)
    held = {name: Weight(names[name], _dtype(w.data_type), tuple(w.dims), partial(read, w)) for name, w in weights.items()}
    interface = {f"input {value.name}": _type(value) for value in graph.input if value.name in given}
    interface |= {f"output {value.name}": _type(value) for value in graph.output}
    return Graph(tuple(ops), given, outputs, own, held, interface)


def _constant(node: "onnx.NodeProto") -> "onnx.TensorProto | None":
    """The tensor behind a ``Constant`` node."""
    from onnx import helper, numpy_helper

    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    value = helper.get_attribute_value(node.attribute[0])
    if node.attribute[0].name == "value":
        tensor: onnx.TensorProto = value
        return tensor
    dtypes = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if node.attribute[0].name not in dtypes:
        return None
    made = np.array(value, dtype=dtypes[node.attribute[0].name])
    return numpy_helper.from_array(made, node.output[0])


def _literal(name: str, tensor: "onnx.TensorProto") -> str:
    """The text of a small constant without a name of its own; empty for a weight."""
    from onnx.external_data_helper import uses_external_data

    if not is_anonymous(name) or int(np.prod(tensor.dims)) > SMALL or uses_external_data(tensor):
        return ""
    return literal(_array(tensor, Path()))


def _array(tensor: "onnx.TensorProto", folder: Path) -> NDArray[Any]:
    """A tensor's numbers.

    Raises:
        ModelError: it is cut, or its data lies outside the folder.
    """
    from onnx import checker, numpy_helper
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    if uses_external_data(tensor):
        place = str(ExternalDataInfo(tensor).location)
        if Path(place).name != place or (folder / place).is_symlink():
            raise ModelError(f"{tensor.name} lies outside the model's folder: {place}", fix="save the data beside the model")
    try:
        return numpy_helper.to_array(tensor, str(folder))
    except (ValueError, TypeError, OSError, checker.ValidationError) as error:
        raise ModelError(f"{tensor.name or 'a constant'} cannot be read: {first_line(error)}", fix="export it again") from error


def _dtype(number: int) -> str:
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(number))


def _type(value: "onnx.ValueInfoProto") -> str:
    """``float32[1, seq]``."""
    tensor = value.type.tensor_type
    return f"{_dtype(tensor.elem_type)}[{', '.join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)}]"


def _attribute(attribute: "onnx.AttributeProto") -> str:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return f"{attribute.name}={value.decode(errors='replace')}"
    if isinstance(value, (int, float)):
        return f"{attribute.name}={value:.9g}" if isinstance(value, float) else f"{attribute.name}={value}"
    if isinstance(value, (list, tuple)) and all(isinstance(one, (int, float)) for one in value):
        return f"{attribute.name}=[{', '.join(f'{one:.9g}' for one in value)}]"
    return f"{attribute.name}={hashlib.sha256(attribute.SerializeToString(deterministic=True)).hexdigest()[:12]}"


def _where(node: "onnx.NodeProto") -> Where:
    """The module and the user's line, as torch.onnx noted them."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    scopes = re.findall(r"'([^']*)'", notes.get("pkg.torch.onnx.name_scopes", ""))
    module = scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_") else ""  # torch's own begin so
    return user_frame(notes.get("pkg.torch.onnx.stack_trace", ""), module.removeprefix(CAPTURED.rstrip(".")).removeprefix("."))


def _weight_names(weights: Iterable[str], ops: Iterable[Op], titles: Mapping[str, str]) -> dict[str, str]:
    """Id -> name: its own, or one after the first op that reads it; no two are alike.

    Args:
        weights: ids.
        ops: who reads them.
        titles: id -> name of the values that have one.
    """
    readers: dict[str, str] = {}
    for op in ops:
        for i, value in enumerate(op.inputs):
            readers.setdefault(value, f"{op.where.module or titles.get(op.outputs[0], 'an unnamed')} {op.kind}[{i}]")
    found: dict[str, str] = {}
    seen: dict[str, int] = {}
    for key in weights:
        name = readers.get(key, key) if key not in titles and is_anonymous(key) else titles.get(key, key).removeprefix(CAPTURED)
        seen[name] = seen.get(name, 0) + 1
        found[key] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return found


# --- OpenVINO ---------------------------------------------------------------------------------------------------------------

TYPES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8",
    "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8", "boolean": "bool",
}  # fmt: skip
"""OpenVINO's element types in numpy; of any other the bytes are compared."""


def read_openvino(path: Path) -> Graph:
    """Read OpenVINO IR; no openvino is needed. Weights lie in the ``.bin`` of the same name, or ``openvino_model.bin``."""
    data = path.with_suffix(".bin")
    data = data if data.is_file() else path.with_name("openvino_model.bin")
    text = path.read_bytes()
    if b"<!DOCTYPE" in text:
        raise ModelError(f"{path} declares XML entities", fix="export it again; OpenVINO writes none")
    root = ET.fromstring(text)
    layers = {layer.attrib["id"]: layer for layer in root.iterfind("layers/layer")}
    sources: dict[tuple[str, str], str] = {
        (e.attrib["to-layer"], e.attrib["to-port"]): f"{e.attrib['from-layer']}:{e.attrib['from-port']}"
        for e in root.iterfind("edges/edge")
    }
    graph = _Ir(layers, sources, data)
    ops = [graph.op(layer) for layer in layers.values() if layer.attrib["type"] not in ("Const", "Parameter", "Result")]
    names = _weight_names(graph.weights, ops, {key: name for name, key in graph.values.items()})
    weights = {key: Weight(names[key], w.dtype, w.shape, w.read) for key, w in graph.weights.items()}
    interface = {f"input {name}": "" for name in graph.given} | {f"output {name}": "" for name in graph.results}
    return Graph(tuple(ops), tuple(graph.given), tuple(graph.results), graph.values, weights, interface)


class _Ir:
    """The parts of an IR file, while it is read."""

    def __init__(self, layers: Mapping[str, ET.Element], sources: Mapping[tuple[str, str], str], data: Path) -> None:
        self.sources, self.data, self.size = sources, data, data.stat().st_size if data.is_file() else 0
        self.weights: dict[str, Weight] = {}
        self.literals: dict[str, str] = {}
        self.values: dict[str, str] = {}
        self.given: dict[str, str] = {}
        self.results: list[str] = []
        for layer in layers.values():
            self._note(layer)
        renamed = {port: name for name, port in self.given.items()}
        self.sources = {end: renamed.get(port, port) for end, port in sources.items()}
        for layer in layers.values():
            if layer.attrib["type"] == "Result":
                name = layer.attrib.get("output_names") or layer.attrib["name"]
                self.results.append(name)
                self.values[name] = self._inputs(layer)[0]

    def _note(self, layer: ET.Element) -> None:
        """Names, constants and inputs of one layer."""
        for port in layer.iterfind("output/port"):
            key = f"{layer.attrib['id']}:{port.attrib['id']}"
            names = sorted(port.attrib.get("names", "").split(","))
            if layer.attrib["type"] == "Parameter":
                self.given[names[0] or layer.attrib["name"]] = key
            elif layer.attrib["type"] == "Const":
                self._constant(layer, key)
            else:
                self.values |= {name: key for name in names if not is_anonymous(name)}

    def _constant(self, layer: ET.Element, key: str) -> None:
        data = layer.find("data")
        if data is None:
            raise ModelError(f"{layer.attrib['name']} has no data", fix="export it again")
        shape = tuple(int(size) for size in data.attrib.get("shape", "").split(",") if size.strip())
        kind, offset, size = data.attrib["element_type"], int(data.attrib["offset"]), int(data.attrib["size"])
        if not 0 <= offset <= offset + size <= self.size:
            raise ModelError(f"{layer.attrib['name']} reaches beyond {self.data.name}", fix="copy both files again")
        read = partial(_part, self.data, offset, size, TYPES.get(kind), shape)
        if int(np.prod(shape)) <= SMALL and kind in TYPES:
            self.literals[key] = literal(read())
        else:
            self.weights[key] = Weight(key, TYPES.get(kind, kind), shape, read)

    def _inputs(self, layer: ET.Element) -> tuple[str, ...]:
        ports = [self.sources[layer.attrib["id"], port.attrib["id"]] for port in layer.iterfind("input/port")]
        return tuple(self.literals.get(port, port) for port in ports)

    def op(self, layer: ET.Element) -> Op:
        """One layer as an op."""
        data = layer.find("data")
        detail = ", ".join(f"{k}={v}" for k, v in sorted(data.attrib.items())) if data is not None else ""
        outputs = tuple(f"{layer.attrib['id']}:{port.attrib['id']}" for port in layer.iterfind("output/port"))
        return Op(layer.attrib["type"], detail, self._inputs(layer), outputs, name=layer.attrib["name"])


def _part(path: Path, offset: int, size: int, dtype: str | None, shape: tuple[int, ...]) -> NDArray[Any]:
    """Numbers from the middle of a file; plain bytes where numpy has no such type."""
    with path.open("rb") as file:
        file.seek(offset)
        raw = file.read(size)
    try:
        return np.frombuffer(raw, dtype=dtype).reshape(shape) if dtype else np.frombuffer(raw, dtype="uint8")
    except ValueError as error:
        raise ModelError(f"{path}: {size} bytes are no {dtype} of {list(shape)}", fix="copy the file again") from error
