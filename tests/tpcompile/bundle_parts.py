"""A bundle of a few bytes, and what it is made of; no test."""

from pathlib import Path

import numpy as np

from tpcompile.bundle import VECTORS, Vector, seal, write_vectors
from tpcompile.manifest import Flops, Manifest, MethodInfo, ModelInfo, SiteInfo, TensorInfo
from tpcompile.spec import TensorSpec

SHA = "0" * 64


def manifest(**changes: object) -> Manifest:
    fields = {
        "target": "onnx",
        "role": "pruned",
        "model": ModelInfo(id="tiny", family="bert", architecture="BertModel", sha256=SHA),
        "method": MethodInfo(name="ltp", parameters={"thresholds": [0.1, 0.2]}),
        "sites": (SiteInfo(name="site0"),),
        "dims": {"seq": (1, 64)},
        "inputs": (TensorInfo.of(TensorSpec("input_ids", "int64", (1, "seq"))),),
        "outputs": (TensorInfo.of(TensorSpec("logits", "float32", (1, 2))),),
        "flops": Flops(tokens=("t0", "t1"), paper=((8, ("t0",)), (2.5, ("t0", "t1")))),
        "tolerance": {"parity": 1e-5},
    }
    return Manifest.model_validate(fields | changes)


def fill(folder: Path, created: str = "today") -> Manifest:
    """What an export does inside ``stage``: a dense part with its own manifest, then the bundle's."""
    (folder / "model.onnx").write_bytes(b"pruned weights")
    for part in ("dense", "reference", "reports"):
        (folder / part).mkdir()
    (folder / "dense" / "model.onnx").write_bytes(b"dense weights")
    (folder / "reference" / "model.onnx").write_bytes(b"masked program")
    (folder / "reports" / "validate.json").write_text(created)
    write_vectors(folder / VECTORS, vectors())
    environment = {"created": created}
    seal(folder / "dense", manifest(role="dense", method=None, sites=(), environment=environment))
    return seal(folder, manifest(environment=environment))


def vectors() -> list[Vector]:
    ids, mask = np.arange(3)[None], np.array([True, False, True])
    return [Vector({"input_ids": ids + i}, {"logits": np.full((1, 2), i, np.float32)}, (mask, ~mask)) for i in range(11)]
