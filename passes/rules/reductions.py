"""Ops that combine along dims: sums and maxima fold with a neutral value, the mean is rigid (its count enters the result)."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from tpcompile.axes import NEG_INF, Factors
from tpcompile.ops import RANK
from tpcompile.passes.rules.base import Call, Held, names, register

aten = torch.ops.aten


_MANY: tuple[tuple[Any, ...], ...] = (((6, 3, 5, 4), [1, 2]), ((4, 5, 3), [1], True), ((4, 5, 3), [-1]))
_ONE: tuple[tuple[Any, ...], ...] = (((6, 3, 5, 4), 1), ((4, 5, 3), 1, True), ((4, 5, 3), -1))


def folding(
    op: OpOverload,
    neutral: float,
    *,
    held: Held = Held.ZERO,
    dims: str = "dim",
    samples: tuple[tuple[Any, ...], ...] = _MANY,
    boolean: bool = False,
) -> None:
    """Register a reduction: the reduced dims vanish, or stay with size 1 under ``keepdim``.

    ``samples`` are shapes, each with the further arguments; ``boolean`` ones are of truth values.
    """

    def factors(call: Call) -> Factors:
        ins, gone = names(call.tensors[0].rank), call.dims(dims, call.tensors[0].rank)
        outs = tuple(None if d in gone else f for d, f in enumerate(ins) if call.args.get("keepdim") or d not in gone)
        return Factors((ins,), (outs,), folds={ins[d]: neutral for d in gone})

    def drawn() -> list[tuple[Any, ...]]:
        return [(torch.randn(*shape) > 0 if boolean else torch.randn(*shape), *more) for shape, *more in samples]

    register(op, factors, drawn, held=held)


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


def _rank(call: Call) -> Factors:
    return Factors((("b", "n"),), (("b", "n"),), folds={"n": NEG_INF})


register(RANK, _rank, lambda: [(torch.randn(4, 6),), (torch.randint(0, 3, (4, 6)).float(),)], held=Held.ORDER)
folding(aten.sum.dim_IntList, 0.0)
folding(aten.amax.default, NEG_INF, held=Held.SAME)
folding(aten.amin.default, -NEG_INF, held=Held.SAME)
folding(aten.logsumexp.default, NEG_INF, held=Held.NONE)
folding(aten.prod.dim_int, 1.0, samples=_ONE)
folding(aten.any.dim, 0.0, samples=_ONE, boolean=True)
folding(aten.all.dim, 1.0, samples=_ONE, boolean=True)
along(aten._safe_softmax.default, neutral=NEG_INF)
along(aten.logcumsumexp.default, neutral=None)
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
register(aten.argmax.default, _positions, lambda: [(torch.randn(3, 5, 4), 1)])
register(aten.argmin.default, _positions, lambda: [(torch.randn(3, 5, 4), 1)])
rigid_last(
    aten.layer_norm.default,
    lambda: [(torch.randn(3, 5, 4), [4], torch.randn(4), torch.randn(4), 1e-5)],
    lambda call: len(call.args["normalized_shape"]),
)
rigid_last(
    aten.rms_norm.default,
    lambda: [(torch.randn(3, 5, 4), [4], torch.randn(4), 1e-5), (torch.randn(3, 5, 4), [5, 4])],
    lambda call: len(call.args["normalized_shape"]),
)


def _group_norm(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    more = tuple((f"w{i}",) for i, _ in enumerate(call.tensors[1:]))
    return Factors((letters, *more), (letters,), rigid=frozenset({*letters[1:], *(f for dims in more for f in dims)}))


def _batch_norm(call: Call) -> Factors:
    """In eval mode: each channel has a scale and a shift of its own. The saved statistics are empty."""
    letters = names(call.tensors[0].rank)
    empty = tuple((f"e{i}",) for i, _ in enumerate(call.outs[1:]))
    more = tuple((letters[1],) for _ in call.tensors[1:])
    return Factors((letters, *more), (letters, *empty), rigid=frozenset(f for dims in empty for f in dims))


def _own_statistics(call: Call) -> Factors:
    """Without running statistics: every sample and position enters each channel's."""
    letters, more = names(call.tensors[0].rank), tuple(("c",) for _ in call.tensors[1:])
    saved = tuple(("s",) for _ in call.outs[1:])
    return Factors((letters, *more), (letters, *saved), rigid=frozenset({*letters, "c", "s"}))


def _pooled(spatial: int) -> Callable[[Call], Factors]:
    """Windows over the last dims."""

    def factors(call: Call) -> Factors:
        letters = names(call.tensors[0].rank)
        lead, window = letters[:-spatial], letters[-spatial:]
        outs = (*lead, *names(spatial, "out"))
        return Factors((letters,), (outs,), rigid=frozenset({*window, *outs[len(lead) :]}))

    return factors


register(
    aten.group_norm.default,
    _group_norm,
    lambda: [(torch.randn(6, 4, 5), 2, torch.randn(4), torch.randn(4)), (torch.randn(6, 4, 5, 3), 2)],
)
register(
    aten.instance_norm.default, _group_norm, lambda: [(torch.randn(6, 4, 5), None, None, None, None, True, 0.1, 1e-5, False)]
)
register(
    aten._native_batch_norm_legit_no_training.default,
    _batch_norm,
    lambda: [
        (torch.randn(6, 4, 5), torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4), 0.1, 1e-5),
        (torch.randn(6, 4), None, None, torch.randn(4), torch.rand(4), 0.1, 1e-5),
    ],
)
register(
    aten._native_batch_norm_legit.no_stats,
    _own_statistics,
    lambda: [(torch.randn(6, 4, 5), torch.randn(4), torch.randn(4), True, 0.1, 1e-5)],
)
for _pool in (aten.avg_pool1d.default, aten.max_pool1d.default, aten.adaptive_avg_pool1d.default):
    register(_pool, _pooled(1), lambda: [(torch.randn(3, 5, 6), [2])])
for _pool in (aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default):
    register(_pool, _pooled(2), lambda: [(torch.randn(3, 5, 6, 6), [2, 2])])
