"""TensorRT: targets ``tensorrt`` and ``tensorrt-rtx``. Writes ``model.plan`` and its label, and ``taps.plan`` where the model has taps.

TensorRT for RTX builds on any machine, for GPUs that are elsewhere; TensorRT builds on the GPU that it runs on. The stages of a chain are
``stage0.plan``, ``stage1.plan``, ... A plan gives what it was built to give, so taps stand in a second plan.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tpcompile.backends.base import ANY, Availability, Extent, Session
from tpcompile.backends.tensorrt.driver import gpus
from tpcompile.backends.tensorrt.flavours import LEAST, RTX, TENSORRT, Flavour
from tpcompile.backends.tensorrt.label import require, require_machine
from tpcompile.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from tpcompile.backends.tensorrt.builder import Built

PLAIN, TAPPED = "model.plan", "taps.plan"


class TensorRt:
    """Builds plans by TensorRT, and opens them on the first GPU."""

    name: ClassVar[str] = TENSORRT.name
    profiled: ClassVar[bool] = True
    verified_on: ClassVar[tuple[str, ...]] = ()
    flavour: ClassVar[Flavour] = TENSORRT

    def probe(self) -> Availability:
        """See :class:`~tpcompile.backends.base.Backend`. ``ok`` is whether plans can be built; the note says whether they run."""
        try:
            version = self.flavour.library().__version__
        except BackendUnavailable as error:
            return Availability(False, reason=error.message, fix=error.fix)
        here = gpus()
        names = tuple(f"{name} ({capability})" for name, capability in here.devices)
        if here.reason and not self.flavour.capabilities:
            fix = "build on the machine that has the GPU, or use target tensorrt-rtx"
            return Availability(False, version, f"{self.name} builds on a GPU: {here.reason}", fix)
        runs = f"runs on CUDA {here.cuda}" if not here.reason else f"runs nothing here: {here.reason}"
        builds = ", ".join(self.flavour.capabilities) or "the GPU at hand"
        return Availability(True, version, devices=names, note=f"builds for {builds}; {runs}; never verified on a GPU")

    def targets(self, precision: str, capabilities: Sequence[str]) -> tuple[str, ...]:
        """See :class:`~tpcompile.backends.base.Backend`."""
        return self.flavour.targets(capabilities, precision)

    def build(self, model: Path, out: Path, precision: str, stage: int | None = None, extent: Extent = ANY) -> None:
        """See :class:`~tpcompile.backends.base.Backend`."""
        self.plans(model, out, precision, stage, extent)

    def plans(self, model: Path, out: Path, precision: str, stage: int | None = None, extent: Extent = ANY) -> "list[Built]":
        """Build, and say what each plan took.

        Raises:
            UsageError: a precision, capability or size that does not go.
            BackendUnavailable: the library is not here.
            BuildFailed: the builder refused the graph.
        """
        from tpcompile.backends.tensorrt.builder import build_plan
        from tpcompile.onnx.names import exposed, taps

        names = self.targets(precision, extent.capabilities)
        found = self.probe()
        if not found.ok:
            raise BackendUnavailable(found.reason, fix=found.fix)
        fitted = replace(extent, capabilities=names or (gpus().devices[0][1],))
        graph = self.graph(model, precision, fitted)
        if stage is not None:
            return [build_plan(self.flavour, graph, out / f"stage{stage}.plan", precision, fitted)]
        built = [build_plan(self.flavour, graph, out / PLAIN, precision, fitted)]
        if taps(graph.graph):
            with exposed(graph.graph):
                built.append(build_plan(self.flavour, graph, out / TAPPED, precision, fitted))
        return built

    def graph(self, model: Path, precision: str, extent: Extent) -> "ir.Model":
        """The very graph that the builder is given."""
        from tpcompile.backends.tensorrt.graph import prepare, read

        return prepare(read(model), self.flavour, precision, extent)

    def open(
        self,
        folder: Path,
        *,
        taps: Sequence[str] = (),
        threads: int = 0,
        precision: str = "fp32",
        stage: int | None = None,
        callers: int = 1,
    ) -> Session:
        """See :class:`~tpcompile.backends.base.Backend`. Nothing of a plan is read before its label fits library and GPU."""
        from tpcompile.backends.tensorrt.device import device
        from tpcompile.backends.tensorrt.runtime import open_plan

        if precision not in LEAST:
            raise UsageError(f"target {self.name} has no precision {precision!r}", fix=f"use one of: {', '.join(LEAST)}")
        plan = folder / (f"stage{stage}.plan" if stage is not None else TAPPED if taps else PLAIN)
        label = require(plan, self.name, precision)
        library = self.flavour.library()
        here = gpus()
        if here.reason:
            raise BackendUnavailable(f"{self.name} engines run on an NVIDIA GPU: {here.reason}", fix="copy the bundle to one")
        require_machine(label, library.__version__, here.devices[0][1])
        stamp = f"{label.sha256} {library.__version__} {' '.join(here.devices[0])}"
        return open_plan(library, plan, device(), label.captures, stamp)


class TensorRtRtx(TensorRt):
    """Builds plans by TensorRT for RTX: on any machine, for any of its compute capabilities."""

    name: ClassVar[str] = RTX.name
    flavour: ClassVar[Flavour] = RTX
