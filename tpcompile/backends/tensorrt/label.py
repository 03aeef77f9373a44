"""``model.plan.json``: what a plan is for. A plan is code for one library and GPU: nothing of it is read before its label fits."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tpcompile.errors import BackendUnavailable, BuildFailed, IntegrityError, UsageError

AGAIN = "export again on this machine, with this version"


class Label(BaseModel):
    """What a plan is.

    Attributes:
        flavour: the target.
        version: of the library that built it, and alone can open it.
        capabilities: of the GPUs that it was built for.
        precision: that it computes in.
        captures: no size in it follows from data: a CUDA graph can hold it.
        sha256: of the file.
        size: of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flavour: str
    version: str
    capabilities: tuple[str, ...]
    precision: str
    captures: bool
    sha256: str
    size: int

    @classmethod
    def of(cls, plan: Path, flavour: str, version: str, capabilities: Sequence[str], precision: str, captures: bool) -> "Label":
        """The label of a file that was just built."""
        digest, size = _digest(plan)
        names = tuple(capabilities)
        return cls(
            flavour=flavour, version=version, capabilities=names, precision=precision, captures=captures, sha256=digest, size=size
        )


def beside(plan: Path) -> Path:
    """Where a plan's label lies."""
    return plan.with_name(f"{plan.name}.json")


def write(plan: Path, label: Label) -> None:
    """Put a label beside its plan."""
    text = json.dumps(label.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    beside(plan).write_text(text, encoding="utf-8")


def require(plan: Path, flavour: str, precision: str) -> Label:
    """The label of a plan, if the file is what it says.

    Raises:
        BuildFailed: there is no plan.
        IntegrityError: no label, or one of another file, flavour or length.
        UsageError: another precision.
    """
    if not plan.is_file():
        raise BuildFailed(f"{flavour} was refused its file: there is no {plan.name} in {plan.parent}", fix="export again")
    try:
        label = Label.model_validate_json(beside(plan).read_bytes())
    except (OSError, ValidationError) as error:
        raise IntegrityError(
            f"{plan.name} has no usable label: {error}", fix="export again; never edit a bundle in place"
        ) from error
    if label.flavour != flavour:
        raise IntegrityError(f"{plan.name} is a plan of {label.flavour}, not of {flavour}", fix="export again for this target")
    digest, size = _digest(plan)
    if (digest, size) != (label.sha256, label.size):
        what = f"has {size} bytes, not {label.size}" if size != label.size else "was changed after it was built"
        raise IntegrityError(f"{plan.name} {what}", fix="copy it again, or export again")
    if label.precision != precision:
        raise UsageError(f"{plan.name} has no precision {precision!r}: it computes in {label.precision}", fix="open it with that")
    return label


def require_machine(label: Label, version: str, capability: str) -> None:
    """Refuse a plan that this library or GPU cannot run.

    Args:
        label: of the plan.
        version: of the library here.
        capability: of the GPU here, such as ``sm89``.

    Raises:
        BackendUnavailable: another version, or another capability.
    """
    if label.version != version:
        raise BackendUnavailable(f"the plan was built by {label.flavour} {label.version}; here is {version}", fix=AGAIN)
    if capability not in label.capabilities:
        raise BackendUnavailable(
            f"the plan is for {', '.join(label.capabilities)}; this GPU is {capability}",
            fix=f"export with --capability {capability}",
        )


def _digest(plan: Path) -> tuple[str, int]:
    with plan.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), plan.stat().st_size
