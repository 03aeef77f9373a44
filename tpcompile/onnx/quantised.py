"""Graph files -> the same files with 8-bit products, by what samples show the largest activations to be, in ONNX Runtime."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tpcompile.backends import Session, backend
from tpcompile.chain import ChainSession
from tpcompile.manifest import Manifest, ModelInfo, StageInfo, TensorInfo
from tpcompile.onnx.emit import save
from tpcompile.onnx.quant import activations, quantise
from tpcompile.spec import TensorSpec

Feeds = Sequence[Mapping[str, NDArray[Any]]]


class _Watched(Session):
    """A session that notes the largest magnitude of some values, see :class:`~tpcompile.backends.base.Session`."""

    def __init__(self, session: Session, names: Iterable[str], seen: dict[str, float]) -> None:
        self._session, self._names, self._seen = session, tuple(names), seen

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = self._session.run(feeds)
        for name in self._names:
            value = found[name] if name in found else feeds[name]
            self._seen[name] = max(self._seen.get(name, 0.0), float(np.abs(value).max(initial=0.0)))
        return found

    def close(self) -> None:
        self._session.close()


def write_quantised(
    folder: Path, stages: Sequence[StageInfo], outputs: Sequence[TensorSpec], feeds: Feeds, precision: str
) -> None:
    """Rewrite ``model.onnx``, or ``stage0.onnx``, ``stage1.onnx``, ..., of a folder.

    Args:
        folder: what an export gives the builder.
        stages: of a chain; none: the folder holds one graph.
        outputs: of the whole.
        feeds: inputs of a few samples.
        precision: ``int8`` or ``fp8``.
    """
    staged: list[int | None] = [number for number, stage in enumerate(stages) if stage.outputs] if stages else [None]
    paths = [folder / ("model.onnx" if number is None else f"stage{number}.onnx") for number in staged]
    models = [ir.external_data.load_to_model(ir.load(path)) for path in paths]
    seen: list[dict[str, float]] = [{} for _ in paths]
    sessions = [_watched(folder, model, number, found) for model, number, found in zip(models, staged, seen, strict=True)]
    with ExitStack() as opened:
        for session in sessions:
            opened.enter_context(session)
        whole: Session = ChainSession(chained(stages, outputs, feeds), sessions) if stages else sessions[0]
        for one in feeds:
            whole.run(one)
    for path, model, found in zip(paths, models, seen, strict=True):
        quantise(model, found, precision)
        save(model, path)


def chained(stages: Sequence[StageInfo], outputs: Sequence[TensorSpec], feeds: Feeds) -> Manifest:
    """Of a manifest, what a chain is run by; see ``write_quantised``."""
    nobody = ModelInfo(id="", family="", architecture="", sha256="")
    inputs = tuple(TensorInfo(name=name, dtype=str(value.dtype), shape=value.shape) for name, value in feeds[0].items())
    given = tuple(map(TensorInfo.of, outputs))
    return Manifest(target="onnx", role="pruned", model=nobody, stages=tuple(stages), inputs=inputs, outputs=given)


def _watched(folder: Path, model: ir.Model, stage: int | None, seen: dict[str, float]) -> _Watched:
    names = activations(model.graph)
    inner = [name for name in names if name not in {value.name for value in model.graph.inputs}]
    return _Watched(backend("onnx").open(folder, taps=inner, stage=stage), names, seen)
