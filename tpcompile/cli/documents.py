"""The ``--json`` documents of every verb, as types: the published schema is made from them, and tests hold every document against it.

What a verb hands over as a dataclass is not written again here.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

Problem = TypedDict(
    "Problem",
    {
        "class": str,
        "message": str,
        "fix": str,
        "exit_code": int,
        "at": NotRequired[str],
        "node": NotRequired[str],
        "during": NotRequired[str],
        "note": NotRequired[str],
        "traceback": NotRequired[str],
        "report": NotRequired[list[str]],
    },
)
"""What went wrong; ``class`` is the error's."""


class Failed(TypedDict):
    """The document of a verb that could not do its work."""

    error: Problem


class InBundle(TypedDict):
    """The bundle that a result is of."""

    bundle: str


class Exported(TypedDict):
    """``export``."""

    bundle: str
    target: str
    identity: str
    bytes: int
    lowering: str
    form: str
    buckets: list[int]
    counts: list[int]
    reason: str
    fitted: Mapping[str, Any] | None
    tune: list[Mapping[str, Any]]


class Summed(TypedDict):
    """What ``bench`` adds to its measurements."""

    flops_ratio: Mapping[str, float]
    sentences: list[str]


class Reported(TypedDict):
    """``report``."""

    bundle: str
    report: str


class Inspected(TypedDict):
    """``inspect``; ``tpcompile schema manifest`` says what a manifest holds."""

    bundle: str
    identity: str
    manifest: Mapping[str, Any]


class GridShape(TypedDict):
    """Tokens before the patches, and the patches' grid."""

    prefix: int
    rows: int
    columns: int


class PatchPlace(TypedDict):
    """One kept patch."""

    position: int
    row: int
    column: int


class RunSite(TypedDict):
    """What one site kept of one input."""

    site: int
    of: int
    kept: int
    stored: int
    positions: list[int]
    tokens: NotRequired[list[str]]
    prefix: NotRequired[int]
    patches: NotRequired[list[PatchPlace]]


class RunOutput(TypedDict):
    """One output in full."""

    dtype: str
    shape: list[int]
    values: list[Any]


class Ran(TypedDict):
    """``run``."""

    bundle: str
    tokens: list[str] | None
    patches: GridShape | None
    sites: list[RunSite]
    answers: Mapping[str, Any]
    outputs: Mapping[str, RunOutput]


class Demonstrated(TypedDict):
    """``demo``; an engine's ``parity`` and ``latency`` are what ``validate`` and ``bench`` say."""

    verdict: str
    recipe: Mapping[str, Any]
    engines: Mapping[str, Mapping[str, Mapping[str, Any]]]
    report: str
    left_out: list[str]


class FileFacts(TypedDict):
    """A file as its manifest has it."""

    sha256: str
    size: int


class FileDiffers(TypedDict):
    """One file of two bundles."""

    name: str
    change: str
    a: FileFacts | None
    b: FileFacts | None


class Compared(TypedDict):
    """``diff``; the rows are those of ``tpcompile.compare.differ`` and ``tpcompile.compare.graphdiff``."""

    a: str
    b: str
    differs: bool
    fields: list[Mapping[str, Any]]
    environment: list[Mapping[str, Any]]
    files: list[FileDiffers]
    graphs: list[Mapping[str, Any]]


class PassRow(TypedDict):
    """One pass."""

    name: str
    takes: str
    gives: str
    does: str


class PassList(TypedDict):
    """``passes list``."""

    pipeline: str
    passes: list[PassRow]


class PassShown(PassRow):
    """``passes show``."""

    doc: str
    cases: str
    options: Mapping[str, Any]


class RecipeRow(TypedDict):
    """One shipped recipe."""

    name: str
    method: str
    model: str | None


class RecipeList(TypedDict):
    """``recipe list``."""

    recipes: list[RecipeRow]


class RecipeShown(TypedDict):
    """``recipe show``."""

    method: str
    parameters: Mapping[str, Any]
    flops: float | None
    model: str | None
    note: str | None


class RecipeFitted(RecipeShown):
    """``recipe fit``."""

    path: str


class RecipeSchema(TypedDict):
    """``recipe schema``."""

    schema: Mapping[str, Any]


class ErrorExplained(TypedDict):
    """``explain`` of an error."""

    name: str
    exit_code: int
    summary: str
    cause: str
    example: str
    fix: str


class ModelExplained(TypedDict):
    """``explain`` of a model."""

    model: Mapping[str, str]
    method: Mapping[str, Any] | None
    batch: str
    dims: Mapping[str, list[int]]
    sites: list[Mapping[str, Any]]
    tokens: list[Mapping[str, Any]]
    report: list[str]
    assumptions: list[str]
    bounds: list[Mapping[str, Any]]
    flops: Mapping[str, Any]


class BackendRow(TypedDict):
    """One backend."""

    name: str
    ok: bool
    version: str
    devices: list[str]
    reason: str
    fix: str


class BackendsExplained(TypedDict):
    """``explain backends``."""

    backends: list[BackendRow]


class HardwareFacts(TypedDict):
    """This machine."""

    machine: str
    system: str
    cpu: str
    isa: list[str]
    cpus: int


class Diagnosed(TypedDict):
    """``doctor``."""

    backends: list[BackendRow]
    hardware: HardwareFacts
    versions: Mapping[str, str]


class SchemaList(TypedDict):
    """``schema``."""

    names: list[str]


class SchemaShown(TypedDict):
    """``schema NAME``."""

    name: str
    schema: Mapping[str, Any]


def documents() -> dict[str, tuple[type, ...]]:
    """Verb -> the types whose fields its document has, besides ``schema_version`` and ``verb``."""
    from tpcompile.compare.findings import Bisection
    from tpcompile.proof.parity import Parity
    from tpcompile.proof.verification import Verification
    from tpcompile.timing.latency import Latency

    return {
        "demo": (Demonstrated,), "export": (Exported,), "validate": (InBundle, Parity), "bench": (InBundle, Latency, Summed),
        "report": (Reported,), "inspect": (Inspected,), "run": (Ran,), "verify": (InBundle, Verification), "diff": (Compared,),
        "bisect": (Bisection,), "passes list": (PassList,), "passes show": (PassShown,), "recipe list": (RecipeList,),
        "recipe show": (RecipeShown,), "recipe schema": (RecipeSchema,), "recipe fit": (RecipeFitted,), "explain": (ErrorExplained,),
        "explain MODEL": (ModelExplained,), "explain backends": (BackendsExplained,), "doctor": (Diagnosed,),
        "schema": (SchemaList,), "schema NAME": (SchemaShown,),
    }  # fmt: skip
