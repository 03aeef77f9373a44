"""An ONNX file and the weights beside it, brought from one folder to another without being read."""

import filecmp
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tpcompile.errors import UsageError

if TYPE_CHECKING:
    import onnx


def read_graph(path: Path) -> "onnx.ModelProto":
    """An ONNX file without the weights that lie beside it."""
    import onnx

    return onnx.load(path, load_external_data=False)


def data_files(model: "onnx.ModelProto") -> list[str]:
    """Names of the external data files, sorted.

    Raises:
        UsageError: one does not lie beside the model; nothing outside a bundle is ever read.
    """
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    names = sorted({ExternalDataInfo(tensor).location for tensor in model.graph.initializer if uses_external_data(tensor)})
    for name in names:
        if Path(name).name != name:
            raise UsageError(
                f"external data {name!r} lies outside the model's folder", fix="save the model with its data beside it"
            )
    return names


def place(source: Path, target: Path) -> None:
    """Make ``target`` the same file: a link where the disk has links, since sources are the compiler's scratch files; else a copy.

    A target that is the source already, or equals it, stays: the stages of a chain share one file of weights.
    """
    if target.is_file() and (source.samefile(target) or filecmp.cmp(source, target, shallow=False)):
        return
    try:
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
