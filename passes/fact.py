"""What is known of one tensor, of one that is made from no other, and of one over two token dims on and off its diagonal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.passes.axesmap import Described
from tpcompile.passes.masks import moves
from tpcompile.passes.rules import Held
from tpcompile.passes.rules.ranges import SAME_AT_EQUALS, run
from tpcompile.passes.values import TRUE, UNKNOWN, ZERO, Value, between, elementwise, written

EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
"""Dtypes that hold every position as it is."""
LIVE = -1
"""The class of tokens that no site drops."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Pair:
    """What is known of a tensor on and off the diagonal of two token dims.

    Attributes:
        dims: the two.
        own: class -> what stands where both positions are the same token of that class.
        off: (dim, class) -> what stands at the class along one of them where the other position is another token.
    """

    dims: tuple[int, int]
    own: Mapping[int, Value]
    off: Mapping[tuple[int, int], Value]


@dataclass(frozen=True, slots=True)
class Doubt:
    """Rows of a softmax that may have lost every key: masked and gathered runs differ there.

    Attributes:
        level: classes 1..level may have taken every key.
        hard: the rows may be NaN (an infinite mask): a product with 0 does not hide them, a ``where`` does.
        rows: dims that run over those rows; known values at classes 1..level along any of them settle the doubt.
    """

    level: int
    hard: bool
    rows: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        held: (dim, class) -> what stands at the class's positions along that dim.
        rest: what stands anywhere in the tensor.
        doubts: rows that may differ, until they are settled.
        pair: what is known on and off a diagonal.
        place: a dim along which every element is its own position.
    """

    held: Mapping[tuple[int, int], Value] = field(default_factory=dict)
    rest: Value = UNKNOWN
    doubts: frozenset[Doubt] = frozenset()
    pair: Pair | None = None
    place: int | None = None

    @property
    def pending(self) -> int:
        """The newest class of a doubt; 0 where there is none."""
        return max((doubt.level for doubt in self.doubts), default=0)

    def at(self, dim: int | None, cls: int) -> Value:
        """What stands at a class along a dim; anywhere, for an operand that lacks the dim."""
        return self.rest if dim is None else self.held.get((dim, cls), self.rest)

    def own(self, dims: Sequence[int | None], cls: int) -> Value:
        """What stands at a class along both dims, at the same token."""
        if self.pair is not None and self.pair.dims == tuple(dims):
            return self.pair.own[cls]
        found = [self.at(d, cls) for d in dims if d is not None] or [self.rest]
        return next((value for value in found if value.exact), found[0])

    def off(self, dims: Sequence[int | None], dim: int | None, cls: int) -> Value:
        """What stands at a class along one of two dims, at another token along the other."""
        if self.pair is not None and dim is not None and self.pair.dims == tuple(dims):
            return self.pair.off[dim, cls]
        return self.at(dim, cls)


def paired(call: Described, facts: Sequence[Fact], tokens: Sequence[int], classes: Sequence[int], anywhere: Value) -> Pair | None:
    """What an elementwise op or a view makes of what is known on and off a diagonal.

    Args:
        call: the op.
        facts: of its operands.
        tokens: the token dims of its result.
        classes: of tokens.
        anywhere: what stands anywhere in the result.
    """
    assert call.factors is not None
    assert call.rule is not None
    outs, bound = call.factors.outs[0], {*call.factors.rigid, *call.factors.folds, *call.factors.reads}
    dims = [d for d in tokens if outs[d] is not None and outs[d] not in bound]
    if call.rule.held not in (Held.MAP, Held.COPY) or len(dims) != 2:
        return None
    a, b = dims
    spots = [tuple(next(call.of(i, str(outs[d])), None) for d in dims) for i, _ in enumerate(facts)]
    places = [spot.index(f.place) for f, spot in zip(facts, spots, strict=True) if f.place is not None and f.place in spot]
    plain = len(call.node.args) == 2 and not call.node.kwargs
    if sorted(places) == [0, 1] and len(facts) == 2 and call.node.target in SAME_AT_EQUALS and plain:
        same = Value.of(run(call.node, [0.0, 0.0]))
        apart = {aten.eq.Tensor: ZERO, aten.ne.Tensor: TRUE}.get(call.node.target, anywhere)
        return Pair((a, b), dict.fromkeys(classes, same), {(d, cls): apart for d in dims for cls in classes})
    if all(f.pair is None for f in facts):
        return None
    copy, both = call.rule.held is Held.COPY, list(zip(facts, spots, strict=True))

    def made(values: list[Value]) -> Value:
        return values[0] if copy else elementwise(call, values)

    own = {cls: made([f.own(_ordered(spot), cls) for f, spot in both]) for cls in classes}
    off = {(d, cls): made([f.off(_ordered(s), s[i], cls) for f, s in both]) for i, d in enumerate(dims) for cls in classes}
    return Pair((a, b), own, off)


def hidden(pair: Pair, dim: int, masked: Mapping[int, Value], rest: Value) -> Pair:
    """A softmax's result on and off the diagonal: masked keys are 0 in every row but their own."""
    off = {(d, cls): ZERO if d == dim and cls in masked else rest for d, cls in pair.off}
    return Pair(pair.dims, dict.fromkeys(pair.own, rest), off)


def _ordered(spot: Sequence[int | None]) -> tuple[int | None, ...]:
    """Two dims as a pair names them."""
    return tuple(sorted(spot, key=lambda d: -1 if d is None else d))


def placed(call: Described, facts: Sequence[Fact]) -> int | None:
    """Where positions stay positions: through views and casts."""
    assert call.factors is not None
    if len(facts) != 1 or facts[0].place is None or not (moves(call) or call.node.target is aten._to_copy.default):
        return None
    if call.node.meta["val"].dtype not in EXACT:
        return None
    factor = call.factors.ins[0][facts[0].place]
    bound = {*call.factors.rigid, *call.factors.reads}
    return next((d for d, f in enumerate(call.factors.outs[0]) if f == factor and f is not None and f not in bound), None)


def _positions(node: fx.Node) -> Fact:
    """``arange`` from a known number, by ones."""
    start = 0.0 if node.target is aten.arange.default else node.args[0]
    if not isinstance(start, (int, float)) or len(node.args) > 2:
        return Fact(rest=Value(NEG_INF, -NEG_INF))
    last = float(start) + max(between(node.meta["val"].shape[0]).hi - 1, 0.0)
    place = 0 if start == 0 and node.meta["val"].dtype in (torch.int32, torch.int64) else None
    return Fact({(0, 0): Value.of(float(start))}, Value(float(start), last), place=place)


def source(node: fx.Node) -> Fact:
    """Ops without tensor inputs: filled tensors are known everywhere; ``arange`` has a known first element."""
    number: object = None
    match node.target:
        case aten.full.default:
            number = node.args[1]
        case aten.scalar_tensor.default:
            number = node.args[0]
        case aten.zeros.default:
            number = 0.0
        case aten.ones.default:
            number = 1.0
        case aten.arange.default | aten.arange.start_step:
            return _positions(node)
    return Fact(rest=written(node, number)) if isinstance(number, (int, float, bool)) else Fact()
