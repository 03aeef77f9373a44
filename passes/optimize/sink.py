"""placed -> placed: rows that only survivors need are computed for survivors.

1. what leads to no decision, and what only newer sets read, is computed on the newer set: its row-wise ops (the product with the values,
   the output projection, the residual sum, the norm) run behind the gather instead of before it;
2. where fetching the rows of its operands costs more than they save, an op stays on the old set, and its result is fetched;
3. a result that a decision, a fold or an older set reads stays where it was;
4. with ``square``, so does one whose op would then run over two sets: a map of attention is fetched by rows and columns or not at all.
   Every shape follows from one count, as in an input that is no longer than that (docs/decisions/0029).

Nothing new has to be proved: an op moves along dims that are free in it, and its readers read the sets they read before. The graph stays
as it is; ``compact`` gathers, and puts what has moved behind the decision.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from tpcompile.passes.axesmap import AxesMap, Described
from tpcompile.passes.base import GraphPass
from tpcompile.passes.cost import Expected, Meter
from tpcompile.passes.levels import Levels
from tpcompile.program import Program, Stage


@dataclass(frozen=True)
class Sink(GraphPass):
    """Compute on the survivors only; the module docstring lists the cases.

    ``tokens`` and ``keep``: the count, and the share that every site keeps, at which fetching is weighed; ``balance``: operations that cost
    as much as moving one byte; ``square``: case 4.
    """

    name: ClassVar[str] = "sink"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.PLACED
    masked: ClassVar[bool] = True
    tokens: int = Expected.tokens
    keep: float = Expected.keep
    balance: float = Expected.balance
    square: bool = False

    def run(self, program: Program) -> Program:
        """Return the program with newer sets where they pay."""
        axes = AxesMap(program.graph)
        levels = Levels(program, axes, sunk=True, square=self.square)
        weigh = _Weigh(program, axes, levels, Meter(program, axes, Expected(self.tokens, self.keep, self.balance)))
        for call in axes.calls.values():
            weigh.lower(call)
        placements = {n.name: p for n in program.graph.nodes if (p := levels.placement(n))}
        moved = [name for name, placement in placements.items() if placement != program.placements.get(name)]
        report = f"sink: {len(moved)} results on a newer set, {len(weigh.left)} left where fetching their rows costs more than it saves"
        return replace(program, placements=placements, report=(*program.report, report))


class _Weigh:
    """Takes back, in program order, what does not pay.

    Args:
        program: the placed program.
        axes: its token dims.
        levels: the sets of its token dims, raised as far as they go; lowered here.
        meter: what an op and a gather cost.

    Attributes:
        left: names of the nodes that were lowered.
    """

    def __init__(self, program: Program, axes: AxesMap, levels: Levels, meter: Meter) -> None:
        self.program, self.axes, self.levels, self.meter = program, axes, levels, meter
        self.left: list[str] = []

    def lower(self, call: Described) -> None:
        """Leave a node on its old sets if that is cheaper."""
        node, old = call.node, self.program.placements.get(call.node.name)
        raised = {
            d: level for d in self.axes.token_dims(node) if (level := self.levels.get(node, d)) > (old.dims[d] if old else 0)
        }
        if not raised or call.factors is None or old is None:
            return
        before = self._cost(call)
        self._write(node, {d: old.dims[d] for d in raised})
        held = all(self.levels.factor(call, f) == old.dims[d] for d in raised if (f := call.factors.outs[0][d]) is not None)
        if held and self._cost(call) < before:
            self.left.append(node.name)
        else:
            self._write(node, raised)

    def _write(self, node: fx.Node, dims: dict[int, int]) -> None:
        self.levels.of.update({(node.name, d): level for d, level in dims.items()})

    def _cost(self, call: Described) -> float:
        """The op, the rows that it alone fetches of its operands, and the rows that its readers fetch of it."""
        assert call.factors is not None
        total = self.meter.work(call, lambda factor: self.levels.factor(call, factor))
        for operand in dict.fromkeys(call.operands):
            dims = [d for d in self.axes.token_dims(operand) if call.factors.ins[call.operands.index(operand)][d] is not None]
            for d in dims:
                mine = {level for reader, level in self._wants(operand, d) if reader is call.node}
                others = {level for reader, level in self._wants(operand, d) if reader is not call.node}
                total += sum(self._gather(operand, d, level) for level in mine - others)
        for d in self.axes.token_dims(call.node):
            total += sum(self._gather(call.node, d, level) for level in {level for _, level in self._wants(call.node, d)})
        return total

    def _gather(self, node: fx.Node, dim: int, level: int) -> float:
        return self.meter.gather(node, self.levels.placement(node).dims, dim, level)

    def _wants(self, node: fx.Node, dim: int) -> Iterator[tuple[fx.Node, int]]:
        """Readers that take a token dim on a newer set than the node's, with that set's level."""
        for reader in node.users:
            call = self.axes.calls.get(reader.name)
            if call is None or call.factors is None:
                continue
            for i, operand in enumerate(call.operands):
                factor = call.factors.ins[i][dim] if operand is node else None
                level = self.levels.factor(call, factor) if factor is not None else 0
                if level > self.levels.get(node, dim):
                    yield reader, level
