"""compact -> compact: how many rows every site stores.

1. ``buckets``: the count rounded up to the next rung of a ladder, filled with dropped rows of the same sample;
2. ``counts``: a constant for each site. A sample that keeps more loses its lowest scores: ``fit`` takes them out of the keep mask, and all
   that reads the mask reads what is left of it, so that such a sample is computed as the masked model would under the smaller mask;
3. neither: exactly the kept and pinned rows, as ``compact`` leaves it;
4. ``exact``: the same, and where all of them are kept in every run, no row goes along to make a count of two, and what masked
   dropped rows behind that site masks nothing and goes. With a batch, samples differ in count: nothing changes there.

A site whose keep mask shows a constant count stores that count already; a ladder leaves it so.

Any stored set that holds the kept tokens is exact (docs/decisions/0002). This pass must run last: one that relies on how many rows a site
stores would rely on the wrong number.
"""

from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import ClassVar

from torch import fx

from tpcompile.errors import UsageError
from tpcompile.ops import COMPACT, FIT
from tpcompile.passes.base import GraphPass, ancestors, share
from tpcompile.passes.neutral import plain
from tpcompile.program import Program, Site, Stage
from tpcompile.rows import MIN_COUNT, Rows


@dataclass(frozen=True)
class Lower(GraphPass):
    """Choose how many rows the sites store; the module docstring lists the cases.

    Attributes:
        buckets: rising sizes joined by ``+``: ``16``, ``32+64+128``.
        counts: a constant count for each site, joined by ``+``: ``80+40``.
        exact: case 4.
    """

    name: ClassVar[str] = "lower"
    takes: ClassVar[Stage] = Stage.COMPACT
    gives: ClassVar[Stage] = Stage.COMPACT
    buckets: str = ""
    counts: str = ""
    exact: bool = False

    def run(self, program: Program) -> Program:
        """Return the program with the policy written at its sites.

        Raises:
            UsageError: two are given, one cannot be read, or the counts do not fit the sites.
        """
        if program.gathered and not program.rows:
            return self._through(program)
        own = tuple(_own(site) for site in program.sites)
        if program.rows != own:
            raise UsageError("the program is lowered already", fix="lower the program that `compact` and `cleanup` gave")
        if self.exact:
            return self._exactly(program)
        draft = program.draft()
        nodes = list(draft.graph.find_nodes(op="call_function", target=COMPACT))
        for node, rows, constant in zip(nodes, self._policies(program), own, strict=True):
            if constant.limit and not self.counts:
                continue
            x, keep, pinned, score = [*node.args, None][:4]
            node.args = (x, keep, pinned, score, *((list(rows.ladder), rows.limit) if rows != Rows() else ()))
            if rows.limit:
                _fit(draft.graph, node, rows.limit)
        return program.adopt(draft)

    def _through(self, program: Program) -> Program:
        """The program of a model whose counts are constants of its own."""
        if self.buckets or self.counts:
            raise UsageError(
                "the model gathers constant counts by itself: there is nothing to lower", fix="leave the lowering at auto"
            )
        return program

    def _exactly(self, program: Program) -> Program:
        """Case 4. Sites that store all they keep need no look at what is pinned: it is kept."""
        if self.buckets or self.counts:
            raise UsageError("what is stored exactly has no buckets and no constant counts", fix="give one of the three")
        whole = {site.node for site, rows in zip(program.sites, program.rows, strict=True) if site.whole and rows == Rows()}
        draft = program.draft()
        for node in [node for node in draft.graph.nodes if node.name in whole]:
            x, keep, _, score = [*node.args, None][:4]
            node.args = (x, keep, keep, score, None, 0, True)
        levels = {site.tokens.level for site in program.sites if site.node in whole}
        return share(plain(program.adopt(draft, refresh=False), levels)) if whole else program

    def _policies(self, program: Program) -> list[Rows]:
        sites = len(program.sites)
        if self.buckets and self.counts:
            raise UsageError("buckets and constant counts exclude each other", fix="give one of the two")
        if self.counts:
            return self._constant(sites, max(site.pinned for site in program.sites))
        try:
            ladder = tuple(int(size) for size in self.buckets.split("+")) if self.buckets else ()
            return list(repeat(Rows(ladder), sites))
        except ValueError as error:
            raise UsageError(f"buckets: {error}", fix="give sizes such as 16, or 32+64+128") from error

    def _constant(self, sites: int, pinned: int) -> list[Rows]:
        least = max(MIN_COUNT, pinned)
        counts = self.counts.split("+")
        if len(counts) != sites or not all(one.isdigit() and int(one) >= least for one in counts):
            raise UsageError(
                f"counts {self.counts.replace('+', ', ')} do not fit {sites} sites",
                fix=f"give a count of {least} or more for each site",
            )
        return [Rows(limit=int(one)) for one in counts]


def _own(site: Site) -> Rows:
    """What a site stores before it is lowered."""
    return Rows() if site.most is None else Rows(limit=max(site.most, MIN_COUNT))


def _fit(graph: fx.Graph, site: fx.Node, limit: int) -> None:
    """Put what fits in the place of the keep mask, but where the score itself reads it."""
    keep, pinned, score = site.args[1:4]
    assert isinstance(keep, fx.Node)
    with graph.inserting_before(site):
        fits = graph.call_function(FIT, (keep, pinned, score, limit))
    fits.meta = {k: v for k, v in site.meta.items() if k in ("stack_trace", "nn_module_stack")}
    before = ancestors(fits)
    keep.replace_all_uses_with(fits, lambda user: user not in before and user is not fits)
    _sort(graph)


def _sort(graph: fx.Graph) -> None:
    """Bring the nodes into an order that computes every value before its readers; else the order stays."""
    order: dict[fx.Node, None] = {}

    def place(node: fx.Node) -> None:
        for missing in [one for one in node.all_input_nodes if one not in order]:
            place(missing)
        order.setdefault(node)

    for node in graph.nodes:
        place(node)
    for first, second in pairwise(order):
        first.append(second)
