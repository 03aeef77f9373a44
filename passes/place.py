"""marked -> placed: give every tensor its token sets, and prove that dropping equals masking.

One fix-point over the axis rules:

1. dims that share a factor with a site's token axis are token dims, forward and backward (``axesmap``);
2. forward, a factor runs over the newest set among its operands; a site's result runs over the set born there (``levels``);
3. backward, a result that only newer sets read is computed on the newer set at once (masks are gathered once, as bools);
4. each fold over a pruned set must see its neutral value at every dropped token (``facts``), or ``UnmaskedFold``;
5. each position read on a pruned set is pinned when it counts from the front, or ``RigidAxis``;
6. each keep mask is contained in the earlier ones, or ``RevivedToken``; an op without a rule on a pruned set is ``UnknownOp``;
7. a softmax whose keys may all be masked must not reach a decision or an output, or ``UnmaskedFold``;
8. ``restore`` runs over the set of its base, and takes no dropped token from its rows, nor does ``memory``, or ``RevivedToken``;
9. with a batch, nothing that runs over pruned tokens mixes samples, or ``RigidAxis``: each sample has a set of its own;
10. a model that gathers by itself has nothing to prove: its sets are the axes that begin at its sites.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.errors import RevivedToken, RigidAxis, TokenMismatch, UnmaskedFold, UsageError
from tpcompile.ops import MEMORY, PRUNE, RESTORE
from tpcompile.passes.assumptions import assumptions, bounds
from tpcompile.passes.axesmap import LOOSE, AxesMap, Described
from tpcompile.passes.base import GraphPass
from tpcompile.passes.counts import most
from tpcompile.passes.facts import Facts
from tpcompile.passes.levels import Levels, native, refusal
from tpcompile.passes.rules import Held
from tpcompile.passes.values import ZERO, Value
from tpcompile.program import Program, Stage, where_of


@dataclass(frozen=True)
class Place(GraphPass):
    """Follow token axes and prove the sites; the module docstring lists the cases.

    ``assume_masked``: sites, joined by ``+``, whose dropped tokens are taken to be masked where unproved; what is taken is recorded.
    """

    name: ClassVar[str] = "place"
    takes: ClassVar[Stage] = Stage.MARKED
    gives: ClassVar[Stage] = Stage.PLACED
    assume_masked: str = ""

    def run(self, program: Program) -> Program:
        """Return the program with placements, pinned sites and assumptions."""
        axes = AxesMap(program.graph)
        if program.gathered:
            return replace(program, placements=native(program, axes))
        if len(axes.roots) > 1:
            last = program.node(program.sites[-1].node)
            fix = "prune one sequence per program; export the encoders apart"
            raise refusal(TokenMismatch, last, "sites prune two unrelated token axes", fix)
        if axes.roots & axes.samples:
            last = program.node(program.sites[-1].node)
            raise refusal(
                TokenMismatch, last, "one axis is both tokens and samples here", "keep batch and tokens on axes of their own"
            )
        levels = Levels(program, axes)
        keeps = {s.keep: s.tokens.level for s in program.sites}
        facts = Facts(program.graph, axes, keeps, program.constants(), program.bits, levels.nested)
        proof = Proof(program, axes, levels, facts, frozenset(filter(None, self.assume_masked.split("+"))))
        pins = proof.check()
        sites = tuple(
            replace(s, pinned=max(pins.get(k, 0) for k in range(s.tokens.level, len(program.sites) + 1))) for s in program.sites
        )
        alone = not axes.samples and not program.graph.find_nodes(
            op="call_function", target=MEMORY
        )  # which holds two rows at least
        sites = tuple(
            replace(
                s,
                most=most(program.node(s.keep), max(s.pinned, 1)),
                whole=alone and s.pinned <= 1 and facts.first_kept(s.tokens.level),
            )
            for s in sites
        )
        placements = {n.name: p for n in program.graph.nodes if (p := levels.placement(n))}
        assumed = (*program.assumptions, *proof.assumed, *dict.fromkeys(assumptions(program, axes, facts)))
        return replace(
            program, sites=sites, placements=placements, assumptions=assumed, bounds=tuple(bounds(program, axes, facts))
        )


class Proof:
    """The obligations of a placed graph; ``check`` raises at the first one that fails, in program order.

    Args:
        program: a marked program.
        axes: its token dims.
        levels: their sets.
        facts: what dropped tokens hold.
        trusted: names of sites whose dropped tokens are taken to be masked.

    Attributes:
        assumed: what was taken on trust, one sentence each.

    Raises:
        UsageError: a trusted site does not exist.
    """

    def __init__(
        self, program: Program, axes: AxesMap, levels: Levels, facts: Facts, trusted: frozenset[str] = frozenset()
    ) -> None:
        self.program, self.axes, self.levels, self.facts, self.trusted = program, axes, levels, facts, trusted
        self.pins: dict[int, int] = {}
        self.assumed: list[str] = []
        unknown = trusted - {site.name for site in program.sites}
        if unknown:
            known = ", ".join(site.name for site in program.sites)
            raise UsageError(f"assume_masked names no site: {', '.join(sorted(unknown))}", fix=f"sites are {known}")

    def check(self) -> dict[int, int]:
        """Return, per set, how many leading positions must be pinned."""
        for node in self.program.graph.nodes:
            if node.name in self.axes.calls:
                self._call(self.axes.calls[node.name])
            elif node.op == "output":
                self._outputs(node)
        return self.pins

    def _call(self, call: Described) -> None:
        if call.factors is None:
            return
        for op, check in ((PRUNE, self._site), (RESTORE, self._restore), (MEMORY, self._memory)):
            if call.node.target is op:
                check(call)
                return
        for factor, level in self._pruned(call):
            if self.axes.mixes(call):
                self._mixed(call, level)
            if any(f.startswith(LOOSE) for f in call.factors.names):
                self._rigid(call, level)
            if factor in call.factors.rigid:
                self._rigid(call, level)
            elif factor in call.factors.folds:
                self._fold(call, factor, level)
            elif factor in call.factors.reads:
                self._read(call, call.factors.reads[factor][1], level)

    def _pruned(self, call: Described) -> Iterator[tuple[str, int]]:
        assert call.factors is not None
        for factor in sorted(call.factors.names):
            dims = [(n, d) for i, n in enumerate(call.operands) for d in call.of(i, factor)]
            if any(self.axes.is_token(n, d) for n, d in dims) and (level := self.levels.factor(call, factor)) > 0:
                yield factor, level

    def _fold(self, call: Described, factor: str, level: int) -> None:
        assert call.factors is not None
        hidden = self.neutral(call, factor, call.factors.folds[factor])
        for cls in range(1, level + 1):
            if cls not in hidden:
                site = self.program.sites[cls - 1]
                if site.name in self.trusted:
                    place = where_of(call.node)
                    self.assumed.append(
                        f"{place.short} ({place.module}): tokens that {site.name} dropped are masked, as the caller says"
                    )
                    continue
                raise refusal(
                    UnmaskedFold, call.node,
                    f"{call.node.target} combines over tokens that {site.name} ({site.where.short}) dropped, and nothing masks them there",
                    "multiply by the keep mask before a sum, or fill with -inf or -1e4 before a softmax or max; "
                    "the masked model reads dropped tokens here",
                )  # fmt: skip

    def neutral(self, call: Described, factor: str, neutral: float) -> set[int]:
        """The classes at which a fold sees its neutral value: a mask far below the living, or an exact zero beside finite numbers."""
        if neutral == NEG_INF:
            return {*self.facts.masked(call, factor), *self._least(call, factor)}
        found = set()
        for cls in range(1, len(self.program.sites) + 1):
            values = self.facts.folded(call, factor, cls)
            if Value.of(neutral) in values and (neutral != 0.0 or all(v.finite for v in values)):
                found.add(cls)
        return found

    def _least(self, call: Described, factor: str) -> set[int]:
        """The classes that a maximum may lose because nothing lies below them: what is stored is as large."""
        if call.rule is None or call.rule.held is not Held.SAME:
            return set()
        values = {cls: self.facts.folded(call, factor, cls)[0] for cls in self.facts.classes if cls != 0}
        least = min(value.floor for value in values.values())
        return {
            cls for cls, v in values.items() if cls > 0 and v.exact and v.lo <= least and all(o.finite for o in values.values())
        }

    def _rigid(self, call: Described, level: int) -> None:
        raise refusal(
            RigidAxis, call.node, f"{call.node.target} reads positions or the count of tokens, and t{level} has lost some",
            "compute it before the first site, read position 0, or pool with the keep mask",
        )  # fmt: skip

    def _mixed(self, call: Described, level: int) -> None:
        raise refusal(
            RigidAxis, call.node, f"{call.node.target} mixes samples of the batch, and each has its own t{level}",
            "keep the batch on a dim of its own (no view of batch and heads as one), or export with batch one",
        )  # fmt: skip

    def _read(self, call: Described, stop: int, level: int) -> None:
        if stop == 1 and self.facts.first_kept(level):
            return
        self.pins[level] = max(self.pins.get(level, 0), stop)

    def _site(self, call: Described) -> None:
        keep = call.operands[1]
        level = self.levels.get(call.node, 1)
        self._one_axis(call)
        before = self.facts.before[keep.name]
        for cls in range(1, level):
            if before.at(1, cls) != ZERO:
                earlier = self.program.sites[cls - 1]
                raise refusal(
                    RevivedToken, call.node, f"a token dropped at {earlier.name} ({earlier.where.short}) could be kept here again",
                    "write keep = earlier_keep & (score >= threshold)",
                )  # fmt: skip
        self._settled(keep, call.node, "the decision")

    def _one_axis(self, call: Described) -> None:
        if self.axes.token_dims(call.node) != [1]:
            fix = "drop rows of hidden states [B, N, C], not of a map over tokens"
            raise refusal(TokenMismatch, call.node, "the channels of these rows are tokens as well", fix)

    def _restore(self, call: Described) -> None:
        x, keep, base = call.operands
        self._one_axis(call)
        newest = max(self.levels.get(x, 1), self.levels.get(keep, 1))
        self._taken(call.node, keep, range(self.levels.get(base, 1) + 1, newest + 1))

    def _memory(self, call: Described) -> None:
        x, keep = call.operands
        self._taken(call.node, keep, range(1, max(self.levels.get(x, 1), self.levels.get(keep, 1)) + 1))
        self._settled(keep, call.node, "the mask of a memory")

    def _taken(self, node: fx.Node, keep: fx.Node, dropped: range) -> None:
        """Demand that a mask is False wherever one of some sites dropped."""
        for cls in dropped:
            if self.facts[keep].at(1, cls) != ZERO:
                earlier = self.program.sites[cls - 1]
                name = str(node.target).removeprefix("tpcompile.").removesuffix(".default")
                raise refusal(
                    RevivedToken, node, f"{name} may take a token from rows where {earlier.name} ({earlier.where.short}) dropped it",
                    "pass the keep mask of the last site before it",
                )  # fmt: skip

    def _outputs(self, node: fx.Node) -> None:
        results = node.args[0]
        assert isinstance(results, (tuple, list))
        for name, result in zip(self.program.output_names, results, strict=True):
            if not isinstance(result, fx.Node):
                continue
            if (level := self.levels.highest(result)) > 0:
                raise refusal(
                    RigidAxis, result, f"output {name!r} has one row per token, and t{level} has lost some",
                    "bring the rows back with ops.restore(x, keep, base), or return a pooled output",
                )  # fmt: skip
            self._settled(result, result, f"output {name!r}")

    def _settled(self, node: fx.Node, at: fx.Node, what: str) -> None:
        if self.facts[node].pending:
            site = self.program.sites[self.facts[node].pending - 1]
            raise refusal(
                UnmaskedFold, at,
                f"{what} may read a softmax row whose keys were all dropped by {site.name} ({site.where.short}): "
                "it falls back to dropped tokens",
                "keep a prefix token (keep = keep | first), or multiply the softmax by the keep mask of its queries",
            )  # fmt: skip
