"""Families of ops between two sites' worth of masks: each compiles and gives what eager gives; a few are refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import AxisError, RigidAxis, UnknownOp, UnmaskedFold
from tpcompile.passes import DEFAULT, Canonicalize
from tpcompile.passes.rules import RULES
from tpcompile.program import Program

Toy = Callable[..., Program]
Agree = Callable[..., None]
Rows = Callable[[Tensor, Tensor], Tensor]
aten = torch.ops.aten


class Pooled(nn.Module):
    """What ``rows`` makes of pruned tokens, summed over the kept ones."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        keep = keep | (torch.arange(keep.shape[1]) == 0)
        y = self.rows(ops.prune(x, keep), keep)
        return torch.where(keep.unsqueeze(-1), y, 0.0).sum(1)


def heads(x: Tensor) -> Tensor:
    return x.view(1, -1, 2, 2).transpose(1, 2)


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def bias(keep: Tensor, low: float = -1e4) -> Tensor:
    return (1.0 - keep.float())[:, None, None, :] * low


def by_index_put(x: Tensor, keep: Tensor) -> Tensor:
    logits = torch.zeros_like(keep, dtype=torch.float32)
    logits[~keep] = -1e4
    p = (x @ x.transpose(1, 2) + logits.unsqueeze(1)).softmax(-1)
    return p @ x


def zeroed_columns(x: Tensor, keep: Tensor) -> Tensor:
    p = (x @ x.transpose(1, 2)).sigmoid().clone()
    p[~keep.unsqueeze(1).expand_as(p)] = 0
    return p @ x


def written_out(x: Tensor, keep: Tensor) -> Tensor:
    logits = (x @ x.transpose(1, 2)).masked_fill(~keep.unsqueeze(1), torch.finfo(x.dtype).min)
    e = (logits - logits.amax(-1, keepdim=True)).exp() * keep.float().unsqueeze(1)
    return (e / (e.sum(-1, keepdim=True) + 1e-6)) @ x


def normed(x: Tensor, keep: Tensor) -> Tensor:
    away = x - x.mean(-1, keepdim=True)
    y = away / (away.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
    return y * (y * keep.unsqueeze(-1)).sum(1, keepdim=True)


def variance(x: Tensor, keep: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    y = (x - mean) * torch.rsqrt(var + 1e-6) + x.std(-1, keepdim=True)
    return y * (y * keep.unsqueeze(-1)).sum(1, keepdim=True)


def masks_as_ints(x: Tensor, keep: Tensor) -> Tensor:
    m = keep.int()
    dead = 1 - m
    twice = torch.minimum(m, m * m).type_as(x)
    low = (dead * -10000).clamp(min=-20000).float() + (1 - twice) * -1e4
    return (x @ x.transpose(1, 2) + low.unsqueeze(1)).softmax(-1) @ x


FAMILIES: dict[str, Rows] = {
    "attention, bool mask": lambda x, k: merged(F.scaled_dot_product_attention(*[heads(x)] * 3, attn_mask=k[:, None, None, :])),
    "attention, float mask": lambda x, k: merged(F.scaled_dot_product_attention(*[heads(x)] * 3, attn_mask=bias(k))),
    "attention, lowest float": lambda x, k: merged(
        F.scaled_dot_product_attention(*[heads(x)] * 3, attn_mask=bias(k, torch.finfo(torch.float32).min), scale=0.3)
    ),
    "attention, shared heads": lambda x, k: merged(
        F.scaled_dot_product_attention(
            heads(x), heads(x)[:, :1], heads(x)[:, 1:], attn_mask=k[:, None, None, :], enable_gqa=True
        )
    ),
    "einsum": lambda x, k: torch.einsum(
        "bij,bjc->bic", (torch.einsum("bic,bjc->bij", x, x) + bias(k)[:, 0]).softmax(-1), x
    ),
    "einsum, heads": lambda x, k: torch.einsum(
        "bhij,bjhd->bihd",
        (torch.einsum("bihd,bjhd->bhij", *[x.view(1, -1, 2, 2)] * 2) + bias(k)).softmax(-1),
        x.view(1, -1, 2, 2),
    ).flatten(2),
    "einsum, two summed": lambda x, k: torch.einsum("bnhd,hdc->bnc", x.view(1, -1, 2, 2), torch.ones(2, 2, 4)),
    "split": lambda x, k: torch.cat([x.split(2, -1)[1], *x.split([1, 1, 2], -1)[:2]], -1),
    "chunk": lambda x, k: torch.cat(x.chunk(2, -1)[::-1], -1) + torch.stack(x.view(1, -1, 2, 2).unbind(2), -2).flatten(2),
    "assigned": by_index_put,
    "columns assigned": zeroed_columns,
    "softmax by hand": written_out,
    "norm by hand": normed,
    "variance": variance,
    "whole numbers": masks_as_ints,
    "other norms": lambda x, k: F.rms_norm(x, (4,), eps=1e-6) + F.batch_norm(x.mT, torch.zeros(4), torch.ones(4)).mT,
    "norms of rows": lambda x, k: F.normalize(x, dim=-1) + x.norm(dim=-1, keepdim=True) + F.cosine_similarity(x, x * 2, -1).unsqueeze(-1),
    "pointwise": lambda x, k: F.mish(F.hardswish(F.elu(x))) + F.leaky_relu(x) + F.softplus(x)
    + F.gelu(x, approximate="tanh") + F.glu(x.repeat(1, 1, 2)),
    "rounded": lambda x, k: x.round() + x.ceil() + x % 2 + x // 3 + torch.div(x, 2, rounding_mode="trunc") + 1 / (x.square() + 1),
    "shapes": lambda x, k: x.movedim(1, 2).swapaxes(1, 2).unflatten(-1, (2, 2)).flip(-1).flatten(2).roll(1, -1) + F.pad(x[..., :3], (0, 1)),
    "spread": lambda x, k: k.unsqueeze(-1).repeat(1, 1, 4) * x + x.repeat_interleave(2, -1)[..., :4],
    "extremes": lambda x, k: x.max(-1, keepdim=True).values + x.min(-1, keepdim=True)[0] + torch.max(x, x * 2)
    + x.topk(2, -1)[0].sum(-1, True),
    "convolution of one": lambda x, k: F.conv1d(x.mT, torch.ones(4, 4, 1)).mT,
    "products": lambda x, k: torch.addcmul(x, x, x) + torch.baddbmm(x, x, torch.ones(1, 4, 4), alpha=0.5) + torch.lerp(x, x * 2, 0.25),
    "embedding of positions": lambda x, k: x + torch.arange(256.0).view(64, 4)[torch.arange(x.shape[1])],
    "classes": lambda x, k: x + F.one_hot((x[..., 0] > 0).long(), 4) + torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
    "masked any": lambda x, k: x * ((x > 0) & k.unsqueeze(-1)).any(1, keepdim=True) + ((x > 0) | ~k.unsqueeze(-1)).all(1).unsqueeze(1),
    "log sum": lambda x, k: x + x.masked_fill(~k.unsqueeze(-1), -1e4).logsumexp(1, keepdim=True),
    "diagonal": lambda x, k: x * (x @ x.mT).diagonal(dim1=1, dim2=2).unsqueeze(-1),
    "first row assigned": lambda x, k: x.select_scatter(torch.zeros(1, 4), 1, 0) + x.slice_scatter(torch.ones(1, x.shape[1], 2), 2, 1, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_compiles(toy: Toy, agree: Agree, name: str) -> None:
    model = Pooled(FAMILIES[name])
    captured = toy(model)
    agree(model, Canonicalize()(captured))
    program = DEFAULT(captured)
    agree(model, program)
    assert any("t1" in p.shape([None] * 9) for p in program.placements.values())


REFUSED: dict[str, tuple[Rows, type[AxisError]]] = {
    "cumulative": (lambda x, k: x.cummax(1).values, RigidAxis),
    "sorted": (lambda x, k: x.sort(1)[0], RigidAxis),
    "neighbours": (lambda x, k: F.conv1d(x.mT, torch.ones(4, 4, 3), padding=1).mT, RigidAxis),
    "group norm": (lambda x, k: F.group_norm(x.mT, 2).mT, RigidAxis),
    "flipped": (lambda x, k: x.flip(1), RigidAxis),
    "rolled": (lambda x, k: x.roll(1, 1), RigidAxis),
    "padded": (lambda x, k: F.pad(x, (0, 0, 1, 0))[:, :-1], RigidAxis),
    "triangle": (lambda x, k: (x @ x.mT).tril() @ x, RigidAxis),
    "causal": (lambda x, k: F.scaled_dot_product_attention(x, x, x, is_causal=True), UnmaskedFold),
    "unmasked attention": (lambda x, k: F.scaled_dot_product_attention(x, x, x), UnmaskedFold),
    "variance over tokens": (lambda x, k: x + (x * k.unsqueeze(-1)).var(1, keepdim=True), UnmaskedFold),
    "any over tokens": (lambda x, k: x * (x > 0).any(1, keepdim=True), UnmaskedFold),
    "all over zeroed rows": (lambda x, k: x * ((x > 0) & k.unsqueeze(-1)).all(1, keepdim=True), UnmaskedFold),
    "product over zeroed rows": (lambda x, k: x * (x * k.unsqueeze(-1)).prod(1, keepdim=True), UnmaskedFold),
    "einsum over tokens": (lambda x, k: x + torch.einsum("bnc->bc", x).unsqueeze(1), UnmaskedFold),
    "assigned elsewhere": (lambda x, k: x.masked_scatter(k.unsqueeze(-1), x), UnknownOp),
    "divided by what may be 0": (lambda x, k: x * ((x * k.unsqueeze(-1)) / x).sum(1, keepdim=True), UnmaskedFold),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_dropped_tokens_is_refused(toy: Toy, name: str) -> None:
    rows, kind = REFUSED[name]
    with pytest.raises(kind):
        DEFAULT(toy(Pooled(rows)))


class Dense(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=keep.unsqueeze(1))


def test_a_dense_program_keeps_its_attention(toy: Toy, agree: Agree) -> None:
    program = Canonicalize("whole")(toy(Dense()))
    assert program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    agree(Dense(), program)


class Alone(nn.Module):
    """Under a boolean mask, a row without a key gives 0."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=(keep.unsqueeze(1) & keep.unsqueeze(2)))
        return y + ops.prune(x, keep) * 0


def test_rows_without_a_key_are_zero_as_in_eager(toy: Toy, agree: Agree) -> None:
    agree(Alone(), Canonicalize()(toy(Alone())))


def test_every_form_is_of_an_op_without_a_rule_or_narrows_one() -> None:
    from tpcompile.passes.rules.forms import FORMS

    both = {str(op) for op in FORMS.keys() & RULES.keys()}
    assert both == {
        "aten.einsum.default", "aten.max.dim", "aten.min.dim", "aten.any.dim", "aten.all.dim", "aten.repeat.default",
        "aten.constant_pad_nd.default", "aten.index.Tensor",
    }  # fmt: skip
