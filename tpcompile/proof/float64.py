"""How much of a difference is float32 itself: the masked reference once more in float64, by ONNX's own reference evaluator.

An engine cannot be closer to the float32 reference than that is to the exact numbers. What the engine needs, and what float32 costs
the reference, stand side by side in the result of ``validate``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample
from tpcompile.kept import compose
from tpcompile.manifest import Manifest
from tpcompile.proof.difference import Difference, Tolerances, compare_outputs, worst
from tpcompile.proof.keptsets import KeptSets, compare_kept

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]


@dataclass(frozen=True)
class Floor:
    """How far the float32 masked reference is from float64.

    Attributes:
        samples: numbers of the samples it was measured on.
        outputs: the worst of each output, where float64 keeps the same tokens.
        flipped: samples of which float64 keeps other tokens: float32 alone decides those.
        score_noise: largest difference of a score, relative to its site's largest.
    """

    samples: tuple[int, ...] = ()
    outputs: Mapping[str, Difference] = field(default_factory=dict)
    flipped: int = 0
    score_noise: float = 0.0


Told = tuple[Mapping[str, Array], Sequence[KeptSets]]


def measure(
    reference: Callable[..., Told], path: Path, manifest: Manifest, samples: Sequence[Sample], count: int, law: Tolerances
) -> Floor:
    """Run a few samples, from the shortest to the longest, in float32 and in float64.

    Args:
        reference: the masked program in float32; it also tells what it kept.
        path: the same as an ONNX file.
        manifest: of the bundle.
        samples: of which ``count`` are taken.
        count: 0 measures nothing.
        law: see ``compare_outputs``.
    """
    order = sorted(range(len(samples)), key=lambda i: samples[i].length)
    count = min(count, len(order))
    chosen = sorted({order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)})
    if not chosen:
        return Floor()
    exact = Exact(path, manifest)
    rows, flipped, noise = [], 0, 0.0
    for number in chosen:
        inputs = samples[number].inputs
        (outputs, kept), (right, truth) = reference(**inputs), exact(inputs)
        flips, heard = compare_kept(kept[0], truth, len(truth.masks[0]) if truth.masks else 0)
        noise, flipped = max(noise, heard), flipped + bool(flips)
        if not flips:
            rows.append(compare_outputs(outputs, right, law))
    return Floor(tuple(chosen), worst(rows), flipped, noise)


class Exact:
    """A graph in float64: weights, constants and casts; a sample at a time.

    Args:
        path: a float32 ONNX file.
        manifest: whose outputs and sites it has.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        self._manifest = manifest
        self._taps = tuple(f"site{i}.{kind}" for i, site in enumerate(manifest.sites) for kind in site.taps(("keep", "score")))
        model = widen(onnx.load(path))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._taps)
        self._names = [*(output.name for output in manifest.outputs), *self._taps]
        self._session = ReferenceEvaluator(model, new_ops=_faster())

    def __call__(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], KeptSets]:
        """Outputs, and what each site kept."""
        feeds = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in inputs.items()}
        with np.errstate(all="ignore"):  # infinities that a later op leaves out, as a log of 0: no runtime speaks of them
            values = dict(zip(self._names, self._session.run(self._names, feeds), strict=True))
        sites = self._manifest.sites
        length = values["site0.keep"].shape[1] if sites else 0
        kept = compose({name: values[name] for name in self._taps}, len(sites), length)
        return {output.name: values[output.name] for output in self._manifest.outputs}, kept


def widen(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """A float32 graph in float64; changed in place."""
    from onnx import TensorProto, helper, numpy_helper

    def wide(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))

    for tensor in model.graph.initializer:
        wide(tensor)
    for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.DOUBLE
        elif attribute.HasField("t"):
            wide(attribute.t)
        elif attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else attribute.floats
            fresh = numpy_helper.from_array(np.array(numbers, dtype=np.float64))
            attribute.CopyFrom(helper.make_attribute("value", fresh))
    for value in (*model.graph.input, *model.graph.output):
        held = value.type.tensor_type
        held.elem_type = TensorProto.DOUBLE if held.elem_type == TensorProto.FLOAT else held.elem_type
    del model.graph.value_info[:]
    return model


def _faster() -> list[type]:
    """The error function in one call: the evaluator's own asks Python for every number."""
    from onnx.reference.op_run import OpRun
    from scipy.special import erf

    def run(_: OpRun, x: Array) -> tuple[Array]:
        return (erf(x),)

    return [type("Erf", (OpRun,), {"op_domain": "", "_run": run})]


