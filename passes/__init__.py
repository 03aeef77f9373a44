"""The graph-rewriting passes. The order is the page: ``DEFAULT`` is the whole pipeline."""

from tpcompile.passes.base import Dump, GraphPass, Hook, Pipeline
from tpcompile.passes.canonicalize import Canonicalize
from tpcompile.passes.cleanup import Cleanup
from tpcompile.passes.compact import Compact
from tpcompile.passes.mark import Mark
from tpcompile.passes.place import Place
from tpcompile.passes.verify import verify


def pipeline(batch: str = "one") -> Pipeline:
    """The whole pipeline for a batch policy, ``one`` or ``ragged``."""
    return Pipeline((Canonicalize(), Mark(batch), Place(), Compact(), Cleanup()))


DEFAULT = pipeline()

PASSES: dict[str, type[GraphPass]] = {step.name: type(step) for step in DEFAULT.passes}

__all__ = [
    "DEFAULT",
    "PASSES",
    "Canonicalize",
    "Cleanup",
    "Compact",
    "Dump",
    "GraphPass",
    "Hook",
    "Mark",
    "Pipeline",
    "Place",
    "pipeline",
    "verify",
]
