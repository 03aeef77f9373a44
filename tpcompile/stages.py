"""Cut a compact program at its sites: a chain of programs without data-dependent sizes, and the gathers between them.

Every value has a *time*. Stage ``s`` computes at time ``2 s``; between stage ``i`` and ``i + 1``, at ``2 i + 1``, the runtime gathers. A site belongs to the
first such time after what it reads; a gather by its positions happens there too, if what is gathered exists by then, so that a stage
sees rows of one size; everything else belongs to the next stage. What is computed from weights alone, and sizes, are written again in every
stage that reads them. The rest crosses by name, whatever it is.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tpcompile.capture import capture
from tpcompile.errors import TpcompileError, UsageError, first_line
from tpcompile.manifest import StageInfo, StepInfo, TensorInfo
from tpcompile.ops import COMPACT, TAKE
from tpcompile.program import Program
from tpcompile.rows import MIN_COUNT
from tpcompile.spec import TensorSpec

aten = torch.ops.aten
WEIGHT = -1
"""The time of what no input reaches."""
SINGLE = "export with form single"
SIZES = (29, 23, 19, 17, 13, 11, 7, 5, 3)
"""Sizes of dynamic dims while a stage is traced: each its own, so that none is taken for another."""


@dataclass(frozen=True)
class Chain:
    """A program in stages.

    Attributes:
        programs: the stages, in order; captured form, sizes as dims.
        stages: what happens before each of them, and what it takes and gives.
        taps: ``site<i>.<what>`` -> the value.
        outputs: of the whole chain; the value of that name.
    """

    programs: tuple[Program, ...]
    stages: tuple[StageInfo, ...]
    taps: Mapping[str, str]
    outputs: tuple[TensorSpec, ...]


def cut(program: Program) -> Chain:
    """Cut a compact program, lowered or not, at its sites.

    Raises:
        UsageError: a stage cannot stand on its own: its sizes depend on each other.
    """
    return _Cut(program).run()


class _Cut:
    """One cut of one program.

    Args:
        program: compact.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = [n for n in program.graph.nodes if n.op != "output"]
        results = program.graph.output_node().args[0]
        assert isinstance(results, (tuple, list))
        self.results: list[fx.Node] = [n for n in results if isinstance(n, fx.Node)]
        self.weights = program.constants()
        self.time: dict[fx.Node, int] = {}
        for node in self.nodes:
            self.time[node] = self._time(node)
        self.names = self._names()
        self.dims = self._dims()

    def run(self) -> Chain:
        crossing = self._crossing()
        last = max(self.time.values())
        programs, stages = [], []
        for stage in range(last // 2 + 1):
            own = [n for n in self.nodes if self.time[n] == 2 * stage and _computed(n) and not _size(n)]
            gives = [n for n in own if n in crossing]
            steps = tuple(self._steps(2 * stage - 1)) if stage else ()
            if gives or steps:
                traced = self._stage(stage, own, gives)
                programs.append(traced)
                inputs = tuple(TensorInfo.of(spec) for spec in traced.inputs)
                outputs = tuple(TensorInfo.of(self._spec(n)) for n in gives)
                stages.append(StageInfo(steps=steps, inputs=inputs, outputs=outputs))
        outputs = tuple(self._spec(n, name) for n, name in zip(self.results, self.program.output_names, strict=True))
        return Chain(tuple(programs), tuple(stages), self._taps(), outputs)

    def _time(self, node: fx.Node) -> int:
        if node.op == "placeholder":
            return WEIGHT if node.name in self.weights else 0
        latest = max((self.time[n] for n in node.all_input_nodes), default=WEIGHT)
        if latest == WEIGHT:
            return WEIGHT
        if node.target is COMPACT:
            return latest | 1
        if latest % 2 and _between(node) and all(self.time[n] != WEIGHT for n in node.all_input_nodes):
            return latest
        return latest + latest % 2
"""
