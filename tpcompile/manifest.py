"""The schema of ``tpcompile.json``: what a bundle says about itself, and its identity."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from tpcompile.rows import Rows
from tpcompile.spec import Patches, TensorSpec


def _relative(name: str) -> str:
    """A path inside the bundle in its one spelling: no root, no drive, no ``..``, no backslash."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or str(path) != name:
        raise ValueError(f"{name!r} is not a path inside the bundle")
    return name


Relative = Annotated[str, AfterValidator(_relative)]
PLAN = re.compile(r"\.plan(\.json)?$")
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Term = tuple[int | float, tuple[str, ...]]
MOST_COPIES = 64
"""A manifest that asks for more is refused: each is compiled when the engine is loaded."""
MOST_SIZES = 256
"""A manifest that asks for more is refused: each is run when the engine is loaded."""
TAP = re.compile(r"site\d+\.\w+")
"""Names that an engine has for what its sites decide."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelInfo(_Record):
    """Where the weights came from: ``sha256`` is theirs, not a file's."""

    id: str
    family: str
    architecture: str
    sha256: str


class MethodInfo(_Record):
    """The pruning method and its parameters, enough to build the masked model again."""

    name: str
    parameters: dict[str, JsonValue] = {}


class FittedInfo(_Record):
    """How the method's parameters came to their values: ``moves`` times ``factor``, so that samples of ``data`` cost a FLOPs ratio.

    ``reached`` is by the papers' count (``Flops.paper``); of a method that gathers by itself, what its eager runs multiply.
    """

    target: float
    reached: float
    factor: float
    moves: tuple[str, ...]
    samples: Annotated[int, Field(ge=1)]
    data: str

    def text(self) -> str:
        """One sentence."""
        moved, wanted = ", ".join(self.moves), f"{self.target:g}"
        return f"{moved} by {self.factor:.4g}: FLOPs /{self.reached:.3f} on {self.samples} samples of {self.data} (asked for /{wanted})"


class SiteInfo(_Record):
    """One prune site: the user's line (``where``), its module, in words which tokens it keeps; ``score``: it has that tap.

    ``form``: ``masked``: the reference masks where the engine gathers; ``gathered``: the model gathers by itself, reference and engine
    alike; ``merged``: and merges tokens (the tap ``into``).
    """

    name: str
    module: str = ""
    where: str = ""
    keeps: str = ""
    score: bool = True
    form: Literal["masked", "gathered", "merged"] = "masked"

    def taps(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """Those of these kinds of taps that the site has, and those that a model brings along that gathers by itself."""
        has = {"score": self.score, "index": self.form != "masked" or "index" in kinds, "into": self.form == "merged"}
        wanted = {*kinds, "index", "into"}
        return tuple(kind for kind in ("keep", "score", "index", "into") if kind in wanted and has.get(kind, True))


class TensorInfo(_Record):
    """A :class:`~tpcompile.spec.TensorSpec` in JSON."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> "TensorInfo":
        """The JSON form of a spec."""
        return cls(name=spec.name, dtype=spec.dtype, shape=spec.shape)

    @property
    def spec(self) -> TensorSpec:
        """The spec of this JSON form."""
        return TensorSpec(self.name, self.dtype, self.shape)


class StepInfo(_Record):
    """One gather between two stages, see ``tpcompile.chain``: what it does, the values it reads, the one it gives, and its numbers."""

    op: Literal["store", "take", "gather", "row", "reshape", "unsqueeze"]
    reads: tuple[str, ...]
    gives: str
    numbers: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        reads, numbers = STEPS[self.op]
        if len(self.reads) != reads or len(self.numbers) not in numbers:
            raise ValueError(f"{self.op} does not read {len(self.reads)} values by {len(self.numbers)} numbers")
        if self.op == "store":
            Rows(self.numbers[1:], self.numbers[0])
        return self


STEPS = {
    "store": (2, range(1, 1000)), "take": (2, range(2, 3)), "gather": (2, range(1, 2)), "row": (1, range(2, 3)),
    "reshape": (1, range(16)), "unsqueeze": (1, range(1, 16)),
}  # fmt: skip
"""Op of a step -> how many values it reads, and how many numbers it may have: of ``store`` the limit, then the
ladder, which no caller makes this long; of ``reshape`` and ``unsqueeze`` a number a dim."""


class StageInfo(_Record):
    """One stage of a chain: the gathers before it, and what its engine takes and gives; without outputs it has no engine."""

    steps: tuple[StepInfo, ...] = ()
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()


class PatchesInfo(_Record):
    """A :class:`~tpcompile.spec.Patches` in JSON."""

    prefix: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, patches: Patches) -> "PatchesInfo":
        """The JSON form of a grid."""
        return cls(prefix=patches.prefix, rows=patches.rows, columns=patches.columns)

    @property
    def spec(self) -> Patches:
        """The grid of this JSON form."""
        return Patches(self.prefix, self.rows, self.columns)


class BoundInfo(_Record):
    """A finite mask the proof relies on; the reference's tap ``bound<i>`` tells how far dropped keys lie below their row's largest."""

    where: str
    module: str
    limit: float


class Flops(_Record):
    """Floating-point operations (a multiply-accumulate is two), as sums of ``coefficient * product(token set sizes)``; see ``flops.py``."""

    tokens: tuple[str, ...] = ()
    paper: tuple[Term, ...] = ()
    graph: tuple[Term, ...] = ()
    dense: tuple[Term, ...] = ()


class FileInfo(_Record):
    """What a file must be: sha256 in hex, size in bytes."""

    sha256: Digest
    size: Annotated[int, Field(ge=0)]


class Manifest(_Record):
    """``tpcompile.json``. Everything but plans, ``environment`` and ``measured`` is the same for the same input.

    Attributes:
        note: what a reader must know about the weights; empty as a rule.
        fitted: how the method's parameters were fitted to a FLOPs ratio; None where they were given.
        buckets: the ladder of lowering ``bucketed``.
        counts: the constant count of each site, for lowering ``static``.
        lengths: the ladder that the length of an input is rounded up to; empty: inputs run as they come.
        padding: the input ``[B, N]`` that tells tokens, 1, from padding, 0; for ``lengths``.
        reason: why this lowering and form.
        stages: of form ``staged``, in order; values go from one to later ones by name.
        ranges: input name -> smallest and largest value, such as the vocabulary for ``input_ids``; not every runtime checks.
        attended: inputs ``[B, N]`` that the proof takes to hold 0 and 1, and 1 at position 0.
        patches: which part of the image each token is; None where the tokens are no patches.
        dims: dynamic dim name -> smallest and largest size.
        capabilities: of the GPUs that it was built for, where somebody chose.
        verified_on: kinds of device that tpcompile's tests have run engines of this target on; empty: it was built, and never run.
        parts: sub-bundle folder -> its identity, which becomes part of this one's. Its own manifest hashes its files.
        primed: inputs in ``prime.safetensors`` that ``load`` runs, so that the shapes to come are no longer new.
        swept: sizes of the one dynamic dim that ``load`` cuts the one input to; empty: they run as they are.
        copies: of the engine that ``load`` opens, each for inputs of other lengths.
        files: path in the bundle -> hash and size, but for parts, reports and the manifest itself.
    """

    schema_version: Literal[1] = 1
    target: Annotated[str, Field(pattern="^[a-z][a-z0-9-]*$")]
    role: Literal["pruned", "dense"]
    model: ModelInfo
    note: str = ""
    method: MethodInfo | None = None
    fitted: FittedInfo | None = None
    sites: tuple[SiteInfo, ...] = ()
    lowering: str = "dynamic"
    form: str = "single"
    buckets: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    padding: str = ""
    reason: str = ""
    stages: tuple[StageInfo, ...] = ()
    batch: str = "one"
    dims: dict[str, tuple[int, int]] = {}
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ranges: dict[str, tuple[int, int]] = {}
    attended: tuple[str, ...] = ()
    patches: PatchesInfo | None = None
    precision: str = "fp32"
    capabilities: tuple[str, ...] = ()
    verified_on: tuple[str, ...] = ("cpu",)
    pipeline: str = ""
    assumptions: tuple[str, ...] = ()
    bounds: tuple[BoundInfo, ...] = ()
    flops: Flops = Flops()
    tolerance: dict[str, float] = {}
    primed: Annotated[int, Field(ge=0)] = 0
    swept: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=MOST_SIZES)] = ()
    copies: Annotated[int, Field(ge=1, le=MOST_COPIES)] = 1
    parts: dict[Relative, Digest] = {}
    files: dict[Relative, FileInfo] = {}
    environment: dict[str, JsonValue] = {}
    measured: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        Rows(self.lengths)
        if self.copies > 1 and self.form == "staged":
            raise ValueError("stages have no copies")
        wanted = {*self.attended, *((self.padding,) if self.lengths else ())}
        if self.swept and (len(self.dims), self.primed) != (1, 1):
            raise ValueError("one input is cut to sizes, along one dim")
        missing = sorted(wanted - {tensor.name for tensor in self.inputs})
        if missing:
            raise ValueError(f"there is no input {', '.join(missing)}")
        return self

    @property
    def along(self) -> dict[str, int]:
        """Output name -> the dim that runs over an input's tokens, for outputs with a row per token."""
        lengths = {size for tensor in self.inputs for size in tensor.shape[1:] if isinstance(size, str)}
        return {tensor.name: d for tensor in self.outputs for d, size in enumerate(tensor.shape) if d and size in lengths}

    @property
    def identity(self) -> str:
        """sha256 of the canonical JSON of everything that does not depend on when and where.

        What is at its default is left out: a later version of tpcompile that knows more fields finds the same. So are a builder's
        plans and their labels: two builds of one graph differ in their bytes.
        """
        document = self.model_dump(mode="json", exclude={"environment", "measured"}, exclude_defaults=True)
        if "files" in document:
            document["files"] = {name: entry for name, entry in document["files"].items() if not PLAN.search(name)}
        return hashlib.sha256(canonical(document).encode()).hexdigest()


def canonical(document: object) -> str:
    """JSON in its one spelling: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
