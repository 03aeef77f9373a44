"""The graph-rewriting passes. The order is the page: ``DEFAULT`` is the whole pipeline."""

from collections.abc import Sequence

from tpcompile.passes.base import Dump, GraphPass, Hook, Pipeline
from tpcompile.passes.canonicalize import Canonicalize
from tpcompile.passes.cleanup import Cleanup
from tpcompile.passes.compact import Compact
from tpcompile.passes.lower import Lower
from tpcompile.passes.mark import Mark
from tpcompile.passes.optimize.hoist import Hoist
from tpcompile.passes.optimize.narrow import Narrow
from tpcompile.passes.optimize.sink import Sink
from tpcompile.passes.place import Place
from tpcompile.passes.recognise import Recognise
from tpcompile.passes.verify import verify

PLACED: tuple[GraphPass, ...] = (Narrow(), Hoist(), Sink())
"""What saves work in a placed program, in order."""


def pipeline(batch: str = "one", assume_masked: Sequence[str] = (), optimize: bool = True) -> Pipeline:
    """The whole pipeline.

    Args:
        batch: policy, ``one`` or ``ragged``.
        assume_masked: sites whose dropped tokens are taken to be masked where that cannot be proved.
        optimize: save what the papers count as needed; without, every op stands at the tokens alive where the model has it.
    """
    prove = (Canonicalize(), Recognise(batch), Mark(batch), Place("+".join(assume_masked)))
    return Pipeline((*prove, *(PLACED if optimize else ()), Compact(), Cleanup()))


DEFAULT = pipeline()

PASSES: dict[str, type[GraphPass]] = {step.name: type(step) for step in (*DEFAULT.passes, Lower())}

__all__ = [
    "DEFAULT",
    "PASSES",
    "Canonicalize",
    "Cleanup",
    "Compact",
    "Dump",
    "GraphPass",
    "Hook",
    "Hoist",
    "Lower",
    "Mark",
    "Narrow",
    "Pipeline",
    "Place",
    "Recognise",
    "Sink",
    "pipeline",
    "verify",
]
