"""Products of tensors, as equations: the factor that both operands share and the result lacks folds with 0."""

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
    return tuple(f if s == o or o == 1 else None for f, s, o in zip(letters[shift:], lead, out.shape[shift:], strict=False))


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
