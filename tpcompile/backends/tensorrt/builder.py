"""One plan from one graph, in a process of its own, with whatever the builder says turned into an error that names the user's line."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tpcompile.backends.base import Extent
from tpcompile.backends.tensorrt import child
from tpcompile.backends.tensorrt.flavours import Flavour
from tpcompile.backends.tensorrt.graph import profile
from tpcompile.backends.tensorrt.label import Label, write
from tpcompile.errors import BuildFailed
from tpcompile.onnx.emit import save
from tpcompile.onnx.lower import where_of

TAIL = 12
"""Lines of a dead builder's log that are shown."""
DATA_SIZED = {"NonZero", "NonMaxSuppression", "If", "Loop"}
"""Ops that the host waits for while the engine runs."""
OTHERWISE = "use form staged, or another target; if it stays, report it with the ONNX file"
INLINE = 1_500_000_000
"""Weights beyond this many bytes lie beside the graph: protobuf ends at 2 GB."""


@dataclass(frozen=True)
class Built:
    """What one build took.

    Attributes:
        plan: the file.
        seconds: parse and build, in the builder's process.
        peak_mb: the most memory of that process.
        layers: of the network.
    """

    plan: Path
    seconds: float
    peak_mb: float
    layers: int

    @property
    def megabytes(self) -> float:
        """Size of the plan."""
        return self.plan.stat().st_size / 1e6


def build_plan(flavour: Flavour, model: ir.Model, plan: Path, precision: str, extent: Extent) -> Built:
    """Build a prepared graph; the label lies beside the plan.

    Args:
        flavour: the library.
        model: see ``graph.prepare``.
        plan: the file to write.
        precision: for the label: the graph's types say what is computed.
        extent: sizes, and capabilities that ``flavour.targets`` has settled.

    Raises:
        BuildFailed: the builder refused the graph, or died of it.
    """
    with tempfile.TemporaryDirectory(dir=plan.parent, prefix=".build") as folder:
        scratch = Path(folder)
        save(model, scratch / "model.onnx", INLINE)
        request = {
            "module": flavour.module, "profile": profile(model, extent.sizes), "capabilities": list(extent.capabilities),
            "model": str(scratch / "model.onnx"), "plan": str(scratch / "plan"), "result": str(scratch / "result"),
        }  # fmt: skip
        result = _run(flavour, plan.name, request)
        if result["refused"] or result["errors"] or not result["built"]:
            raise _refusal(flavour, plan.name, model, result)
        (scratch / "plan").replace(plan)
    captures = not any(node.op_type in DATA_SIZED for node in model.graph)
    write(plan, Label.of(plan, flavour.name, result["version"], extent.capabilities, precision, captures))
    return Built(plan, result["seconds"], result["peak_mb"], result["layers"])


def _run(flavour: Flavour, name: str, request: dict[str, Any]) -> dict[str, Any]:
    """The child's result.

    Raises:
        BuildFailed: the child died.
    """
    # -P: what lies beside child.py must not shadow what it imports
    done = subprocess.run(
        [sys.executable, "-P", child.__file__], input=json.dumps(request), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(Path(request["result"]).read_text(encoding="utf-8"))
        return result
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    tail = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-TAIL:]) or "    (no line)"
    raise BuildFailed(
        f"the builder of {flavour.name} died on {name} ({how}); its log ends:\n{tail}",
        fix="free memory or give smaller sizes with --dim; if it stays, report it with this log",
    )


def _refusal(flavour: Flavour, name: str, model: ir.Model, result: dict[str, Any]) -> BuildFailed:
    """The first thing the builder said, with the layer and the user's line where it names a node of the graph."""
    nodes = {node.name: node for node in model.graph.all_nodes() if node.name}
    if result["refused"]:
        layer, kind, text = result["refused"][0]
        text = f"{kind}: {text}" if kind else text
    else:
        text = (result["errors"] or ["the builder gave no plan and no reason"])[0]
        layer = _named(text, list(nodes))
    node = nodes.get(layer)
    return BuildFailed(
        f"{flavour.name} refused {name}{f' at layer {layer}' if layer else ''}: {' '.join(text.split())}",
        where=where_of(node) if node is not None else None,
        fix="give the sizes that are needed with --dim NAME=MIN:OPT:MAX" if "for profile" in text else OTHERWISE,
    )


def _named(text: str, names: Sequence[str]) -> str:
    """The longest name of a node that stands in a text as a word of its own."""
    found = [name for name in names if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", text)]
    return max(found, key=len, default="")
