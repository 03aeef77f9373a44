"""0-1 arithmetic written as logic, and a softmax with a policy written as a masked one.

1. ``k + (1 - k) * e`` and ``a + b - a * b`` of masks are their maximum: a sum of products would not show that it is 0 or 1;
2. ``exp(x - max) * m / sum(exp(x - max) * m)`` is the softmax of ``x`` where ``m`` is 1 and -inf elsewhere: the shift cancels. With
   something added to the denominator it is not, and is left as it is;
3. so is ``softmax(x) * m`` over its own sum: columns set to zero and the rest scaled to one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tpcompile.axes import NEG_INF
from tpcompile.passes.masks import BITS, Masks
from tpcompile.passes.rules.base import size
from tpcompile.passes.rules.forms import Writer

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


def logic(graph: fx.Graph, masks: Masks) -> Iterator[fx.Node]:
    """Rewrite a graph in place; gives every softmax that was written anew under a mask.

    Args:
        graph: with metadata on every node.
        masks: its masks.
    """
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            made = _either(node, masks) if node.target in (aten.add.Tensor, aten.sub.Tensor) else None
            weights = _normalised(node) if node.target is aten.div.Tensor else None
            if weights is not None:
                made = _masked(node, *weights, masks)
        if made is not None and _alike(made, node):
            node.replace_all_uses_with(made)
            if node.target is aten.div.Tensor:
                yield made
            else:
                masks.known[made.name] = BITS


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have one dtype and one shape."""
    a, b = one.meta["val"], other.meta["val"]
    return a.dtype is b.dtype and [*map(size, a.shape)] == [*map(size, b.shape)]


def _either(node: fx.Node, masks: Masks) -> fx.Node | None:
    """Case 1."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    given: Any = node.args
    first, second = given
    pairs: list[tuple[Any, Any]] = []
    if node.target is aten.add.Tensor:
        for mask, product in ((first, second), (second, first)):
            pairs += [(mask, other) for less, other in _factors(product) if _complement(less) is mask]
    elif first.target is aten.add.Tensor and len(first.args) == 2 and not first.kwargs:
        pairs = [(a, b) for a, b in _factors(second) if set(first.args) == {a, b}]
    return next((Writer(node)(aten.maximum.default, a, b) for a, b in pairs if masks(a) == BITS == masks(b)), None)


def _factors(node: Any) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of a product's operands."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
        return []
    a, b = node.args
    return [(a, b), (b, a)]  # type: ignore[list-item]


def _complement(node: fx.Node) -> fx.Node | None:
    """``x`` of ``1 - x``."""
    one = node.target is aten.rsub.Scalar and len(node.args) == 2 and node.args[1] == 1 and not node.kwargs
    return node.args[0] if one and isinstance(node.args[0], fx.Node) else None


def _normalised(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``w`` and the dim of ``w / w.sum(dim, keepdim=True)``."""
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    given: Any = node.args
    weights, total = given
    while total.target is aten.expand.default:
        total = total.args[0]
    if total.target is not aten.sum.dim_IntList or total.args[0] is not weights:
        return None
    w = Writer(total)
    dims = w.dims(weights)
    plain = w.given.get("dtype") in (None, weights.meta["val"].dtype)
    return (weights, dims[0]) if len(dims) == 1 and w["keepdim"] and plain else None


def _masked(node: fx.Node, weights: fx.Node, dim: int, masks: Masks) -> fx.Node | None:
    """Cases 2 and 3."""
    for source, mask in _factors(weights):
        logits = _logits(source, dim - weights.meta["val"].dim())
        if logits is not None and masks(mask) and masks(mask) <= BITS:
            w = Writer(node)
            open_ = mask if mask.meta["val"].dtype is torch.bool else w(aten.ne.Scalar, mask, 0)
            return w(aten.softmax.int, w(aten.where.ScalarOther, open_, logits, NEG_INF), dim)
    return None


def _logits(node: fx.Node, dim: int) -> Any:
    """What a softmax along a dim was taken of, or exponentials after a row's largest element was taken away. None for anything else.

    Without that the exponentials may overflow, where a softmax does not. The dim is counted from the right: a mask may have more dims than
    what it is multiplied with.
    """
    given: Any = node.args
    along = [node.meta["val"].dim() + dim]
    if node.target in _SOFTMAX:
        return given[0] if Writer(node).dims(given[0]) == along else None
    if node.target is not aten.exp.default:
        return None
    logits, found = given[0], None
    if logits.target is aten.sub.Tensor and len(logits.args) == 2 and not logits.kwargs:
        x, most = logits.args
        if isinstance(most, fx.Node) and most.target is aten.amax.default and most.args[0] is x:
            w = Writer(most)
            found = x if w.dims(logits) == along and w["keepdim"] else None
    return found
