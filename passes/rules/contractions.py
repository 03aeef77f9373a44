"""Products of tensors, as equations: the factor that both operands share and the result lacks folds with 0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch._ops import OpOverload

from tpcompile.axes import Factors, parse
from tpcompile.passes.rules.base import Call, Held, Meta, names, register

aten = torch.ops.aten


def contraction(op: OpOverload, equation: str, folds: str, samples: list[tuple[tuple[int, ...], ...]]) -> None:
    """Register a product with fixed ranks: ``contraction(aten.bmm.default, "b i k, b k j -> b i j", "k", ...)``."""
    ins, outs = parse(equation)

    def factors(call: Call) -> Factors:
        return Factors(ins[: len(call.tensors)], outs, folds=dict.fromkeys(folds.split(), 0.0), product=True)

    register(op, factors, lambda: [tuple(torch.randn(*s) for s in shapes) for shapes in samples], held=Held.ZERO)


def _batch(meta: Meta, out: Meta, own: int) -> tuple[str | None, ...]:
    """Factors of the leading dims of an operand whose last ``own`` dims are its matrix; they broadcast."""
    letters = names(out.rank, "b")[: out.rank - own]
    lead = meta.shape[:-own]
    shift = len(letters) - len(lead)
    return tuple(f if s != 1 or o == 1 else None for f, s, o in zip(letters[shift:], lead, out.shape[shift:], strict=False))


def _matmul(call: Call) -> Factors:
    left, right = call.tensors
    if left.rank < 2 or right.rank < 2:
        ins = (
            (*names(left.rank - 1, "l"), "k"),
            (*names(max(right.rank - 2, 0), "r"), *(("k", "j") if right.rank > 1 else ("k",))),
        )
        outs = (*ins[0][:-1], *(f for f in ins[1] if f != "k"))
        return Factors(ins, (outs,), folds={"k": 0.0}, product=True)
    ins2 = ((*_batch(left, call.out, 2), "i", "k"), (*_batch(right, call.out, 2), "k", "j"))
    return Factors(ins2, ((*names(call.out.rank, "b")[:-2], "i", "j"),), folds={"k": 0.0}, product=True)


def _linear(call: Call) -> Factors:
    lead = names(call.tensors[0].rank - 1, "b")
    ins = ((*lead, "k"), ("o", "k"), ("o",))[: len(call.tensors)]
    return Factors(ins, ((*lead, "o"),), folds={"k": 0.0}, product=len(call.tensors) == 2)


register(
    aten.matmul.default,
    _matmul,
    lambda: [
        (torch.randn(3, 7, 5, 4), torch.randn(3, 7, 4, 6)),
        (torch.randn(3, 7, 5, 4), torch.randn(7, 4, 6)),
        (torch.randn(3, 1, 5, 4), torch.randn(7, 4, 6)),
        (torch.randn(3, 5, 4), torch.randn(4, 6)),
        (torch.randn(3, 5, 4), torch.randn(4)),
        (torch.randn(4), torch.randn(3, 4, 6)),
        (torch.randn(5, 4), torch.randn(4)),
        (torch.randn(4), torch.randn(4)),
    ],
    held=Held.ZERO,
)
register(
    aten.linear.default,
    _linear,
    lambda: [(torch.randn(6, 5, 4), torch.randn(3, 4)), (torch.randn(6, 5, 4), torch.randn(3, 4), torch.randn(3))],
    held=Held.ZERO,
)
contraction(aten.bmm.default, "b i k, b k j -> b i j", "k", [((6, 5, 4), (6, 4, 3))])
contraction(aten.mm.default, "i k, k j -> i j", "k", [((5, 4), (4, 3))])
contraction(aten.mv.default, "i k, k -> i", "k", [((5, 4), (4,))])
contraction(aten.dot.default, "k, k ->", "k", [((4,), (4,))])


def _einsum(call: Call) -> Factors:
    """The equation is the rule; a letter that stands twice in one operand is read as positions."""
    left, arrow, right = str(call.args["equation"]).replace(" ", "").partition("->")
    sides = left.split(",")
    plain = arrow and "." not in left and len(sides) == len(call.tensors)
    if not plain:
        ins = tuple(names(t.rank, f"in{i}.") for i, t in enumerate(call.tensors))
        outs = names(call.out.rank, "out")
        return Factors(ins, (outs,), rigid=frozenset({*outs, *(f for dims in ins for f in dims)}))
    sizes = dict[str, object]()
    for letter, size in [(f, s) for side, t in zip(sides, call.tensors, strict=True) for f, s in zip(side, t.shape, strict=True)]:
        sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    fits = [
        tuple(f if s == sizes[f] else None for f, s in zip(side, t.shape, strict=True))
        for side, t in zip(sides, call.tensors, strict=True)
    ]
    twice = {f for side in sides for f in side if side.count(f) > 1}
    folds = {f: 0.0 for f in dict.fromkeys("".join(sides)) if f not in right and f not in twice}
    return Factors(tuple(fits), (tuple(right),), folds=folds, rigid=frozenset(twice), product=True)


def _convolution(call: Call) -> Factors:
    """A kernel of one position is a contraction over channels; any other reads neighbours, by position."""
    data, weight = call.tensors[:2]
    spatial = weight.rank - 2
    given = call.args
    lead = names(data.rank - spatial - 1, "n")
    bias = (("o",),) if len(call.tensors) > 2 else ()
    if _pointlike(given, weight):
        place = names(spatial, "s")
        ins = ((*lead, "c", *place), ("o", "c", *(None for _ in place)), *bias)
        return Factors(ins, ((*lead, "o", *place),), folds={"c": 0.0}, product=not bias)
    ins = ((*lead, "c", *names(spatial, "s")), ("o", "w", *names(spatial, "k")), *bias)
    outs = (*lead, "o", *names(spatial, "t"))
    return Factors(ins, (outs,), rigid=frozenset({f for dims in (*ins, outs) for f in dims} - set(lead)))


def _pointlike(given: Mapping[str, Any], weight: Meta) -> bool:
    def all_are(name: str, number: int) -> bool:
        value = given.get(name, number)
        return all(v == number for v in value) if isinstance(value, (list, tuple)) else value == number

    return all(s == 1 for s in weight.shape[2:]) and all_are("stride", 1) and all_are("padding", 0) and all_are("groups", 1)


register(
    aten.einsum.default,
    _einsum,
    lambda: [
        ("bic,bjc->bij", [torch.randn(6, 5, 4), torch.randn(6, 3, 4)]),
        ("bhij,bjhd->bihd", [torch.randn(6, 3, 5, 4), torch.randn(6, 4, 3, 7)]),
        ("bnhd,hdc->bnc", [torch.randn(6, 5, 3, 4), torch.randn(3, 4, 7)]),
        ("bn,bnc->bc", [torch.randn(6, 5), torch.randn(1, 5, 4)]),
        ("bi,bj,bk->bijk", [torch.randn(6, 5), torch.randn(6, 4), torch.randn(6, 3)]),
        ("bii->bi", [torch.randn(6, 5, 5)]),
        ("...ic,...jc->...ij", [torch.randn(6, 5, 4), torch.randn(6, 3, 4)]),
    ],
    held=Held.ZERO,
)
register(
    aten.conv1d.default,
    _convolution,
    lambda: [
        (torch.randn(6, 4, 5), torch.randn(3, 4, 1)),
        (torch.randn(6, 4, 5), torch.randn(3, 4, 1), torch.randn(3)),
        (torch.randn(6, 4, 5), torch.randn(7, 4, 3), torch.randn(7), [1], [1]),
        (torch.randn(6, 4, 5), torch.randn(4, 1, 1), torch.randn(4), [1], [0], [1], 4),
    ],
)
register(
    aten.conv2d.default,
    _convolution,
    lambda: [
        (torch.randn(6, 4, 5, 3), torch.randn(7, 4, 1, 1)),
        (torch.randn(4, 5, 3), torch.randn(7, 4, 1, 1), torch.randn(7)),
        (torch.randn(6, 4, 5, 7), torch.randn(7, 4, 2, 2), None, [2, 2]),
    ],
)
register(aten.conv1d.padding, _convolution, lambda: [(torch.randn(6, 4, 5), torch.randn(7, 4, 3), torch.randn(7), [1], "same")])


def _attention(call: Call) -> Factors:
    """Rows of queries are free unless a causal mask counts them; keys, and the width that scales the logits, are not."""
    sides = [("i", "c"), ("j", "c"), ("j", "e"), ("i", "j")]
    ins: list[tuple[str | None, ...]] = []
    for tensor, side in zip(call.tensors, sides, strict=False):
        last = tuple(f if s != 1 or f != "i" else None for f, s in zip(side, tensor.shape[-2:], strict=True))
        ins.append((*_batch(tensor, call.out, 2), *last))
    outs: tuple[str | None, ...] = (*names(call.out.rank, "b")[:-2], "i", "e")
    rigid = {
        "j",
        "c",
        *("i" if call.args.get("is_causal") else ()),
        *(names(call.out.rank, "b")[:-2] if call.args.get("enable_gqa") else ()),
    }
    if call.tensors[0].shape[-2] == 1:  # one query is no row of a set, and a mask of one row may stand for all
        ins[0], outs = (*ins[0][:-2], None, "c"), (*outs[:-2], None, "e")
    return Factors(tuple(ins), (outs,), rigid=frozenset(rigid))


register(
    aten.scaled_dot_product_attention.default,
    _attention,
    lambda: [
        (torch.randn(3, 4, 5, 6), torch.randn(3, 4, 7, 6), torch.randn(3, 4, 7, 8)),
        (torch.randn(3, 4, 5, 6), torch.randn(3, 4, 7, 6), torch.randn(3, 4, 7, 8), torch.randn(3, 1, 5, 7)),
        (torch.randn(3, 4, 5, 6), torch.randn(3, 4, 7, 6), torch.randn(3, 4, 7, 8), torch.randn(3, 1, 1, 7) > -1),
        (torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), None, 0.0, True),
    ],
)
