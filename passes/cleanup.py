"""compact -> compact: equal gathers are made once, and what nobody reads is gone (scores of later sites stay: they decide)."""

from dataclasses import dataclass
from typing import ClassVar

from tpcompile.passes.base import GraphPass, share
from tpcompile.program import Program, Stage


@dataclass(frozen=True)
class Cleanup(GraphPass):
    """Share equal expressions and drop dead ones."""

    name: ClassVar[str] = "cleanup"
    takes: ClassVar[Stage] = Stage.COMPACT
    gives: ClassVar[Stage] = Stage.COMPACT

    def run(self, program: Program) -> Program:
        """Return the cleaned program."""
        return share(program)
