"""captured -> captured: find the sites of a model that never heard of this compiler.

1. candidates are the masks over tokens that follow from activations (``candidates.py``);
2. a mask says which tokens live, or which are dropped: both are tried;
3. outputs with a row per token get ``restore`` where dropped rows hold an older state or a number (``insert.py``);
4. at each hidden state ``[B, N, C]`` near it a ``prune`` is tried; of those that the proof accepts the one with the fewest FLOPs stays;
5. only what drops rows for good is a site: nothing behind it may run over the older tokens;
6. the last mask is tried first: what it drops is unmasked nowhere behind, while an earlier mask's survivors may fall later;
7. where no mask can be dropped by, the refusal is that of the op that stands furthest down in the way of one;
8. a model that marks its own sites is left alone.

Nothing here decides what is sound: ``prune`` is the identity, and ``place`` proves every site that is left.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from tpcompile.errors import AxisError, MarkError, TpcompileError
from tpcompile.ops import PRUNE, RESTORE
from tpcompile.passes.base import GraphPass
from tpcompile.passes.candidates import Candidate, bit_inputs, candidates, settled, token_dim
from tpcompile.passes.cost import polynomial
from tpcompile.passes.insert import insert, restored
from tpcompile.passes.mark import Mark
from tpcompile.passes.place import Place
from tpcompile.program import Program, Stage, where_of

TOKENS = 64.0
"""Tokens at which places are compared; every site is taken to halve them."""
NEAR = 14
"""Hidden states before and behind a mask that are tried."""


@dataclass(frozen=True)
class Recognise(GraphPass):
    """Insert ``prune`` where a masked model's dropped rows first die; the module docstring lists the cases."""

    name: ClassVar[str] = "recognise"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CAPTURED
    masked: ClassVar[bool] = True
    batch: str = "one"

    def run(self, program: Program) -> Program:
        """Return the program with the sites that were found, and a report line per candidate.

        Inputs that hold 0 and 1 in the example are taken to hold nothing else only where the proof needs it.
        """
        if any(node.target is PRUNE for node in program.graph.nodes):
            return program
        base, bits = restored(program), bit_inputs(program)
        search = _Search(replace(base, bits=bits), self.batch)
        if search.work == math.inf:
            if search.obstacle.error is not None:
                search.obstacle.error.report = tuple(search.report)
                raise search.obstacle.error
            return replace(program, report=(*program.report, *search.report))
        found = search.found
        lean = replace(found, bits=frozenset())
        found = lean if bits and _proved(lean, self.batch) else found
        return replace(found.adopt(found.draft()), report=(*program.report, *search.report))


def _proved(program: Program, batch: str) -> bool:
    try:
        Place()(Mark(batch)(program))
    except (AxisError, MarkError):
        return False
    return True


class _Search:
    """The search for the sites of one program.

    Attributes:
        found: the program with the sites so far.
        work: its FLOPs, every site taken to halve the tokens; infinite without a site.
        report: a line per candidate.
        obstacle: what to refuse with where nothing was found.
    """

    def __init__(self, program: Program, batch: str) -> None:
        self.batch, self.found, self.work = batch, program, math.inf
        self.report, self.obstacle = list[str](), _Obstacle({}, -1)
        for candidate in reversed(list(candidates(program))):
            if candidate.name not in settled(self.found):
                self.report.insert(0, self._try(candidate))

    def _try(self, candidate: Candidate) -> str:
        """Take the best site for one mask, and say what became of it."""
        mask, accepted = self.found.node(candidate.name), list[tuple[float, Program, str]]()
        order = {node.name: i for i, node in enumerate(self.found.graph.nodes)}
        heard = {alive: _Obstacle(order, order[mask.name]) for alive in candidate.senses}
        head, reason = f"{candidate.name} at {where_of(mask)}", "no hidden states [B, N, C] depend on it"
        for state in states(self.found, mask):
            for alive in [a for a in candidate.senses if not accepted or heard[a].accepted]:
                trial = insert(self.found, candidate, state, alive)
                if trial is None:
                    continue
                try:
                    placed = Place()(Mark(self.batch)(trial))
                except (AxisError, MarkError) as error:
                    heard[alive].refused(error, state)
                    continue
                heard[alive].accepted = True
                work, full = costs(placed)
                reason = "dropping there saves nothing"
                if work < full and gone(placed):
                    accepted.append((work, trial, state))
        if not accepted:
            meant = max(heard.values(), key=lambda one: (one.accepted, one.reach))
            self.obstacle = max(self.obstacle, meant, key=lambda one: one.reach)
            return f"refused: {head}: {meant.text or reason}"
        self.work, self.found, state = min(accepted, key=lambda entry: entry[0])
        return f"recognised: {head} drops rows of {state}"


class _Obstacle:
    """What stands in the way of a mask in one sense: the first op behind the mask that no trial before it could pass.

    A trial at a state behind that op only walks around it, and an op before the mask could not have been masked by it.

    Args:
        order: node name -> its place in the program.
        mask: place of the mask.

    Attributes:
        error: the refusal; None where there is none.
        reach: the place of its node.
        accepted: whether the proof accepted some trial.
    """

    def __init__(self, order: Mapping[str, int], mask: int) -> None:
        self.order, self.mask = order, mask
        self.error: TpcompileError | None = None
        self.reach, self.accepted = -1, False

    def refused(self, error: TpcompileError, state: str) -> None:
        """Weigh the refusal of a trial."""
        name = error.node.partition(":")[0].removeprefix("%")
        reach = self.order.get(name, self.mask)
        walks_around = self.reach > self.mask and self.order[state] >= self.reach
        if reach > self.reach and not walks_around:
            self.reach, self.error = reach, error

    @property
    def text(self) -> str:
        """The error in one line; empty where there is none."""
        return f"{type(self.error).__name__}: {self.error.message}" if self.error is not None else ""


def states(program: Program, mask: fx.Node) -> list[str]:
    """Float tensors ``[B, N, C]`` near a mask, in program order."""
    dim = token_dim(mask)
    assert dim is not None
    samples, tokens = mask.meta["val"].shape[0], mask.meta["val"].shape[dim]
    before, behind, seen = list[str](), list[str](), False
    for node in program.graph.nodes:
        seen = seen or node is mask
        value = node.meta.get("val")
        hidden = isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point()
        if hidden and value.shape[0] == samples and value.shape[1] == tokens:
            (behind if seen else before).append(node.name)
    return [*before[-NEAR:], *behind[:NEAR]]


def costs(placed: Program) -> tuple[float, float]:
    """FLOPs where every site halves the tokens, and where none drops any."""
    sizes: Mapping[str, float] = {f"t{level}": TOKENS / 2**level for level in range(len(placed.sites) + 1)}
    work = full = 0.0
    for coefficient, names in polynomial(placed):
        product = float(coefficient)
        for name in names:
            product *= sizes[name]
        work, full = work + product, full + coefficient * TOKENS ** len(names)
    return work, full


def gone(placed: Program) -> bool:
    """Whether dropped rows are gone for good: nothing behind a site runs over the tokens before it.

    Keys alone can be dropped exactly while every query lives on, but a model that masks so does not mean to drop tokens.
    """
    level: dict[fx.Node, int] = {}
    for node in placed.graph.nodes:
        if node.target is RESTORE:
            level[node] = level[node.args[2]]
            continue
        born = [site.tokens.level for site in placed.sites if node.target is PRUNE and node.args[1].name == site.keep]
        tensors = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), (int, torch.SymInt))]  # a size is no row
        level[node] = max([*born, *(level[operand] for operand in tensors)], default=0)
        placement = placed.placements.get(node.name)
        if placement and min(placement.dims.values()) < level[node] and node.target is not PRUNE:
            return False
    return True
