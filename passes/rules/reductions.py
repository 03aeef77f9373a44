"""Ops that combine along dims: sums and maxima fold with a neutral value, the mean is rigid (its count enters the result)."""

from collections.abc import Callable

import torch
from torch._ops import OpOverload

from tpcompile.axes import NEG_INF, Factors
from tpcompile.passes.rules.base import Call, Held, names, register

aten = torch.ops.aten


def folding(op: OpOverload, neutral: float, *, held: Held = Held.ZERO, dims: str = "dim") -> None:
    """Register a reduction: the reduced dims vanish, or stay with size 1 under ``keepdim``."""

    def factors(call: Call) -> Factors:
        ins, gone = names(call.tensors[0].rank), call.dims(dims, call.tensors[0].rank)
        outs = tuple(None if d in gone else f for d, f in enumerate(ins) if call.args.get("keepdim") or d not in gone)
        return Factors((ins,), (outs,), folds={ins[d]: neutral for d in gone})

    samples = ((6, 3, 5, 4), [1, 2]), ((4, 5, 3), [1], True), ((4, 5, 3), [-1])
    register(op, factors, lambda: [(torch.randn(*shape), *more) for shape, *more in samples], held=held)


def along(op: OpOverload, *, neutral: float | None, more: tuple[object, ...] = ()) -> None:
    """Register an op whose result keeps the dim it works along; ``neutral`` None means position or count matters there: rigid.

    ``more`` are further arguments that the samples need.
    """

    def factors(call: Call) -> Factors:
        letters = names(call.tensors[0].rank)
        (dim,) = call.dims("dim", call.tensors[0].rank)
        if neutral is None:
            return Factors((letters,), (letters,), rigid=frozenset({letters[dim]}))
        return Factors((letters,), (letters,), folds={letters[dim]: neutral})

    register(op, factors, lambda: [(torch.randn(3, 5, 4), 1, *more), (torch.randn(3, 4, 5, 5), -1, *more)])


def rigid_last(op: OpOverload, samples: Callable[[], list[tuple[object, ...]]], dims: Callable[[Call], int]) -> None:
    """Register an op that is free along leading dims and rigid along the last ``dims(call)`` ones."""

    def factors(call: Call) -> Factors:
        letters = names(call.out.rank)
        inner = letters[call.out.rank - dims(call) :]
        extra = tuple(inner for _ in call.tensors[1:])
        return Factors((letters, *extra), (letters,), rigid=frozenset(inner))

    register(op, factors, samples)


folding(aten.sum.dim_IntList, 0.0)
folding(aten.amax.default, NEG_INF, held=Held.SAME)
folding(aten.amin.default, -NEG_INF, held=Held.SAME)
along(aten.softmax.int, neutral=NEG_INF)
along(aten._softmax.default, neutral=NEG_INF, more=(False,))
along(aten.log_softmax.int, neutral=NEG_INF)
along(aten.cumsum.default, neutral=None)
along(aten.cumprod.default, neutral=None)


def _norm(call: Call) -> Factors:
    ins, gone = names(call.tensors[0].rank), call.dims("dim", call.tensors[0].rank)
    outs = tuple(None if d in gone else f for d, f in enumerate(ins) if call.args.get("keepdim") or d not in gone)
    if float(call.args.get("ord", 2)) < 0:  # the least entries count: 0 is not neutral
        return Factors((ins,), (outs,), rigid=frozenset(ins[d] for d in gone))
    return Factors((ins,), (outs,), folds={ins[d]: 0.0 for d in gone})


def _mean(call: Call) -> Factors:
    ins, gone = names(call.tensors[0].rank), call.dims("dim", call.tensors[0].rank)
    outs = tuple(None if d in gone else f for d, f in enumerate(ins) if call.args.get("keepdim") or d not in gone)
    return Factors((ins,), (outs,), rigid=frozenset(ins[d] for d in gone))


def _positions(call: Call) -> Factors:
    ins = names(call.tensors[0].rank)
    gone = call.dims("dim", call.tensors[0].rank)
    outs = tuple(None if d in gone else f for d, f in enumerate(ins) if call.args.get("keepdim") or d not in gone)
    return Factors((ins,), tuple(outs for _ in call.outs), rigid=frozenset(ins[d] for d in gone))


register(
    aten.linalg_vector_norm.default,
    _norm,
    lambda: [(torch.randn(3, 5, 4), order, [1], keepdim) for order, keepdim in ((2.0, True), (1.0, False), (-1.0, False))],
    held=Held.ZERO,
)
register(aten.mean.dim, _mean, lambda: [(torch.randn(3, 5, 4), [1])])
register(aten.argmax.default, _positions, lambda: [(torch.randn(3, 5, 4), 1)])
register(aten.argmin.default, _positions, lambda: [(torch.randn(3, 5, 4), 1)])
rigid_last(
    aten.layer_norm.default,
    lambda: [(torch.randn(3, 5, 4), [4], torch.randn(4), torch.randn(4), 1e-5)],
    lambda call: len(call.args["normalized_shape"]),
)
