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
    ins = tuple(
        f if s != 1 or o == 1 else None for f, s, o in zip(outs[lead:], call.tensors[0].shape, call.out.shape[lead:], strict=True)
    )
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


def _repeat(call: Call) -> Factors:
    """A dim that is repeated once stays; any other is laid end to end."""
    source = call.tensors[0]
    outs = list(names(call.out.rank, "out"))
    lead = call.out.rank - source.rank
    ins = list[str | None](names(source.rank))
    rigid = set(outs)
    for d, times in enumerate(call.args["repeats"][lead:]):
        if times == 1:
            rigid.discard(outs[lead + d])
            outs[lead + d] = str(ins[d])
        else:
            rigid.add(str(ins[d]))
    return Factors((tuple(ins),), (tuple(outs),), rigid=frozenset(rigid))


def _interleaved(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    if call.args.get("dim") is None:
        return Factors((letters,), (("out",),), rigid=frozenset({*letters, "out"}))
    (dim,) = call.dims("dim", len(letters))
    outs = tuple("out" if d == dim else f for d, f in enumerate(letters))
    return Factors((letters,), (outs,), rigid=frozenset({letters[dim], "out"}))


def _moved(call: Call) -> Factors:
    """Positions along some dims change: all of them where none is named."""
    letters = names(call.tensors[0].rank)
    return Factors((letters,), (letters,), rigid=frozenset(letters[d] for d in call.dims("dims", len(letters))))


def _triangle(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    return Factors((letters,), (letters,), rigid=frozenset(letters[-2:]))


def _padded(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    pads = list(call.args["pad"])
    grown = {len(letters) - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
    outs = tuple(f"out{d}" if d in grown else f for d, f in enumerate(letters))
    return Factors((letters,), (outs,), rigid=frozenset({*(letters[d] for d in grown), *(outs[d] for d in grown)}))


def _windows(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    dim = int(call.args["dimension"]) % len(letters)
    outs = (*("out" if d == dim else f for d, f in enumerate(letters)), "window")
    return Factors((letters,), (outs,), rigid=frozenset({letters[dim], "out", "window"}))


def _diagonal(call: Call) -> Factors:
    """The main diagonal of two dims that run over the same positions keeps them; any other is read by position."""
    letters = list(names(call.tensors[0].rank))
    a, b = (int(call.args.get(name, default)) % len(letters) for name, default in (("dim1", 0), ("dim2", 1)))
    rest = [f for d, f in enumerate(letters) if d not in (a, b)]
    if call.args.get("offset", 0) == 0 and call.tensors[0].shape[a] == call.tensors[0].shape[b]:
        letters[b] = letters[a]
        return Factors((tuple(letters),), ((*rest, letters[a]),))
    return Factors((tuple(letters),), ((*rest, "out"),), rigid=frozenset({letters[a], letters[b], "out"}))


register(
    aten.repeat.default, _repeat, lambda: [(torch.randn(4, 5, 3), [1, 1, 2]), (torch.randn(5, 3), [4, 1, 1])], held=Held.COPY
)
register(
    aten.repeat_interleave.self_int,
    _interleaved,
    lambda: [(torch.randn(4, 5, 3), 2, -1), (torch.randn(4, 5), 2)],
    held=Held.COPY,
)
register(aten.flip.default, _moved, lambda: [(torch.randn(4, 5, 3), [1]), (torch.randn(4, 5, 3), [-1])], held=Held.COPY)
register(aten.roll.default, _moved, lambda: [(torch.randn(4, 5, 3), [1], [1]), (torch.randn(4, 5), [2])], held=Held.COPY)
for _op in (aten.tril.default, aten.triu.default):
    register(_op, _triangle, lambda: [(torch.randn(3, 5, 4),), (torch.randn(3, 4, 5, 5), 1)], held=Held.ZERO)
register(
    aten.constant_pad_nd.default, _padded, lambda: [(torch.randn(4, 5, 3), [0, 0, 1, 2], 2.0), (torch.randn(4, 5, 3), [0, 1])]
)
register(aten.unfold.default, _windows, lambda: [(torch.randn(4, 5, 3), 1, 2, 1)], held=Held.COPY)
register(
    aten.diagonal.default,
    _diagonal,
    lambda: [(torch.randn(6, 5, 5), 0, 1, 2), (torch.randn(6, 5, 4), 0, 1, 2), (torch.randn(5, 6, 5), 1, 0, -1)],
    held=Held.ZERO,
)
