"""Elementwise ops: dims align from the right, every factor is free."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from tpcompile.axes import Factors
from tpcompile.passes.rules.base import Call, Held, Meta, names, register

aten = torch.ops.aten


def aligned(meta: Meta, out: Meta) -> tuple[str | None, ...]:
    """The factor of each dim of an operand that broadcasts to ``out``; a dim of size 1 that is spread out has none.

    Only the literal 1 is spread: any other size is the result's, however it is written (a slice up to N has size ``Min(64, N)``).
    """
    letters = names(out.rank)[out.rank - meta.rank :]
    sizes = out.shape[out.rank - meta.rank :]
    return tuple(f if s != 1 or o == 1 else None for f, s, o in zip(letters, meta.shape, sizes, strict=True))


def _factors(call: Call) -> Factors:
    return Factors(tuple(aligned(t, call.out) for t in call.tensors), (names(call.out.rank),))


def _product(call: Call) -> Factors:
    plain = _factors(call)
    return Factors(plain.ins, plain.outs, product=True)


def pointwise(
    *ops: OpOverload,
    samples: Callable[[], Sequence[tuple[Any, ...]]],
    absorbs: float | None = None,
    neutral: tuple[float | None, ...] = (),
    product: bool = False,
) -> None:
    """Register elementwise ops that share samples."""
    for op in ops:
        register(op, _product if product else _factors, samples, held=Held.MAP, absorbs=absorbs, neutral=neutral)


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _b(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) > 0.4


def _pairs() -> list[tuple[Any, ...]]:
    return [(_x(4, 5, 3), _x(4, 5, 3)), (_x(3, 4, 5, 5), _x(3, 1, 1, 5)), (_x(5, 3), _x(3)), (_x(1, 5, 3), _x(4, 1, 3))]


def _positive() -> list[tuple[Any, ...]]:
    return [(_x(4, 5, 3), _x(4, 5, 1).abs() + 1), (_x(4, 5), torch.tensor(3.0))]


def _bools() -> list[tuple[Any, ...]]:
    return [(_b(4, 5), _b(4, 5)), (_b(3, 1, 5, 1), _b(3, 1, 1, 5)), (torch.randint(0, 4, (4, 5)), torch.randint(0, 4, (4, 5)))]


def _one() -> list[tuple[Any, ...]]:
    return [(_x(4, 5, 3),), (_x(3, 4, 5, 5),)]


def _scalar() -> list[tuple[Any, ...]]:
    return [(_x(4, 5, 3), 0.5), (_x(3, 4, 5, 5), 2.0)]


def _wheres() -> list[tuple[Any, ...]]:
    return [(_b(4, 1, 1, 5), _x(4, 3, 5, 5), torch.tensor(-1e4)), (_b(4, 5, 1), _x(4, 5, 3), _x(3))]


pointwise(aten.add.Tensor, samples=_pairs, neutral=(0.0, 0.0))
pointwise(aten.sub.Tensor, samples=_pairs, neutral=(None, 0.0))
pointwise(aten.maximum.default, aten.minimum.default, samples=_pairs)
pointwise(aten.mul.Tensor, samples=_pairs, absorbs=0.0, neutral=(1.0, 1.0), product=True)
pointwise(aten.div.Tensor, samples=_positive, neutral=(None, 1.0))
pointwise(aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.eq.Tensor, aten.ne.Tensor, samples=_pairs)
pointwise(aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, samples=_bools, absorbs=0.0, neutral=(1.0, 1.0))
pointwise(aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, samples=_bools, absorbs=1.0, neutral=(0.0, 0.0))
pointwise(aten.bitwise_xor.Tensor, aten.logical_xor.default, samples=_bools)
pointwise(aten.bitwise_not.default, aten.logical_not.default, samples=lambda: [(_b(4, 5),)])
pointwise(
    aten.neg.default, aten.abs.default, aten.exp.default, aten.tanh.default, aten.sigmoid.default, aten.relu.default, aten.gelu.default,
    aten.silu.default, aten.erf.default, aten.sin.default, aten.cos.default, aten.clone.default, aten.sign.default, aten.floor.default,
    samples=_one,
)  # fmt: skip
pointwise(
    aten.elu.default, aten.selu.default, aten.celu.default, aten.mish.default, aten.hardswish.default, aten.hardsigmoid.default,
    aten.hardtanh.default, aten.relu6.default, aten.leaky_relu.default, aten.softplus.default, aten.log_sigmoid.default,
    aten.round.default, aten.ceil.default, aten.trunc.default, aten.frac.default, aten.expm1.default, aten.exp2.default,
    aten.erfc.default, aten.sinh.default, aten.cosh.default, aten.tan.default, aten.atan.default, aten.sgn.default,
    aten.nan_to_num.default, aten.isnan.default, aten.isinf.default, aten.isfinite.default, aten.reciprocal.default,
    samples=_one,
)  # fmt: skip
pointwise(
    aten.log1p.default, aten.log2.default, aten.log10.default, aten.acosh.default, samples=lambda: [(_x(4, 5, 3).abs() + 1,)]
)
pointwise(aten.logit.default, samples=lambda: [(torch.rand(4, 5, 3), 1e-6), (torch.rand(4, 5, 3) / 2 + 0.1,)])
pointwise(aten.round.decimals, samples=lambda: [(_x(4, 5, 3), {"decimals": 2})])
pointwise(aten.div.Tensor_mode, samples=lambda: [(_x(4, 5, 3), _x(5, 1).abs() + 1, {"rounding_mode": "floor"})])
pointwise(aten.div.Scalar_mode, samples=lambda: [(_x(4, 5, 3), 2.0, {"rounding_mode": "trunc"})])
pointwise(aten.threshold.default, samples=lambda: [(_x(4, 5, 3), 0.1, -2.0)])
pointwise(
    aten.fmax.default, aten.fmin.default, aten.atan2.default, aten.hypot.default, aten.logaddexp.default, aten.heaviside.default,
    aten._prelu_kernel.default, samples=_pairs,
)  # fmt: skip
pointwise(
    aten.remainder.Tensor, aten.fmod.Tensor, aten.floor_divide.default, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
    samples=_positive,
)  # fmt: skip
pointwise(aten.pow.Tensor_Tensor, aten.special_xlogy.default, samples=lambda: [(_x(4, 5, 3).abs() + 1, _x(5, 1).abs() + 1)])
pointwise(aten.clamp.Tensor, samples=lambda: [(_x(4, 5, 3), -_x(3).abs(), _x(5, 1).abs())])
pointwise(aten.sqrt.default, aten.rsqrt.default, aten.log.default, samples=lambda: [(_x(4, 5, 3).abs() + 1,)])
pointwise(aten.remainder.Scalar, aten.fmod.Scalar, aten.clamp_max.default, samples=_scalar)
pointwise(aten.pow.Scalar, samples=lambda: [(2.0, _x(4, 5, 3))])
pointwise(
    aten.bitwise_and.Scalar, aten.bitwise_or.Scalar, aten.bitwise_xor.Scalar, aten.__and__.Scalar, aten.__or__.Scalar,
    aten.__xor__.Scalar, aten.__lshift__.Scalar, aten.__rshift__.Scalar, samples=lambda: [(torch.randint(0, 4, (4, 5)), 1)],
)  # fmt: skip
pointwise(aten.__xor__.Tensor, samples=_bools)
pointwise(aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.pow.Tensor_Scalar, aten.clamp_min.default, samples=_scalar)
pointwise(aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.eq.Scalar, aten.ne.Scalar, samples=_scalar)
pointwise(aten.mul.Scalar, aten.div.Scalar, aten.clamp.default, samples=_scalar)
pointwise(aten.where.self, samples=_wheres)
pointwise(aten.where.Scalar, samples=lambda: [(_b(4, 5), 0.0, -1e4)])
pointwise(aten.where.ScalarOther, samples=lambda: [(_b(4, 1, 5), _x(4, 5, 5), -1e4)], neutral=(1.0, None))
pointwise(aten.where.ScalarSelf, samples=lambda: [(_b(4, 1, 5), 0.0, _x(4, 5, 5))], neutral=(0.0, None))
pointwise(aten.masked_fill.Scalar, samples=lambda: [(_x(4, 3, 5, 5), _b(4, 1, 1, 5), -1e4)], neutral=(None, 0.0))
pointwise(aten.masked_fill.Tensor, samples=lambda: [(_x(4, 3, 5, 5), _b(4, 1, 1, 5), torch.tensor(-1e4))])


pointwise(aten.zeros_like.default, aten.ones_like.default, samples=_one)
pointwise(aten.full_like.default, samples=_scalar)


def _casts(call: Call) -> Factors:
    letters = names(call.out.rank)
    return Factors((letters,), (letters,))


register(aten._to_copy.default, _casts, lambda: [(_b(4, 5),), (_x(4, 5, 3),)], held=Held.MAP)
