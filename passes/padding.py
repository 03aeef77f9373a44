"""Whether padding changes nothing: a proof, by the same means as that of a site, that an input may be padded to a longer one.

The mask that an input brings along says which tokens are padding. Take it for a site of its own, at the first hidden states: where
``place`` proves that site, the masked program equals one that has only the tokens of which the mask is 1. Two inputs that differ in
padding alone have the same such tokens. What is left to show is that nothing beside them knows how long the input was:

1. what is folded over the whole sequence before the site sees its neutral value at the padding;
2. no position is counted from the end, and no op before the site mixes positions;
3. the length is a shape, or the end of a slice or a range from the front, and never a number.

A dim runs over padding where the length is in its size: what is made of the length alone (positions, ones) is linked to no site.

Padding stands on the right, and position 0 is no padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from tpcompile.errors import AxisError, MarkError, RigidAxis, UsageError
from tpcompile.ops import PRUNE
from tpcompile.passes.axesmap import LOOSE, AxesMap, Described
from tpcompile.passes.base import share
from tpcompile.passes.candidates import Candidate, bit_inputs
from tpcompile.passes.facts import Facts
from tpcompile.passes.insert import insert
from tpcompile.passes.levels import Levels, refusal
from tpcompile.passes.mark import Mark
from tpcompile.passes.masks import BITS
from tpcompile.passes.place import Place, Proof
from tpcompile.passes.recognise import states
from tpcompile.passes.rules import bind
from tpcompile.passes.rules.base import Size, size
from tpcompile.program import Program

aten = torch.ops.aten
SHAPES = frozenset({"size", "shape"})
"""Arguments at which a length is a shape."""
ENDS = frozenset({aten.slice.Tensor, aten.arange.default, aten.arange.start_step})
"""Ops whose ``end`` says how much there is, and nothing of what it is, where they begin in front."""
TRIED = 8
"""Hidden states that the site is tried at."""


@dataclass(frozen=True)
class Padding:
    """Padding of an input that was proved to change nothing.

    Attributes:
        mask: the input that is 1 at tokens and 0 at padding.
        dim: name of the dim that runs over them.
        assumptions: what the proof takes for granted.
    """

    mask: str
    dim: str
    assumptions: tuple[str, ...]


def prove_padding(program: Program, batch: str = "one") -> Padding:
    """Prove that padding changes nothing.

    Args:
        program: captured, with its sites.
        batch: the policy.

    Raises:
        UsageError: no input says which tokens are padding.
        AxisError: it cannot be proved; the reason, at the user's line.
    """
    given, error = program.placeholders(), None
    names = {spec.name: spec.shape for spec in program.inputs}
    for mask in sorted(bit_inputs(program)):
        dim = names[given[mask]][1]
        if not isinstance(dim, str):
            continue
        _shapes(program, mask)
        for trial in _trials(replace(program, bits=frozenset({mask})), mask):
            try:
                return Padding(given[mask], dim, _proved(trial, mask, batch, program))
            except (AxisError, MarkError) as refused:
                error = error or refused
    if error is not None:
        raise error
    raise UsageError(
        "no input says which tokens are padding", fix="give the model an attention mask of 0 and 1 whose length is dynamic"
    )


def _trials(program: Program, mask: str) -> Iterator[Program]:
    """The program with a site that drops padding, at one of its first states."""
    for state in states(program, program.node(mask))[:TRIED]:
        trial = insert(program, Candidate(mask, BITS), state, 1.0)
        if trial is not None:
            yield share(trial)


def _proved(trial: Program, mask: str, batch: str, program: Program) -> tuple[str, ...]:
    """What the proof takes for granted beside what the program's own takes.

    Raises:
        AxisError: it fails.
    """
    marked = Mark(batch)(trial)
    placed = Place()(marked)
    axes = AxesMap(marked.graph)
    levels = Levels(marked, axes)
    keeps = {site.keep: site.tokens.level for site in marked.sites}
    proof = Proof(marked, axes, levels, Facts(marked.graph, axes, keeps, marked.constants(), marked.bits, levels.nested))
    for call in axes.calls.values():
        if call.node.target is not PRUNE:
            _unmoved(call, proof, _length(marked, mask))
    own = Place()(Mark(batch)(program)).assumptions
    return tuple(f"padding: {text}" for text in placed.assumptions if text not in own)


def _length(program: Program, mask: str) -> Size:
    """The symbol of the length of the sequence."""
    return size(program.node(mask).meta["val"].shape[1])


def _runs(node: fx.Node, dim: int, length: Size) -> bool:
    """Whether a dim of a node's (first) output has the length in its size."""
    return bool(size(node.meta["val"].shape[dim]).has(length))


def _unmoved(call: Described, proof: Proof, length: Size) -> None:
    """Cases 1 and 2, of one op over the whole sequence."""
    if call.factors is None:
        tensors = [n for n in (*call.operands, call.node) if isinstance(n.meta["val"], torch.Tensor)]
        if any(_runs(n, d, length) for n in tensors for d in range(n.meta["val"].dim())):
            raise refusal(RigidAxis, call.node, f"no axis rule for {call.node.target}, which reads padding", "add a rule for it")
        return
    for factor in sorted(call.factors.names):
        token = any(_runs(n, d, length) for i, n in enumerate(call.operands) for d in call.of(i, factor))
        if not token or proof.levels.factor(call, factor) > 0:
            continue
        loose = factor.startswith(LOOSE) or factor in call.factors.rigid
        folds = factor in call.factors.folds and 1 not in proof.neutral(call, factor, call.factors.folds[factor])
        if loose or folds:
            raise refusal(
                RigidAxis,
                call.node,
                f"{call.node.target} reads padding as if it were tokens",
                "multiply by the attention mask before",
            )


def _shapes(program: Program, mask: str) -> None:
    """Case 3: whatever asks for the length of the sequence."""
    length = _length(program, mask)
    for node in program.graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.SymInt) and size(value).has(length):
            _shape_only(node)


def _shape_only(length: fx.Node) -> None:
    """The same, of one size."""
    for user in length.users:
        known = isinstance(user.target, torch._ops.OpOverload)
        given = bind(user.target, user.args, user.kwargs) if known else {"": length}  # type: ignore[arg-type]  # just compared
        places = {
            name for name, value in given.items() if value is length or (isinstance(value, (list, tuple)) and length in value)
        }
        front = user.target in ENDS and given.get("start") in (0, None)
        if not places <= (SHAPES | {"end"} if front else SHAPES):
            raise refusal(
                RigidAxis, user, "the padded length is used as a number", "count tokens by the attention mask, not by the shape"
            )
