"""Ops that read by position: a position on a token axis is mapped, pinned, or refused."""

import sys

import torch

from tpcompile.axes import Factors
from tpcompile.passes.rules.base import Call, Held, names, register

aten = torch.ops.aten


def _select(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    (dim,) = call.dims("dim", len(letters))
    outs = tuple(f for d, f in enumerate(letters) if d != dim)
    index = call.args["index"]
    if not isinstance(index, int) or index < 0:
        return Factors((letters,), (outs,), rigid=frozenset({letters[dim]}))
    return Factors((letters,), (outs,), reads={letters[dim]: (index, index + 1)})


def _slice(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    dim = int(call.args.get("dim", 0)) % len(letters)
    start, end, step = call.args.get("start") or 0, call.args.get("end"), call.args.get("step", 1)
    if call.tensors[0].shape == call.out.shape:
        return Factors((letters,), (letters,))
    outs = tuple("out" if d == dim else f for d, f in enumerate(letters))
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end < sys.maxsize and step == 1):
        return Factors((letters,), (outs,), rigid=frozenset({letters[dim], "out"}))
    return Factors((letters,), (outs,), reads={letters[dim]: (start, end)}, rigid=frozenset({"out"}))


def _cat(call: Call) -> Factors:
    letters = names(call.out.rank)
    dim = int(call.args.get("dim", 0)) % len(letters)
    ins = tuple(tuple(f"in{i}" if d == dim else f for d, f in enumerate(letters)) for i, _ in enumerate(call.tensors))
    rigid = {letters[dim], *(f"in{i}" for i, _ in enumerate(call.tensors))}
    return Factors(ins, (letters,), rigid=frozenset(rigid))


def _embedding(call: Call) -> Factors:
    letters = names(call.tensors[1].rank)
    return Factors((("rows", "c"), letters), ((*letters, "c"),), rigid=frozenset({"rows"}))


def _gather(call: Call) -> Factors:
    letters = names(call.out.rank)
    (dim,) = call.dims("dim", call.out.rank)
    data, index = call.tensors
    short = {d for d, f in enumerate(letters) if d != dim and data.shape[d] != index.shape[d]}  # reads a prefix, by position
    source = tuple(f"rows{d}" if d == dim or d in short else f for d, f in enumerate(letters))
    return Factors(
        (source, letters), (letters,), rigid=frozenset({f"rows{dim}", *(r for d in short for r in (f"rows{d}", letters[d]))})
    )


def _index_select(call: Call) -> Factors:
    letters = names(call.out.rank)
    dim = int(call.args["dim"]) % call.out.rank
    source = tuple("rows" if d == dim else f for d, f in enumerate(letters))
    return Factors((source, (letters[dim],)), (letters,), rigid=frozenset({"rows"}))


def _ordered(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    dim = int(call.args.get("dim", -1)) % len(letters)
    outs = tuple("out" if d == dim else f for d, f in enumerate(letters))
    return Factors((letters,), tuple(outs for _ in call.outs), rigid=frozenset({letters[dim], "out"}))


def _extreme(call: Call) -> Factors:
    """Values and positions along one dim, which may vanish."""
    letters = names(call.tensors[0].rank)
    (dim,) = call.dims("dim", len(letters))
    keeps = call.args.get("keepdim")
    outs = tuple(None if d == dim else f for d, f in enumerate(letters) if keeps or d != dim)
    return Factors((letters,), tuple(outs for _ in call.outs), rigid=frozenset({letters[dim]}))


def _scan(call: Call) -> Factors:
    letters = names(call.tensors[0].rank)
    (dim,) = call.dims("dim", len(letters))
    return Factors((letters,), tuple(letters for _ in call.outs), rigid=frozenset({letters[dim]}))


def _index(call: Call) -> Factors:
    """One index of whole numbers takes rows of one dim; several together, or a mask, are read by position."""
    data = call.tensors[0]
    asked = [(d, i) for d, i in enumerate(call.args["indices"]) if i is not None]
    if len(asked) == 1 and asked[0][1].dtype not in (torch.bool, torch.uint8):
        (dim, index), letters = asked[0], names(data.rank)
        places = names(index.rank, "i")
        ins = (tuple("rows" if d == dim else f for d, f in enumerate(letters)), places)
        return Factors(ins, ((*letters[:dim], *places, *letters[dim + 1 :]),), rigid=frozenset({"rows"}))
    every = tuple(names(t.rank, f"in{i}.") for i, t in enumerate(call.tensors))
    outs = names(call.out.rank, "out")
    return Factors(every, (outs,), rigid=frozenset({*outs, *(f for dims in every for f in dims)}))


def _scatter(call: Call) -> Factors:
    letters = names(call.out.rank)
    dim = int(call.args["dim"]) % call.out.rank
    index = call.tensors[1]
    short = {d for d in range(call.out.rank) if d != dim and any(t.shape[d] != call.out.shape[d] for t in call.tensors[1:])}
    rigid = {letters[d] for d in {dim, *short}}
    ins = [letters]
    for i, _ in enumerate(call.tensors[1:]):
        ins.append(tuple(f"in{i}.{d}" if d == dim or d in short else f for d, f in enumerate(letters)))
        rigid |= {f"in{i}.{d}" for d in {dim, *short}}
    assert index.rank == call.out.rank
    return Factors(tuple(ins), (letters,), rigid=frozenset(rigid))


def _bucketize(call: Call) -> Factors:
    letters = names(call.out.rank)
    return Factors((letters, ("edges",)), (letters,), rigid=frozenset({"edges"}))


def _data() -> torch.Tensor:
    return torch.randn(4, 5, 3)


register(aten.select.int, _select, lambda: [(_data(), 1, 0), (_data(), 1, 2), (_data(), 2, 1), (_data(), 1, -1)], held=Held.COPY)
register(
    aten.slice.Tensor,
    _slice,
    lambda: [(_data(), 1, 0, 2), (_data(), 1, 1, 3), (_data(), 2, 0, 3), (_data(), 1, 1)],
    held=Held.COPY,
)
register(aten.cat.default, _cat, lambda: [([torch.randn(4, 5, 3), torch.randn(4, 5, 6)], -1)], held=Held.FRONT)
register(aten.embedding.default, _embedding, lambda: [(torch.randn(7, 3), torch.randint(0, 7, (4, 5)))], held=Held.PICK)
register(
    aten.gather.default,
    _gather,
    lambda: [(_data(), 2, torch.randint(0, 3, (4, 5, 6))), (_data(), 2, torch.randint(0, 3, (4, 2, 6)))],
    held=Held.PICK,
)
register(aten.index_select.default, _index_select, lambda: [(torch.randn(4, 7, 3), 1, torch.randint(0, 7, (5,)))], held=Held.PICK)
register(aten.topk.default, _ordered, lambda: [(torch.randn(4, 5, 6), 2)])
register(aten.sort.default, _ordered, lambda: [(torch.randn(4, 5, 6),)])
for _op in (aten.max.dim, aten.min.dim, aten.median.dim, aten.mode.default):
    register(_op, _extreme, lambda: [(_data(), 1), (_data(), 1, True)])
register(aten.kthvalue.default, _extreme, lambda: [(_data(), 2, 1), (_data(), 2, 1, True)])
for _op in (aten.cummax.default, aten.cummin.default):
    register(_op, _scan, lambda: [(_data(), 1)])
register(
    aten.index.Tensor,
    _index,
    lambda: [
        (_data(), [None, torch.randint(0, 5, (6,))]),
        (torch.randn(7, 3), [torch.randint(0, 7, (4, 5))]),
        (_data(), [torch.randint(0, 4, (6,)), torch.randint(0, 5, (6,))]),
        (_data(), [torch.randn(4, 5) > 0]),
    ],
    held=Held.PICK,
)
register(
    aten.scatter.value,
    _scatter,
    lambda: [(_data(), 2, torch.randint(0, 3, (4, 5, 2)), 1.5), (_data(), 2, torch.randint(0, 3, (4, 2, 2)), 1.5)],
)
register(aten.scatter.src, _scatter, lambda: [(_data(), 2, torch.tensor([0, 2]).expand(4, 5, 2), torch.randn(4, 5, 2))])
register(aten.bucketize.Tensor, _bucketize, lambda: [(_data(), torch.tensor([-1.0, 0.0, 1.0, 2.0]))])
