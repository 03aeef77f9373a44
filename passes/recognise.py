"""captured -> captured: find the sites of a model that never heard of this compiler.

1. a candidate is a mask over ``[B, N]`` (bool, or 0 and 1 in another dtype, dims of size 1 beside) that follows from activations;
2. what is only an ingredient of a conjunction or disjunction is left to it;
3. a mask says which tokens live, or which are dropped: both are tried;
4. at each hidden state ``[B, N, C]`` near it a ``prune`` is tried; of those that the proof accepts the one with the fewest FLOPs stays;
5. only what drops rows for good is a site: nothing behind it may run over the older tokens;
6. the last mask is tried first: what it drops is unmasked nowhere behind, while an earlier mask's survivors may fall later;
7. where no mask can be dropped by, the refusal is that of the trial whose proof came furthest: its line is what stands in the way;
8. a model that marks its own sites is left alone.

Nothing here decides what is sound: ``prune`` is the identity, and ``place`` proves every site that is left.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._guards import detect_fake_mode

from tpcompile.errors import AxisError, MarkError, TpcompileError
from tpcompile.ops import PRUNE
from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.base import GraphPass
from tpcompile.passes.cost import polynomial
from tpcompile.passes.mark import Mark
from tpcompile.passes.masks import ANDS, ORS, Binary, moves, said
from tpcompile.passes.place import Place
from tpcompile.passes.rules import Held
from tpcompile.program import Program, Stage, where_of

aten = torch.ops.aten
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
    batch: str = "one"

    def run(self, program: Program) -> Program:
        """Return the program with the sites that were found, and a report line per candidate."""
        if any(node.target is PRUNE for node in program.graph.nodes):
            return program
        found, report, furthest = program, list[str](), _Furthest()
        for name in reversed([node.name for node in candidates(program)]):
            if name not in settled(found):
                found, line = self._try(found, name, furthest)
                report.insert(0, line)
        if found is program:
            furthest.complain(tuple(report))
            return replace(program, report=(*program.report, *report))
        return replace(found.adopt(found.draft()), report=(*program.report, *report))

    def _try(self, program: Program, name: str, furthest: "_Furthest") -> tuple[Program, str]:
        """The program with the best site for one mask, or as it was, and what to say of it."""
        mask, found = program.node(name), list[tuple[float, Program, str]]()
        heard = {True: _Furthest(), False: _Furthest()}
        head, reason = f"{name} at {where_of(mask)}", "no hidden states [B, N, C] depend on it"
        for state in states(program, mask):
            for sense in (True, False):
                trial = insert(program, name, state, sense)
                if trial is None:
                    continue
                try:
                    placed = Place()(Mark(self.batch)(trial))
                    work, full = costs(placed)
                except (AxisError, MarkError) as error:
                    heard[sense].refused(error, trial)
                    continue
                heard[sense].proved()
                reason = "dropping there saves nothing"
                if work < full and gone(placed):
                    found.append((work, trial, state))
        if not found:
            meant = max(heard.values(), key=lambda one: one.first)
            furthest.take(meant)
            return program, f"refused: {head}: {meant.text or reason}"
        _, best, state = min(found, key=lambda entry: entry[0])
        return best, f"recognised: {head} drops rows of {state}"


class _Furthest:
    """The refusal of the trial whose proof came furthest.

    Attributes:
        error: that refusal.
        reach: how far down its node stands.
        first: how far the first trial came, infinite once one was accepted. Of a mask's two senses the one that is meant comes further.
    """

    def __init__(self) -> None:
        self.error: TpcompileError | None = None
        self.reach = self.first = -1.0

    def refused(self, error: TpcompileError, trial: Program) -> None:
        """Keep the error if its node stands further down than any before."""
        names = [node.name for node in trial.graph.nodes]
        name = error.node.partition(":")[0].removeprefix("%")
        reach = float(names.index(name) if name in names else 0)
        self.first = reach if self.first < 0 else self.first
        if reach > self.reach:
            self.reach, self.error = reach, error

    def proved(self) -> None:
        """Note a trial that was accepted."""
        self.first = math.inf

    def take(self, other: "_Furthest") -> None:
        """Keep another's error if it came further."""
        if other.reach > self.reach:
            self.reach, self.error = other.reach, other.error

    @property
    def text(self) -> str:
        """The error in one line; empty where there is none."""
        return f"{type(self.error).__name__}: {self.error.message}" if self.error is not None else ""

    def complain(self, report: tuple[str, ...]) -> None:
        """Raise it with what was tried, where there is one."""
        if self.error is not None:
            self.error.report = report
            raise self.error


def candidates(program: Program) -> Iterator[fx.Node]:
    """Masks over tokens that follow from activations, in program order; another form of an earlier one is none."""
    axes = AxesMap(program.graph)
    constants = program.constants()
    binary = Binary(axes, constants)
    active, found = set[str](), set[str]()
    for node in program.graph.nodes:
        call = axes.calls.get(node.name)
        product = call is not None and call.rule is not None and call.rule.held is Held.ZERO and len(call.operands) > 1
        given = node.op == "placeholder" and node.name not in constants and node.meta["val"].is_floating_point()
        if product or given or any(n.name in active for n in node.all_input_nodes):
            active.add(node.name)
        follows = node.name in active and call is not None and call.rule is not None and call.rule.held is Held.MAP
        if not follows or node.target is aten._to_copy.default or token_dim(node) is None or not binary(node):
            continue
        again = any(one.name in found for one in _same(node, axes, binary))
        found.add(node.name)
        if not again and not _ingredient(node, axes, binary):
            yield node


def settled(program: Program) -> set[str]:
    """Masks that are a site's keep mask in another form: its complement, or one in another dtype."""
    axes = AxesMap(program.graph)
    binary = Binary(axes, program.constants())
    keeps = [node.args[1] for node in program.graph.find_nodes(op="call_function", target=PRUNE)]
    forms = {keep.name for keep in keeps if isinstance(keep, fx.Node)}
    forms |= {one.node.name for keep in keeps if isinstance(keep, fx.Node) for one in said(keep, axes, binary) if one.same}
    return {n.name for n in program.graph.nodes if n.name in forms or any(o.name in forms for o in _same(n, axes, binary))}


def _same(node: fx.Node, axes: AxesMap, binary: Binary) -> Iterator[fx.Node]:
    """The masks that a node is another form of."""
    dim = token_dim(node) if isinstance(node.meta.get("val"), torch.Tensor) else None
    return (one.node for one in said(node, axes, binary, dim) if one.same) if dim is not None and binary(node) else iter(())


def token_dim(node: fx.Node) -> int | None:
    """The one dim behind the first that is not 1 wide: ``[B, N]``, ``[B, N, 1]``, ``[B, 1, 1, N]``."""
    shape = node.meta["val"].shape
    wide = [d for d in range(1, len(shape)) if not (isinstance(shape[d], int) and shape[d] == 1)]
    return wide[0] if len(wide) == 1 else None


def _ingredient(node: fx.Node, axes: AxesMap, binary: Binary) -> bool:
    """Whether every reader, through views and casts, joins it with another mask."""
    return bool(node.users) and all(
        (user.target in (*ANDS, *ORS) and binary(user))
        or ((user.target is aten._to_copy.default or _view(user, axes)) and binary(user) and _ingredient(user, axes, binary))
        for user in node.users
    )


def _view(node: fx.Node, axes: AxesMap) -> bool:
    call = axes.calls.get(node.name)
    return call is not None and moves(call)


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
        born = [site.tokens.level for site in placed.sites if node.target is PRUNE and node.args[1].name == site.keep]
        tensors = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), (int, torch.SymInt))]  # a size is no row
        level[node] = max([*born, *(level[operand] for operand in tensors)], default=0)
        placement = placed.placements.get(node.name)
        if placement and min(placement.dims.values()) < level[node] and node.target is not PRUNE:
            return False
    return True


def insert(program: Program, mask: str, state: str, alive: bool) -> Program | None:
    """The program with ``prune(state, keep)`` before whatever reads the state and does not lead to the mask; None where nothing does."""
    draft = program.draft()
    nodes = {node.name: node for node in draft.graph.nodes}
    x, source = nodes[state], nodes[mask]
    leads = _ancestors(source)
    readers = [user for user in x.users if user not in leads and user is not source and user.op != "output"]
    if not readers:
        return None
    new = _Writer(draft.graph, source, source)
    keep = _keep(new, source, alive)
    new.last = max(x, keep, key=list(draft.graph.nodes).index)
    prune = new(PRUNE, x, keep)
    for reader in readers:
        reader.replace_input_with(x, prune)
    _move_behind(draft.graph, prune, set(readers))
    return program.adopt(draft, refresh=False)


class _Writer:
    """Writes nodes one behind the other, with their metadata, at a user's line."""

    def __init__(self, graph: fx.Graph, last: fx.Node, like: fx.Node) -> None:
        self.graph, self.last, self.like = graph, last, like

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            made = self.graph.call_function(target, args)
        made.meta = {k: v for k, v in self.like.meta.items() if k in ("stack_trace", "nn_module_stack")}
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
        mode = detect_fake_mode(values)
        assert mode is not None
        with mode:
            made.meta["val"] = target(*values)
        self.last = made
        return made


def _keep(new: _Writer, mask: fx.Node, alive: bool) -> fx.Node:
    """Bool ``[B, N]``, true where a token lives."""
    dim = token_dim(mask)
    ones = [d for d in range(1, mask.meta["val"].dim()) if d != dim]
    flat = new(aten.squeeze.dims, mask, ones) if ones else mask
    if flat.meta["val"].dtype is not torch.bool:
        return new(aten.ne.Scalar if alive else aten.eq.Scalar, flat, 0)
    return flat if alive else new(aten.logical_not.default, flat)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                stack.append(operand)
    return found


def _move_behind(graph: fx.Graph, prune: fx.Node, late: set[fx.Node]) -> None:
    """Put the readers of a site, and what depends on them, behind it, in their order."""
    anchor = prune
    for node in list(graph.nodes):
        if node is prune:
            return
        if node in late or any(operand in late for operand in node.all_input_nodes):
            late.add(node)
            anchor.append(node)
            anchor = node
