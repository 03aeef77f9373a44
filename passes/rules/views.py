"""Ops that move dims without touching values: a reshape is read as groups of dims, by factors and never by value alone."""

from collections.abc import Sequence

import sympy
import torch

from tpcompile.axes import Factors
from tpcompile.passes.rules.base import Call, Held, Size, names, register

aten = torch.ops.aten


def groups(ins: Sequence[Size], outs: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Split both shapes, from the left, into the shortest runs of dims with equal products; dims of size 1 belong nowhere.

    ``[B, N, H*D] -> [B, N, H, D]`` gives ``[([0], [0]), ([1], [1]), ([2], [2, 3])]``. Sizes may be symbolic.
    """
    left = [d for d, s in enumerate(ins) if s != 1]
    right = [d for d, s in enumerate(outs) if s != 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        while _product(ins, a) != _product(outs, b):
            if i >= len(left) and j >= len(right):
                return [*found, (a, b)]
            grow_left = j >= len(right) or (i < len(left) and not _divides(_product(outs, b), _product(ins, a)))
            if grow_left:
                a, i = [*a, left[i]], i + 1
            else:
                b, j = [*b, right[j]], j + 1
        found.append((a, b))
    return found


def _product(sizes: Sequence[Size], dims: Sequence[int]) -> Size:
    return sympy.Mul(*(sizes[d] for d in dims))


def _divides(small: Size, large: Size) -> bool:
    """Whether ``large / small`` is a whole number or a polynomial: then the small side is the one to grow."""
    return bool(sympy.denom(sympy.cancel(large / small)) == 1)


def _reshape(call: Call) -> Factors:
    ins = list[str | None](names(call.tensors[0].rank, "i"))
    outs = list[str | None](names(call.out.rank, "o"))
    rigid = set[str]()
    for a, b in groups(call.tensors[0].shape, call.out.shape):
        if len(a) == 1 and len(b) == 1:
            outs[b[0]] = ins[a[0]]
        else:
            rigid |= {str(ins[d]) for d in a} | {str(outs[d]) for d in b}
    ins = [None if s == 1 else f for f, s in zip(ins, call.tensors[0].shape, strict=True)]
    outs = [None if s == 1 else f for f, s in zip(outs, call.out.shape, strict=True)]
    return Factors((tuple(ins),), (tuple(outs),), rigid=frozenset(rigid))


def _permute(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    return Factors((letters,), (tuple(letters[d] for d in call.dims("dims", len(letters))),))


def _transpose(call: Call) -> Factors:
    letters = list(names(call.tensors[0].rank))
    a, b = call.dims("dim0", len(letters))[0], call.dims("dim1", len(letters))[0]
    swapped = list(letters)
    swapped[a], swapped[b] = letters[b], letters[a]
    return Factors((tuple(letters),), (tuple(swapped),))


def _t(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    return Factors((letters,), (letters[::-1],))


def _unsqueeze(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    at = int(call.args["dim"]) % (len(letters) + 1)
    return Factors((letters,), ((*letters[:at], None, *letters[at:]),))


def _squeeze(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    asked = call.dims("dim", len(letters))
    gone = {d for d in asked if call.tensors[0].shape[d] == 1}
    ins = tuple(None if d in gone else f for d, f in enumerate(letters))
    stay = frozenset(letters[d] for d in asked if d not in gone)  # one token left would be squeezed away
    return Factors((ins,), (tuple(f for d, f in enumerate(letters) if d not in gone),), rigid=stay)


def _expand(call: Call) -> Factors:
    outs = names(call.out.rank)
    lead = call.out.rank - call.tensors[0].rank
    ins = tuple(f if s == o else None for f, s, o in zip(outs[lead:], call.tensors[0].shape, call.out.shape[lead:], strict=True))
    return Factors((ins,), (outs,))


def _reshapes() -> list[tuple[object, ...]]:
    split, merge = torch.randn(6, 5, 12), torch.randn(6, 5, 3, 4)
    shapes = [6, 5, 3, 4], [1, 6, 5, 1, 12], [30, 12], [6, -1, 4]
    return [*((split, shape) for shape in shapes), (merge, [6, 5, 12]), (merge, [-1, 5, 12])]


for _op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
    _sized = "shape" if _op is aten.reshape.default else "size"
    register(_op, _reshape, _reshapes, held=Held.COPY, sized=_sized)
register(aten.permute.default, _permute, lambda: [(torch.randn(4, 5, 3), [0, 2, 1])], held=Held.COPY)
register(
    aten.transpose.int, _transpose, lambda: [(torch.randn(6, 5, 3, 4), 1, 2), (torch.randn(4, 5, 3), -1, -2)], held=Held.COPY
)
register(aten.t.default, _t, lambda: [(torch.randn(5, 3),)], held=Held.COPY)
register(aten.unsqueeze.default, _unsqueeze, lambda: [(torch.randn(4, 5), 1), (torch.randn(4, 5), -1)], held=Held.COPY)
register(aten.squeeze.dim, _squeeze, lambda: [(torch.randn(4, 5, 1), -1), (torch.randn(4, 5, 3), 1)], held=Held.COPY)
register(aten.squeeze.dims, _squeeze, lambda: [(torch.randn(4, 1, 5, 1), [1, 3])], held=Held.COPY)
register(
    aten.expand.default,
    _expand,
    lambda: [(torch.randn(4, 1, 5), [4, 3, 5]), (torch.randn(5), [4, 5]), (torch.randn(4, 1, 5), [-1, 3, -1])],
    held=Held.COPY,
    sized="size",
)
