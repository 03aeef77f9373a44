"""Which masks of a program may drop tokens: those over ``[B, N]`` that follow from activations, each in one form.

1. a mask over tokens holds two numbers (bool, 0 and 1, 0 and -1e4, ...), or 0 where tokens live and others elsewhere;
2. what is only an ingredient of a conjunction, a disjunction or a sum is left to it;
3. another form of an earlier mask (its complement, a cast, the additive mask made of it) is none of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from tpcompile.ops import PRUNE
from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.masks import Masks, Numbers, Said, kept, moves, said
from tpcompile.passes.rules import Held
from tpcompile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mask over tokens.

    Attributes:
        name: of its node.
        numbers: what it holds, all told.
    """

    name: str
    numbers: Numbers

    @property
    def senses(self) -> tuple[float, ...]:
        """The numbers that may stand for a living token: either of two, else 0, which a sum of additive masks holds there."""
        if len(self.numbers) == 2:
            return tuple(sorted(self.numbers, reverse=True))
        return (0.0,) if len(self.numbers) > 2 and 0.0 in (min(self.numbers), max(self.numbers)) else ()


def bit_inputs(program: Program) -> frozenset[str]:
    """Placeholders of whole-number inputs ``[B, N]`` that hold 0 and 1, and 1 at position 0, in the example."""
    example = program.example()
    return frozenset(name for name, given in program.placeholders().items() if _bits(example[given]))


def _bits(value: torch.Tensor) -> bool:
    whole = not value.is_floating_point() and value.dtype is not torch.bool
    return whole and value.dim() == 2 and bool(((value == 0) | (value == 1)).all() & (value[:, 0] == 1).all())


def candidates(program: Program) -> Iterator[Candidate]:
    """The masks that may drop tokens, in program order; the module docstring lists the cases."""
    axes = AxesMap(program.graph)
    masks = Masks(axes, program.constants(), program.bits)
    active, found = activations(program, axes), set[str]()
    for node in program.graph.nodes:
        call = axes.calls.get(node.name)
        if node.name not in active or call is None or call.rule is None or _view(node, axes):
            continue
        candidate = _candidate(node, masks)
        if not candidate.senses:
            continue
        again = node.target is aten._to_copy.default or any(one.name in found for one in _same(node, axes, masks))
        found.add(node.name)
        if not again and not _ingredient(node, axes, masks):
            yield candidate


def activations(program: Program, axes: AxesMap) -> set[str]:
    """Nodes whose values follow from activations: products of tensors, float inputs, and what is made of them. Sizes are no values."""
    found, constants = set[str](), program.constants()
    for node in program.graph.nodes:
        call = axes.calls.get(node.name)
        product = call is not None and call.rule is not None and call.rule.held is Held.ZERO and len(call.operands) > 1
        given = node.op == "placeholder" and node.name not in constants and node.meta["val"].is_floating_point()
        if product or given or (call is not None and any(n.name in found for n in node.all_input_nodes)):
            found.add(node.name)
    return found


def _candidate(node: fx.Node, masks: Masks) -> Candidate:
    """A node as a mask; one without senses where it is none."""
    over = isinstance(node.meta.get("val"), torch.Tensor) and token_dim(node) is not None
    return Candidate(node.name, masks(node) if over else frozenset())


def settled(program: Program) -> set[str]:
    """Masks that are a site's keep mask in another form: its complement, or one in another dtype."""
    axes = AxesMap(program.graph)
    masks = Masks(axes, program.constants(), program.bits)
    keeps = [node.args[1] for node in program.graph.find_nodes(op="call_function", target=PRUNE)]
    forms = {keep.name for keep in keeps if isinstance(keep, fx.Node)}
    forms |= {one.node.name for keep in keeps if isinstance(keep, fx.Node) for one in said(kept(keep), axes, masks) if one.same}
    return {n.name for n in program.graph.nodes if n.name in forms or any(o.name in forms for o in _same(n, axes, masks))}


def _same(node: fx.Node, axes: AxesMap, masks: Masks) -> Iterator[fx.Node]:
    """The masks that a node is another form of."""
    candidate = _candidate(node, masks)
    for alive in candidate.senses[:1]:
        dim = token_dim(node)
        assert dim is not None
        yield from (one.node for one in said(Said(node, dim, alive, candidate.numbers - {alive}), axes, masks) if one.same)


def token_dim(node: fx.Node) -> int | None:
    """The one dim behind the first that is not 1 wide: ``[B, N]``, ``[B, N, 1]``, ``[B, 1, 1, N]``."""
    shape = node.meta["val"].shape
    wide = [d for d in range(1, len(shape)) if not (isinstance(shape[d], int) and shape[d] == 1)]
    return wide[0] if len(wide) == 1 else None


def _ingredient(node: fx.Node, axes: AxesMap, masks: Masks) -> bool:
    """Whether every reader, in whatever form, joins it with another mask into one over tokens."""
    readers = [user for user in node.users if user.target is not aten.sym_size.int]
    return bool(readers) and all(
        masks(user) and token_dim(user) is not None and (_joins(user, axes, masks) or _ingredient(user, axes, masks))
        for user in readers
    )


def _joins(node: fx.Node, axes: AxesMap, masks: Masks) -> bool:
    """Whether a mask is made of several."""
    call = axes.calls.get(node.name)
    return call is not None and (len({n for n in call.operands if len(masks(n)) > 1}) > 1 or node.target is aten.cat.default)


def _view(node: fx.Node, axes: AxesMap) -> bool:
    call = axes.calls.get(node.name)
    return call is not None and moves(call)
