"""Attention in products and a softmax: the form that a program takes when tokens are pruned out of it."""

import torch
from torch import fx

from tpcompile.passes.rules.forms import Writer

aten = torch.ops.aten


def attention(w: Writer) -> fx.Node | None:
    """``scaled_dot_product_attention`` as products and a softmax. Under a mask, rows whose keys are all masked give 0, as torch has it."""
    q, k, v, mask = w["query"], w["key"], w["value"], w["attn_mask"]
    if w["dropout_p"] != 0.0 or not isinstance(q.meta["val"].shape[-1], int):
        return None
    if w["enable_gqa"] and (grouped := _grouped(w, q, k, v)) is not None:
        k, v = grouped
    scale = w["scale"] if w["scale"] is not None else q.meta["val"].shape[-1] ** -0.5
    logits = w(aten.mul.Tensor, w(aten.matmul.default, q, w(aten.transpose.int, k, -2, -1)), scale)
    if w["is_causal"]:
        keys = w(aten.unsqueeze.default, w(aten.arange.default, w.size(k, -2)), 0)
        queries = w(aten.unsqueeze.default, w(aten.arange.default, w.size(q, -2)), 1)
        logits = w(aten.where.ScalarOther, w(aten.le.Tensor, keys, queries), logits, float("-inf"))
    if mask is None:
        return w(aten.matmul.default, w(aten.softmax.int, logits, -1), v)
    if mask.meta["val"].dtype is torch.bool:
        logits = w(aten.where.ScalarOther, mask, logits, float("-inf"))
    else:
        logits = w(aten.add.Tensor, logits, mask)
    return w(aten.matmul.default, w(aten._safe_softmax.default, logits, -1), v)


def _grouped(w: Writer, q: fx.Node, *tables: fx.Node) -> list[fx.Node] | None:
    """Keys and values with each head as often as queries share it."""
    heads = q.meta["val"].shape[-3]
    shared = [t.meta["val"].shape[-3] for t in tables]
    if not all(isinstance(h, int) for h in (heads, *shared)) or shared == [heads] * len(shared):
        return None
    found = []
    for t in tables:
        shape = w.shape(t)
        at = len(shape) - 3
        wide = w(aten.unsqueeze.default, t, at + 1)
        sizes = [-1] * len(shape)
        wide = w(aten.expand.default, wide, [*sizes[: at + 1], heads // shape[at], *sizes[at + 1 :]])
        found.append(w(aten.reshape.default, wide, [*shape[:at], heads, *shape[at + 1 :]]))
    return found
