"""Ops without a rule, written in ops that have one: op -> what takes its place. ``passes/canonicalize.py`` applies them.

A form returns a node, a list of nodes where the op has several outputs, or None where this call has no plainer form.
"""

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload

from tpcompile.passes.rules.base import bind, size

aten = torch.ops.aten
Arg: TypeAlias = Any
"""An fx node, or a constant."""
Form: TypeAlias = "Callable[[Writer], Any]"

FORMS: dict[OpOverload, Form] = {}


class Writer:
    """Writes nodes in the place of one call, each with the metadata of its kind and the user line of the call.

    Args:
        node: the call.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        self.given: Mapping[str, Arg] = {a.name: a.default_value for a in schema} | bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        leaves = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        self.mode: Any = detect_fake_mode([v for leaf in leaves for v in (leaf if isinstance(leaf, (list, tuple)) else [leaf])])

    def __getitem__(self, name: str) -> Arg:
        return self.given[name]

    def __call__(self, target: Any, *args: Arg, **kwargs: Arg) -> fx.Node:
        """Write a call; sizes among its arguments may be nodes."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {k: v for k, v in self.node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            made.meta["val"] = target(*values, **named)
        return made

    @property
    def out(self) -> Any:
        """What the call gives: a fake tensor, or a tuple of them."""
        return self.node.meta["val"]

    def shape(self, x: fx.Node) -> list[Any]:
        """Sizes: ints, and a ``sym_size`` node for each that is not fixed."""
        return [self.size(x, d) for d in range(x.meta["val"].dim())]

    def size(self, x: fx.Node, dim: int) -> Arg:
        """One size of a tensor."""
        found = x.meta["val"].shape[dim]
        return found if isinstance(found, int) else self(aten.sym_size.int, x, dim % x.meta["val"].dim())

    def dims(self, x: fx.Node, name: str = "dim") -> list[int]:
        """The ``dim`` argument as non-negative ints; missing or empty means all."""
        rank, listed = x.meta["val"].dim(), self.given.get(name)
        listed = [listed] if isinstance(listed, int) else listed
        return [int(d) % rank for d in listed] if listed else list(range(rank))

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A tensor in a dtype."""
        return x if x.meta["val"].dtype is dtype else self(aten._to_copy.default, x, dtype=dtype)

    def trailing(self, x: fx.Node, count: int) -> fx.Node:
        """A tensor with dims of size 1 behind."""
        for _ in range(count):
            x = self(aten.unsqueeze.default, x, -1)
        return x

    def positions(self, x: fx.Node, dim: int) -> fx.Node:
        """``arange`` over a dim, shaped to stand along it."""
        where = self(aten.arange.default, self.size(x, dim))
        return self.trailing(where, x.meta["val"].dim() - 1 - dim % x.meta["val"].dim())


def form(*ops: OpOverload) -> Callable[[Form], Form]:
    """Register a form."""

    def add(function: Form) -> Form:
        FORMS.update(dict.fromkeys(ops, function))
        return function

    return add


@form(aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default)
def _split(w: Writer) -> list[fx.Node | None] | None:
    (dim,), parts = w.dims(w["self"]), w.out
    ends = [0]
    for part in parts[:-1]:
        if not isinstance(part.shape[dim], int):
            return None
        ends.append(ends[-1] + part.shape[dim])
    last = ends[-1] + parts[-1].shape[dim]
    stops = [*ends[1:], last if isinstance(last, int) else sys.maxsize]
    users = {n.args[1] for n in w.node.users if n.target is operator.getitem}
    return [
        w(aten.slice.Tensor, w["self"], dim, a, b) if i in users else None
        for i, (a, b) in enumerate(zip(ends, stops, strict=True))
    ]


@form(aten.unbind.int)
def _unbind(w: Writer) -> list[fx.Node | None]:
    users = {n.args[1] for n in w.node.users if n.target is operator.getitem}
    return [w(aten.select.int, w["self"], w["dim"], i) if i in users else None for i, _ in enumerate(w.out)]


@form(aten.max.dim, aten.min.dim)
def _extreme(w: Writer) -> list[fx.Node | None] | None:
    """Values alone are a maximum; positions need the op."""
    if any(n.args[1] != 0 for n in w.node.users if n.target is operator.getitem):
        return None
    op = aten.amax.default if w.node.target is aten.max.dim else aten.amin.default
    return [w(op, w["self"], [w["dim"]], w["keepdim"]), None]


@form(aten.max.default, aten.min.default, aten.sum.default)
def _over_all(w: Writer) -> fx.Node:
    ops: dict[Any, Any] = {
        aten.max.default: aten.amax.default,
        aten.min.default: aten.amin.default,
        aten.sum.default: aten.sum.dim_IntList,
    }
    more = {"dtype": w["dtype"]} if w.given.get("dtype") is not None else {}
    return w(ops[w.node.target], w["self"], w.dims(w["self"]), False, **more)


@form(aten.prod.default)
def _prod(w: Writer) -> fx.Node:
    x: fx.Node = w["self"] if w["dtype"] is None else w.cast(w["self"], w["dtype"])
    for _ in range(w["self"].meta["val"].dim()):
        x = w(aten.prod.dim_int, x, -1)
    return x


@form(aten.any.default, aten.any.dims, aten.any.dim, aten.all.default, aten.all.dims, aten.all.dim)
def _some(w: Writer) -> Any:
    """One dim at a time, of truth values."""
    x, op = w["self"], aten.any.dim if "any" in str(w.node.target) else aten.all.dim
    if x.meta["val"].dtype is torch.bool and w.node.target is op:
        return None
    dims = w.dims(x)
    x = x if x.meta["val"].dtype is torch.bool else w(aten.ne.Scalar, x, 0)
    for d in sorted(dims, reverse=True):
        x = w(op, x, d, bool(w.given.get("keepdim")))
    return x


@form(aten.mean.dim, aten.mean.default)
def _mean(w: Writer) -> fx.Node:
    """A sum over the count."""
    x, dims = w["self"], w.dims(w["self"])
    total = w(aten.sum.dim_IntList, x, dims, bool(w.given.get("keepdim")), dtype=w.out.dtype)
    return w(aten.div.Tensor, total, _count(w, x, dims))


_SPREADS = (aten.var, aten.std, aten.var_mean, aten.std_mean)


@form(*(getattr(packet, name) for packet in _SPREADS for name in ("default", "dim", "correction")))
def _spread(w: Writer) -> fx.Node | list[fx.Node] | None:
    """The variance is a mean of squares."""
    x, dims, kind = w["self"], w.dims(w["self"]), w.node.target.overloadpacket  # type: ignore[union-attr]
    correction = w.given.get("correction", int(bool(w.given.get("unbiased", True))))
    correction = 1 if correction is None else correction
    count = _count(w, x, dims)
    if correction > 1 and (isinstance(count, fx.Node) or count < correction):
        return None  # torch divides by 0, not by less
    keeps = bool(w.given.get("keepdim"))
    mean = w(aten.div.Tensor, w(aten.sum.dim_IntList, x, dims, True), count)
    away = w(aten.sub.Tensor, x, mean)
    total = w(aten.sum.dim_IntList, w(aten.mul.Tensor, away, away), dims, keeps)
    free = count if correction == 0 else w(operator.sub, count, correction) if isinstance(count, fx.Node) else count - correction
    result = w(aten.div.Tensor, total, free)
    result = w(aten.sqrt.default, result) if kind in (aten.std, aten.std_mean) else result
    if kind in (aten.var, aten.std):
        return result
    return [result, mean if keeps else w(aten.squeeze.dims, mean, dims)]


def _count(w: Writer, x: fx.Node, dims: Sequence[int]) -> Arg:
    """Elements along some dims."""
    count: Arg = 1
    for d in dims:
        count = _multiplied(w, count, w.size(x, d))
    return count


def _multiplied(w: Writer, a: Arg, b: Arg) -> Arg:
    if not isinstance(a, fx.Node) and a == 1:
        return b
    return w(operator.mul, a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else a * b


@form(aten.index_put.default)
def _index_put(w: Writer) -> fx.Node | None:
    """Assignment under a mask: ``x[mask] = value``, or ``x[mask] = y[mask]``."""
    x, values = w["self"], w["values"]
    lead = next((i for i, index in enumerate(w["indices"]) if index is not None), 0)
    rest = [index for index in w["indices"][lead:] if index is not None]
    if len(rest) != 1 or w["accumulate"] or rest[0].meta["val"].dtype is not torch.bool:
        return None
    (mask,) = rest
    after = x.meta["val"].dim() - lead - mask.meta["val"].dim()
    if values.target is aten.index.Tensor and values.args[1] == [*[None] * lead, mask]:
        other = values.args[0]
        same = [*map(size, other.meta["val"].shape)] == [*map(size, x.meta["val"].shape)]
        return w(aten.where.self, w.trailing(mask, after), other, x) if same else None
    shape = values.meta["val"].shape
    if len(shape) > after + 1 or (len(shape) == after + 1 and size(shape[0]) != 1) or (lead and len(shape) > after):
        return None
    return w(aten.where.self, w.trailing(mask, after), values, x)


@form(aten.fill.Scalar, aten.fill.Tensor, aten.copy.default)
def _fill(w: Writer) -> fx.Node:
    if w.node.target is aten.fill.Scalar:
        return w(aten.full_like.default, w["self"], w["value"])
    source = w["src"] if w.node.target is aten.copy.default else w["value"]
    source = w.cast(source, w.out.dtype)
    same = [*map(size, source.meta["val"].shape)] == [*map(size, w.out.shape)]
    return source if same else w(aten.expand.default, source, w.shape(w["self"]))


@form(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def _new(w: Writer) -> fx.Node:
    number = w.given.get("fill_value", int(w.node.target is aten.new_ones.default))
    return w(aten.full.default, w["size"], number, dtype=w.out.dtype)


@form(aten.eye.default, aten.eye.m)
def _eye(w: Writer) -> fx.Node:
    rows, columns = (w(aten.arange.default, n) for n in (w["n"], w.given.get("m", w["n"])))
    same = w(aten.eq.Tensor, w(aten.unsqueeze.default, rows, 1), w(aten.unsqueeze.default, columns, 0))
    return w.cast(same, w.out.dtype)


@form(aten.select_scatter.default)
def _select_scatter(w: Writer) -> fx.Node | None:
    x, index = w["self"], w["index"]
    (dim,) = w.dims(x)
    length = x.meta["val"].shape[dim]
    if not isinstance(index, int) or (index < 0 and not isinstance(length, int)):
        return None
    there = w(aten.eq.Scalar, w.positions(x, dim), index if index >= 0 else length + index)
    return w(aten.where.self, there, w(aten.unsqueeze.default, w["src"], dim), x)


@form(aten.slice_scatter.default)
def _slice_scatter(w: Writer) -> fx.Node | None:
    """A number is written where the positions say so; anything else is laid between what stands before and behind."""
    x, source, start, end = w["self"], w["src"], w["start"] or 0, w["end"]
    end = sys.maxsize if end is None else end
    (dim,) = w.dims(x)
    if start == 0 and end == sys.maxsize:
        return source if w["step"] == 1 else None
    if w["step"] != 1 or not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end):
        return None
    number = source.args[0] if source.target is aten.expand.default else source
    if number.meta["val"].dim() == 0 or source.target is aten.full_like.default:
        positions = w.positions(x, dim)
        there = w(aten.ge.Scalar, positions, start)
        there = there if end == sys.maxsize else w(aten.bitwise_and.Tensor, there, w(aten.lt.Scalar, positions, end))
        if source.target is aten.full_like.default:
            return w(aten.where.ScalarSelf, there, source.args[1], x)
        return w(aten.where.self, there, number, x)
    before = [w(aten.slice.Tensor, x, dim, 0, start)] if start else []
    behind = [] if end == sys.maxsize else [w(aten.slice.Tensor, x, dim, end, sys.maxsize)]
    return w(aten.cat.default, [*before, source, *behind], dim)


@form(aten.repeat.default)
def _repeat(w: Writer) -> Any:
    """Dims of size 1, and new ones, expand."""
    x, times = w["self"], w["repeats"]
    shape = x.meta["val"].shape
    lead = len(times) - len(shape)
    if any(not (isinstance(t, int) and t == 1) and size(s) != 1 for t, s in zip(times[lead:], shape, strict=True)):
        return None
    sizes = [t if isinstance(t, fx.Node) or t != 1 else -1 for t in times[lead:]]
    if not lead and sizes == [-1] * len(sizes):
        return x
    return w(aten.expand.default, x, [*times[:lead], *sizes])


@form(aten.constant_pad_nd.default)
def _padded(w: Writer) -> Any:
    """Edges of one number, laid before and behind."""
    x, pads, rank = w["self"], w["pad"], w["self"].meta["val"].dim()
    if any(not isinstance(p, int) or p < 0 for p in pads):
        return None
    for i in range(0, len(pads), 2):
        dim, ones = rank - 1 - i // 2, [-1] * rank
        edge = w(aten.full_like.default, w(aten.slice.Tensor, x, dim, 0, 1), w["value"])
        before, behind = (
            [w(aten.expand.default, edge, [*ones[:dim], p, *ones[dim + 1 :]])] if p else [] for p in pads[i : i + 2]
        )
        x = w(aten.cat.default, [*before, x, *behind], dim) if before or behind else x
    return x


@form(aten.squeeze.default)
def _squeeze(w: Writer) -> fx.Node:
    return w(aten.squeeze.dims, w["self"], [d for d, s in enumerate(w["self"].meta["val"].shape) if size(s) == 1])


@form(aten.one_hot.default)
def _one_hot(w: Writer) -> fx.Node | None:
    if not isinstance(w["num_classes"], int) or w["num_classes"] < 1:
        return None
    classes = w(aten.arange.default, w["num_classes"])
    return w.cast(w(aten.eq.Tensor, w(aten.unsqueeze.default, w["self"], -1), classes), torch.int64)


@form(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def _product_and(w: Writer) -> fx.Node:
    """A product with something added."""
    ops: dict[Any, Any] = {
        aten.addmm.default: aten.mm.default,
        aten.baddbmm.default: aten.bmm.default,
        aten.addmv.default: aten.mv.default,
    }
    first, second = [a for name, a in w.given.items() if isinstance(a, fx.Node) and name != "self"]
    product = _times(w, w(ops[w.node.target], first, second), w["alpha"])
    return product if w["beta"] == 0 else w(aten.add.Tensor, product, _times(w, w["self"], w["beta"]))


@form(aten.addcmul.default, aten.addcdiv.default)
def _added(w: Writer) -> fx.Node:
    op = aten.mul.Tensor if w.node.target is aten.addcmul.default else aten.div.Tensor
    return w(aten.add.Tensor, w["self"], _times(w, w(op, w["tensor1"], w["tensor2"]), w["value"]))


@form(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(w: Writer) -> fx.Node:
    """From the nearer end, as torch has it: exact at both."""
    start, end, weight = w["self"], w["end"], w["weight"]
    way = w(aten.sub.Tensor, end, start)
    if not isinstance(weight, fx.Node):
        near = abs(weight) < 0.5
        step = w(aten.mul.Tensor, way, weight if near else 1 - weight)
        return w(aten.add.Tensor, start, step) if near else w(aten.sub.Tensor, end, step)
    ahead = w(aten.add.Tensor, start, w(aten.mul.Tensor, way, weight))
    back = w(aten.sub.Tensor, end, w(aten.mul.Tensor, way, w(aten.rsub.Scalar, weight, 1)))
    return w(aten.where.self, w(aten.lt.Scalar, w(aten.abs.default, weight), 0.5), ahead, back)


def _times(w: Writer, x: fx.Node, number: Arg) -> fx.Node:
    return x if not isinstance(number, fx.Node) and number == 1 else w(aten.mul.Tensor, x, number)


FORMS[aten.square.default] = lambda w: w(aten.mul.Tensor, w["self"], w["self"])
FORMS[aten.empty_like.default] = lambda w: w(aten.full_like.default, w["self"], 0, dtype=w.out.dtype)
FORMS[aten.rsub.Tensor] = lambda w: w(aten.sub.Tensor, w["other"], w["self"], alpha=w["alpha"])
FORMS[aten.max.other] = lambda w: w(aten.maximum.default, w["self"], w["other"])
FORMS[aten.min.other] = lambda w: w(aten.minimum.default, w["self"], w["other"])


@form(aten.stack.default)
def _stack(w: Writer) -> fx.Node:
    dim = w["dim"] % (w.out.dim())
    return w(aten.cat.default, [w(aten.unsqueeze.default, t, dim) for t in w["tensors"]], dim)
