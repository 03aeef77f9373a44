"""compact -> compact: what nobody reads is gone.

1. equal gathers are made once, and dead ops go; scores of later sites stay: they decide;
2. a score that only its own site was told of, and that decides nothing, is no tap of the engine any more: runtimes compute every value of a
   graph, read or not. The masked reference still shows it, and a site of constant count still ranks by it;
3. an operand that changes nothing goes, and the op with it: a mask that hides nothing before the first site.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from tpcompile.ops import COMPACT
from tpcompile.passes.base import GraphPass, share
from tpcompile.passes.neutral import plain
from tpcompile.program import Program, Stage


@dataclass(frozen=True)
class Cleanup(GraphPass):
    """Share equal expressions and drop dead ones; the module docstring lists the cases."""

    name: ClassVar[str] = "cleanup"
    takes: ClassVar[Stage] = Stage.COMPACT
    gives: ClassVar[Stage] = Stage.COMPACT

    def run(self, program: Program) -> Program:
        """Return the cleaned program."""
        if program.gathered:
            return share(program)
        cleaned = share(plain(program))
        told = {site.score for site in cleaned.sites if site.score and _only_told(cleaned.node(site.score))}
        sites = tuple(replace(site, score="") if site.score in told else site for site in cleaned.sites)
        return replace(cleaned, sites=sites) if told else cleaned


def _only_told(score: fx.Node) -> bool:
    """Whether nothing but sites reads a score, and the caller did not give it."""
    return score.op == "call_function" and all(reader.target is COMPACT and reader.args[1] is not score for reader in score.users)
