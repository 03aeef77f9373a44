"""marked -> marked: sites that do not pay are left masked.

1. a site that saves less than ``least`` of the program's cost at expected counts gives its hidden states back: its keep mask stays a mask,
   and the tokens that fall there are gathered away by the next site;
2. the sites behind it close up: their names and sets are numbered anew;
3. the last site that is left stays, whatever it saves, and so does one whose rows are restored to full length.

Nothing new has to be proved: masked form is what the model is, and ``place`` sees a program with fewer sites. What a site saves is the
cost of every op (``passes/cost.py``) on the set before it, less that on its own, less the gather.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import fx

from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.base import GraphPass
from tpcompile.passes.cost import Expected, Meter
from tpcompile.passes.levels import Levels
from tpcompile.passes.optimize.edit import rewritten
from tpcompile.passes.optimize.narrow import narrowed
from tpcompile.program import Program, Site, Stage


@dataclass(frozen=True)
class Skip(GraphPass):
    """Leave sites masked; the module docstring lists the cases.

    ``least``: the share of the program's cost that a site must save; ``tokens`` and ``keep``: the count, and the share that every site
    keeps, at which it is judged; ``balance``: operations that cost as much as moving one byte.
    """

    name: ClassVar[str] = "skip"
    takes: ClassVar[Stage] = Stage.MARKED
    gives: ClassVar[Stage] = Stage.MARKED
    masked: ClassVar[bool] = True
    least: float = 0.0
    tokens: int = Expected.tokens
    keep: float = Expected.keep
    balance: float = Expected.balance

    def run(self, program: Program) -> Program:
        """Return the program with the sites that pay."""
        price = _Price(program, Expected(self.tokens, self.keep, self.balance))
        fixed = {node.args[1] for node in program.graph.find_nodes(op="call_function", target=RESTORE)}
        free = [site for site in program.sites if program.node(site.keep) not in fixed]
        gone: dict[int, float] = {}
        while len(gone) + 1 < len(program.sites) and len(gone) < len(free):
            saved = {site.tokens.level: price.saved(site, gone) for site in free if site.tokens.level not in gone}
            level = min(saved, key=lambda one: saved[one])
            if saved[level] >= self.least:
                break
            gone[level] = saved[level]
        report = [
            f"skip: {site.name} at {site.where} is left masked: it saves {100 * gone[site.tokens.level]:.1f} % of the cost, "
            f"least is {100 * self.least:.1f} %"
            for site in program.sites
            if site.tokens.level in gone
        ]
        return _without(program, gone, report) if gone else replace(program, report=(*program.report, "skip: every site pays"))


class _Price:
    """What sites save, judged on the program as ``narrow`` and ``sink`` will make it.

    Args:
        program: a marked program.
        expected: the counts.
    """

    def __init__(self, program: Program, expected: Expected) -> None:
        draft, renamed, _ = narrowed(program)
        self.program = rewritten(program, draft, renamed, "")
        self.axes = AxesMap(self.program.graph)
        self.levels = Levels(self.program, self.axes, sunk=True)
        self.meter = Meter(self.program, self.axes, expected)
        self.sizes = list(self.meter.sizes)

    def saved(self, site: Site, gone: Collection[int]) -> float:
        """The share of the cost that a site saves where others are left out."""
        level = site.tokens.level
        x = next(
            n for n in self.program.graph.nodes if n.target is PRUNE and n.args[1].name == self.program.sites[level - 1].keep
        )
        source = x.args[0]
        assert isinstance(source, fx.Node)
        less, more = self._cost({*gone, level}), self._cost(gone)
        return (less - more - self.meter.gather(source, {1: level - 1}, 1, level)) / less

    def _cost(self, gone: Collection[int]) -> float:
        """The cost of all calls where these sets are as large as the ones before them."""
        sizes = list(self.sizes)
        for level in sorted(gone):
            sizes[level] = sizes[level - 1]
        self.meter.sizes = sizes
        return sum(self.meter.work(call, partial(self.levels.factor, call)) for call in self.axes.calls.values())


def _without(program: Program, gone: Collection[int], report: list[str]) -> Program:
    """The program without these sites."""
    draft = program.draft()
    keeps = {site.keep for site in program.sites if site.tokens.level in gone}
    for node in [n for n in draft.graph.find_nodes(op="call_function", target=PRUNE) if n.args[1].name in keeps]:
        node.replace_all_uses_with(node.args[0])
        draft.graph.erase_node(node)
    left = [site for site in program.sites if site.keep not in keeps]
    sites = tuple(replace(site, name=f"site{i}", tokens=replace(site.tokens, level=i + 1)) for i, site in enumerate(left))
    return program.adopt(draft, sites=sites, report=(*program.report, *report))
