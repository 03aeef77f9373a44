"""What an axis rule is, and the registry: one entry per ATen op.

A rule sees metadata only (shapes, dtypes, constants), never the graph: it states facts, and ``passes/place.py`` owns the search. Each rule
carries samples, and ``tests/passes/rules/test_laws.py`` checks its law on them: ``op(gather(x)) == gather(op(fill(x)))``.
"""

import enum
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from tpcompile.axes import Factors

Size: TypeAlias = Any
"""A sympy expression (sympy ships no types): an integer where the size is fixed."""


@dataclass(frozen=True, slots=True)
class Meta:
    """A tensor as a rule sees it: sizes are sympy expressions (integers where fixed)."""

    shape: tuple[Size, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> "Meta":
        """The metadata of a real or fake tensor."""
        return cls(tuple(size(s) for s in value.shape), value.dtype)

    @property
    def rank(self) -> int:
        """Number of dims."""
        return len(self.shape)


def size(value: Any) -> Size:
    """An int or SymInt as a sympy expression."""
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(int(value))


@dataclass(frozen=True, slots=True)
class Call:
    """One op call: arguments by schema name, tensors as Meta.

    Attributes:
        args: schema name -> value; tensors are ``Meta``, lists of tensors lists of ``Meta``, sizes sympy expressions.
        tensors: the tensor arguments in order, lists flattened.
        outs: the outputs.
    """

    args: Mapping[str, Any]
    tensors: tuple[Meta, ...]
    outs: tuple[Meta, ...]

    @property
    def out(self) -> Meta:
        """The first output."""
        return self.outs[0]

    def dims(self, name: str, rank: int) -> tuple[int, ...]:
        """The ``dim`` argument of that name as non-negative ints; missing or empty means all."""
        value = self.args.get(name)
        if value is None or value == []:
            return tuple(range(rank))
        listed = value if isinstance(value, (list, tuple)) else [value]
        return tuple(int(d) % rank for d in listed)


class Held(enum.Enum):
    """How an op treats a value that a dropped token holds (``passes/facts.py``)."""

    MAP = "map"
    """Elementwise: known operands give a known result."""
    COPY = "copy"
    """Moves elements: the value stays."""
    ZERO = "zero"
    """Linear: zero stays zero, anything else is unknown."""
    SAME = "same"
    """Idempotent reduction: a constant row reduces to the constant."""
    FRONT = "front"
    """Joins along a rigid dim: the first operand's position 0 is the result's."""
    PICK = "pick"
    """Reads elements of the first operand by an index: anywhere it holds what that operand holds."""
    ORDER = "order"
    """A place among the others: what is read at a living token counts living tokens only, and that token is one of them."""
    NONE = "none"
    """Nothing is known of the result."""


@dataclass(frozen=True)
class Rule:
    """The axis rule of one op.

    Attributes:
        op: the ATen overload.
        factors: metadata -> factors.
        held: what becomes of values that dropped tokens hold.
        sized: name of the argument that lists the output's sizes, rewritten when a token dim shrinks.
        absorbs: an operand with this value at a position decides the result there (0 for mul, False for and).
        neutral: per tensor operand the value with which it leaves the other one as it is (1 for mul, True for and); None: there is none.
        samples: real argument tuples for the law, at least one; a dict at the end holds keyword arguments.
        where: file:line of the registration.
    """

    op: OpOverload
    factors: Callable[[Call], Factors]
    held: Held
    sized: str
    absorbs: float | None
    neutral: tuple[float | None, ...]
    samples: Callable[[], Sequence[tuple[Any, ...]]]
    where: str


RULES: dict[OpOverload, Rule] = {}


def register(
    op: OpOverload,
    factors: Callable[[Call], Factors],
    samples: Callable[[], Sequence[tuple[Any, ...]]],
    *,
    held: Held = Held.NONE,
    sized: str = "",
    absorbs: float | None = None,
    neutral: tuple[float | None, ...] = (),
) -> None:
    """Add the rule of one op.

    Raises:
        ValueError: the op has a rule; both places are named.
    """
    where = _caller()
    if op in RULES:
        raise ValueError(f"{op} has a rule at {RULES[op].where} and another at {where}")
    RULES[op] = Rule(op, factors, held, sized, absorbs, neutral, samples, where)


def _caller() -> str:
    """file:line outside this module. ``inspect.stack`` would read every source on the way."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def names(count: int, letter: str = "d") -> tuple[str, ...]:
    """``("d0", "d1", ...)``."""
    return tuple(f"{letter}{i}" for i in range(count))


def bind(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments by schema name."""
    schema = op._schema.arguments
    return {**{a.name: v for a, v in zip(schema, args, strict=False)}, **kwargs}


def call_of(node: fx.Node) -> Call:
    """The Call of an fx node, from its metadata."""
    assert isinstance(node.target, OpOverload)
    value = node.meta.get("val")
    outs = value if isinstance(value, (tuple, list)) else [value]
    given = bind(node.target, node.args, node.kwargs)
    tensors = tuple(Meta.of(n.meta["val"]) for n in tensor_nodes(node))
    return Call({k: _seen(v) for k, v in given.items()}, tensors, tuple(Meta.of(o) for o in outs if isinstance(o, Tensor)))


def tensor_nodes(node: fx.Node) -> list[fx.Node]:
    """The tensor inputs of a node in argument order, lists flattened; a tensor used twice stands twice."""
    found: list[fx.Node] = []

    def visit(value: Any) -> None:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit([*node.args, *node.kwargs.values()])
    return found


def _seen(value: Any) -> Any:
    if isinstance(value, fx.Node):
        inner = value.meta.get("val")
        return Meta.of(inner) if isinstance(inner, Tensor) else size(inner) if isinstance(inner, (int, torch.SymInt)) else inner
    if isinstance(value, (list, tuple)):
        return [_seen(v) for v in value]
    return value
