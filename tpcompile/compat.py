"""Workarounds: for a CPU build of torch beside a CUDA build of torchvision, an allocator that keeps what was freed, a busy collector."""

import ctypes
import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.library import Library

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The two ops torchvision registers fake kernels for at import, in torchvision's own signatures."""

_declared: list["Library"] = []  # torch forgets a schema when its Library object is collected


def ensure_torchvision() -> bool:
    """Make ``import torchvision`` possible where its compiled ops cannot be loaded. Call before importing transformers or timm.

    torchvision registers fake kernels for its own ``nms`` and ``qnms``. When its library is built for another torch, those ops do
    not exist, the import fails with "operator torchvision::nms does not exist", and transformers and timm fail with it.
    Declaring the two schemas is enough; calling them still fails, and nothing in this project does.

    Returns:
        True when this call declared the schemas; False when nothing was to be done: torchvision is absent, imported, or whole.
    """
    if "torchvision" in sys.modules or _declared:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return False

    import torch

    _load_extension([Path(folder) for folder in spec.submodule_search_locations or ()])
    missing = [schema for schema in SCHEMAS if not hasattr(torch.ops.torchvision, schema.partition("(")[0])]
    if not missing:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for schema in missing:
        library.define(schema)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    _declared.append(library)
    return True


def _load_extension(folders: list[Path]) -> None:
    """Load torchvision's ``_C`` as its own import would; a library that does not fit this torch is left out, as there."""
    import torch

    for path in (folder / f"_C{suffix}" for folder in folders for suffix in EXTENSION_SUFFIXES):
        if path.is_file():
            try:
                torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]  # torch leaves it untyped
            except OSError:
                return


def return_memory() -> None:
    """Give the system what engines and graphs left behind: glibc keeps it, and the next peak would come on top. Elsewhere nothing.

    Copies of graphs hold themselves (a node knows its graph, and the graph its nodes): they are collected first.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def sparing_collector() -> Iterator[None]:
    """Spare the collector what is there already: half a million objects of the packages, walked 17 times in an export of BERT-base.

    What is made inside is collected as ever; garbage of before waits for the end. A caller who froze objects of their own keeps them: then
    nothing changes.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
