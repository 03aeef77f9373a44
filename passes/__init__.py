"""The graph-rewriting passes. The order is the page: ``DEFAULT`` is the whole pipeline."""

from collections.abc import Sequence

from tpcompile.passes.base import Dump, GraphPass, Hook, Pipeline
from tpcompile.passes.canonicalize import Canonicalize
from tpcompile.passes.cleanup import Cleanup
from tpcompile.passes.compact import Compact
from tpcompile.passes.impose import Impose
from tpcompile.passes.lower import Lower
from tpcompile.passes.mark import Mark
from tpcompile.passes.optimize.hoist import Hoist
from tpcompile.passes.optimize.narrow import Narrow
from tpcompile.passes.optimize.sink import Sink
from tpcompile.passes.optimize.skip import Skip
from tpcompile.passes.optimize.tally import Tally
from tpcompile.passes.place import Place
from tpcompile.passes.recognise import Recognise
from tpcompile.passes.verify import verify

PLACED: tuple[GraphPass, ...] = (Narrow(), Tally(), Hoist(), Sink())
"""What saves work in a placed program, in order."""
GATHERED: tuple[GraphPass, ...] = (Compact(), Cleanup())
"""What makes a placed program a gathered one."""
SQUARE = Pipeline((Sink(square=True), *GATHERED))
"""From what stands before ``sink`` on: a gathered program whose ops run over one count each (docs/decisions/0029)."""


def pipeline(batch: str = "one", assume_masked: Sequence[str] = (), optimize: bool = True, skip_below: float = 0.0) -> Pipeline:
    """The whole pipeline.

    Args:
        batch: policy, ``one`` or ``ragged``.
        assume_masked: sites whose dropped tokens are taken to be masked where that cannot be proved.
        optimize: save what the papers count as needed; without, every op stands at the tokens alive where the model has it.
        skip_below: leave sites masked that save less than this share of the cost; 0 keeps every site. ``assume_masked`` then counts those
            that are left.
    """
    skip = (Skip(skip_below),) if skip_below else ()
    prove = (Canonicalize(), Recognise(batch), Mark(batch), *skip, Place("+".join(assume_masked)))
    return Pipeline((*prove, *(PLACED if optimize else ()), *GATHERED))


DEFAULT = pipeline()

PASSES: dict[str, type[GraphPass]] = {step.name: type(step) for step in (*DEFAULT.passes, Impose(), Skip(), Lower())}

__all__ = [
    "DEFAULT",
    "SQUARE",
    "PASSES",
    "Canonicalize",
    "Cleanup",
    "Compact",
    "Dump",
    "GraphPass",
    "Hook",
    "Hoist",
    "Impose",
    "Lower",
    "Mark",
    "Narrow",
    "Pipeline",
    "Place",
    "Recognise",
    "Sink",
    "Skip",
    "Tally",
    "pipeline",
    "verify",
]
