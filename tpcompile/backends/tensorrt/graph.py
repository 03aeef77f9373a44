"""What the builder is given: an emitted graph, rewritten so that TensorRT takes it, and the range of every input's sizes."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from tpcompile.backends.base import Extent
from tpcompile.backends.tensorrt.flavours import Flavour
from tpcompile.errors import BuildFailed, UsageError
from tpcompile.onnx.lower import check_counts, largest, write_out_attention, write_out_nonzero
from tpcompile.onnx.types import LOW, retype

Shape = tuple[int, ...]


def read(path: Path) -> ir.Model:
    """The model of a file, its weights in memory.

    Raises:
        BuildFailed: it is no ONNX, or its weights are not where it says.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

    try:
        return ir.external_data.load_to_model(ir.load(path))
    except (DecodeError, OSError, ValueError, ir.serde.SerdeError) as error:
        raise BuildFailed(f"TensorRT was given {path.name}, which cannot be read: {error}", fix="export again") from error


def prepare(model: ir.Model, flavour: Flavour, precision: str, extent: Extent) -> ir.Model:
    """Rewrite a graph in place for the builder; exact in float32. For ``int8`` and ``fp8`` the graph holds its 8-bit pairs already.

    Raises:
        BuildFailed: an op with a size that TensorRT cannot have, at the user's line.
    """
    write_out_attention(model)
    check_counts(model)
    if precision in LOW:
        retype(model, precision)
    if not flavour.nonzero and any(node.op_type == "NonZero" for node in model.graph):
        write_out_nonzero(model, largest(model, {name: sizes[2] for name, sizes in extent.sizes.items()}))
    return model


def profile(model: ir.Model, sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Least, usual and largest shape of every input that has a dynamic size.

    Raises:
        UsageError: a dim without a range.
    """
    found = {}
    for value in model.graph.inputs:
        dims = [size if isinstance(size, int) else str(size.value) for size in value.shape or ()]
        missing = [name for name in dims if isinstance(name, str) and name not in sizes]
        if missing:
            raise UsageError(
                f"{value.name} has the size {missing[0]}, and no range is given for it", fix="give it: --dim NAME=MIN:OPT:MAX"
            )
        if any(isinstance(name, str) for name in dims):
            least, usual, most = (tuple(d if isinstance(d, int) else sizes[d][i] for d in dims) for i in range(3))
            found[str(value.name)] = (least, usual, most)
    return found
