"""What a bundle says about itself: the manifests of an engine and of its dense baseline, from what was compiled and built."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tpcompile import environment
from tpcompile.backends import Extent, backend
from tpcompile.inputs import Takes
from tpcompile.manifest import BoundInfo, Flops, Manifest, PatchesInfo, SiteInfo, TensorInfo
from tpcompile.onnx.emit import OnnxModel
from tpcompile.passes.cost import polynomial
from tpcompile.passes.lower import Lower
from tpcompile.plan import Plan
from tpcompile.program import Program
from tpcompile.proof.difference import NOISE, TOLERANCE
from tpcompile.spec import TensorSpec

if TYPE_CHECKING:
    from tpcompile.build import Compiled

LAWS = {True: {"parity": TOLERANCE, "noise": NOISE}, False: {"parity": 5e-2, "noise": 5e-2}}
"""Exact in float32; a reduced precision is approximate, and its engine is held to a bound of its own: bf16 has 8 bits."""


def accepted(compiled: "Compiled", extent: Extent) -> Takes:
    """What an engine of these sizes takes."""
    compact = compiled.compact
    attended = tuple(sorted(compact.placeholders()[name] for name in compact.bits))
    dims = {name: (least, most) for name, (least, _, most) in extent.sizes.items()}
    return Takes(compact.inputs, dims, compiled.subject.values, attended)


def record(
    compiled: "Compiled", target: str, precision: str, plan: Plan, outputs: Sequence[TensorSpec], extent: Extent
) -> Manifest:
    """The manifest of a pruned engine, before its files are known.

    Args:
        compiled: the model.
        target: of the engine.
        precision: of the engine.
        plan: what was built.
        outputs: what the engine gives.
        extent: sizes and GPUs that it was built for.
    """
    compact, subject, takes = compiled.compacted(plan), compiled.subject, accepted(compiled, extent)
    paper = polynomial(compiled.placed)
    terms = {
        "paper": paper,
        "graph": polynomial(compact),
        "dense": compiled.work or tuple((c, ("t0",) * len(names)) for c, names in paper),
    }
    sites = tuple(
        SiteInfo(
            name=s.name,
            module=s.where.module,
            where=s.where.short,
            keeps=f"{s.tokens.name} < t{s.tokens.level - 1}",
            score=bool(s.score),
            form="merged" if s.into else "gathered" if compact.gathered else "masked",
        )
        for s in compact.sites
    )
    return Manifest(
        target=target,
        role="pruned",
        model=subject.info,
        method=subject.method,
        fitted=subject.fitted,
        sites=sites,
        lowering=plan.lowering,
        form=plan.form,
        buckets=plan.buckets,
        counts=plan.counts,
        lengths=plan.lengths,
        padding=compiled.padding.mask if plan.lengths else "",
        reason=plan.reason,
        batch=subject.batch,
        patches=None if subject.patches is None else PatchesInfo.of(subject.patches),
        note=subject.note,
        dims=dict(takes.dims),
        capabilities=extent.capabilities,
        verified_on=backend(target).verified_on,
        inputs=tuple(TensorInfo.of(s) for s in takes.inputs),
        outputs=tuple(TensorInfo.of(o) for o in outputs),
        ranges=dict(takes.ranges),
        attended=takes.attended,
        precision=precision,
        pipeline=",".join([*compact.history, *([str(plan.step)] if plan.step != Lower() else [])]),
        assumptions=(*compact.assumptions, *(compiled.padding.assumptions if plan.lengths else ())),
        bounds=tuple(BoundInfo(where=b.where.short, module=b.where.module, limit=b.limit) for b in compiled.placed.bounds),
        flops=Flops(tokens=("t0", *(s.tokens.name for s in compact.sites)), **terms),
        tolerance=dict(LAWS[precision == "fp32"]),
        environment=_environment(),
    )


def record_dense(pruned: Manifest, dense: Program, model: OnnxModel) -> Manifest:
    """The manifest of the dense baseline, from its pruned twin's."""
    return pruned.model_copy(
        update={
            "role": "dense", "sites": (), "assumptions": (), "bounds": (), "attended": (), "method": None, "fitted": None,
            "pipeline": ",".join(dense.history),
            "lowering": "dynamic", "form": "single", "buckets": (), "counts": (), "lengths": (), "padding": "", "primed": 0, "swept": (),
            "copies": 1, "reason": "", "stages": (),
            "outputs": tuple(TensorInfo.of(o) for o in model.outputs),
            "flops": Flops(tokens=("t0",), paper=pruned.flops.dense, graph=pruned.flops.dense, dense=pruned.flops.dense),
        }
    )  # fmt: skip


def _environment() -> dict[str, Any]:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": environment.versions(), "hardware": environment.hardware(), "created": created}
