"""placed -> placed: what is the same for all that a product sums over is multiplied onto the smaller side.

1. ``(p * a) @ v``, with ``a`` the same along the summed dim, is ``(p @ v) * a``: a mask of query rows leaves the map over tokens;
2. ``(p * a).sum()`` over the rows along which ``a`` varies is ``a @ p``, summed over what is left: one pass over ``p`` instead of three;
3. ``(q @ k) * s`` with a number ``s`` is ``(q * s) @ k``.

Each holds for any numbers, so nothing new has to be proved; sums come in another order, within float32 noise. A product moves only where
all its readers let it, fewer elements are touched then, and the factor that stays has the product's dtype: a matrix product takes no other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.base import GraphPass
from tpcompile.passes.cost import Expected, Meter
from tpcompile.passes.optimize.edit import rewritten
from tpcompile.passes.rules.forms import Writer
from tpcompile.program import Program, Stage

aten = torch.ops.aten
MATMUL, SUM = aten.matmul.default, aten.sum.dim_IntList
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
SCALES = (*PRODUCTS, aten.div.Tensor, aten.div.Scalar)

Made = list[tuple[fx.Node, fx.Node]]
"""What gave a value, each with what gives it now."""
Counts = dict[str, float]
"""Elements of each node's value; every node that is written adds its own."""


@dataclass(frozen=True)
class Hoist(GraphPass):
    """Multiply masks and scales onto the smaller side; the module docstring lists the cases. ``tokens``: the count it is judged at."""

    name: ClassVar[str] = "hoist"
    takes: ClassVar[Stage] = Stage.PLACED
    gives: ClassVar[Stage] = Stage.PLACED
    masked: ClassVar[bool] = True
    tokens: int = Expected.tokens

    def run(self, program: Program) -> Program:
        """Return the program with its products moved."""
        draft, meter = program.draft(), Meter(program, AxesMap(program.graph), Expected(self.tokens))
        counts = {n.name: meter.count(n, program.placements.get(n.name)) for n in program.graph.nodes}
        renamed: dict[str, str] = {}
        for node in [n for n in draft.graph.nodes if n.target in SCALES]:
            for old, new in _behind(node, counts) or _before(node, counts):
                renamed[old.name], counts[new.name] = new.name, counts[old.name]
                old.replace_all_uses_with(new)
                draft.graph.erase_node(old)
        return rewritten(program, draft, renamed, f"hoist: {len(renamed)} products with a smaller side")


def _behind(node: fx.Node, counts: Counts) -> Made:
    """Cases 1 and 2: a product whose readers sum over it."""
    if node.target not in PRODUCTS or sum(counts[reader.name] for reader in node.users) >= counts[node.name]:
        return []
    own = node.meta["val"]
    for p, a in (node.args[:2], node.args[1::-1]):
        if (
            isinstance(p, fx.Node)
            and isinstance(a, fx.Node)
            and (p.meta["val"].shape, p.meta["val"].dtype) == (own.shape, own.dtype)
        ):
            plans = [
                _sum(reader, a, counts) if reader.target is SUM else _matmul(reader, node, a, counts) for reader in node.users
            ]
            if all(plans):
                return [(reader, plan(p)) for reader, plan in zip(list(node.users), plans, strict=True) if plan]
    return []


def _matmul(reader: fx.Node, node: fx.Node, a: fx.Node, counts: Counts) -> Callable[[fx.Node], fx.Node] | None:
    """Case 1: the product of ``node = p * a`` with another matrix, given ``p``."""
    if reader.target is not MATMUL or list(reader.args).count(node) != 1:
        return None
    left = reader.args[0] is node
    ranks = [n.meta["val"].dim() for n in reader.all_input_nodes]
    if min(ranks) < 2 or not _alike(a, -1 if left else -2):
        return None

    def write(p: fx.Node) -> fx.Node:
        w = Writer(reader)
        with reader.graph.inserting_before(reader):
            product = w(MATMUL, *(p if n is node else n for n in reader.args))
            counts[product.name] = counts[reader.name]
            return w(node.target, product, a)

    return write


def _sum(reader: fx.Node, a: fx.Node, counts: Counts) -> Callable[[fx.Node], fx.Node] | None:
    """Case 2: the sum of ``p * a`` over rows and perhaps more, given ``p``."""
    w = Writer(reader)
    source, own = reader.args[0], a.meta["val"]
    assert isinstance(source, fx.Node)
    rank, dims = source.meta["val"].dim(), w.dims(source)
    rows = own.dim() >= 2 and _alike(a, -1) and not _alike(a, -2)
    if not rows or rank - 2 not in dims or rank - 1 in dims or own.dtype != reader.meta["val"].dtype:
        return None

    def write(p: fx.Node) -> fx.Node:
        with reader.graph.inserting_before(reader):
            turned = w(aten.transpose.int, a, -2, -1)
            over = w(MATMUL, turned, p)
            counts[turned.name], counts[over.name] = counts[a.name], counts[p.name]  # at most
            return w(SUM, over, dims, w["keepdim"])

    return write if source.meta["val"].dtype == own.dtype else None


def _before(node: fx.Node, counts: Counts) -> Made:
    """Case 3: a number on the result of a product that nobody else reads."""
    product, scale = node.args[:2]
    if not isinstance(product, fx.Node) or product.target is not MATMUL or len(product.users) > 1 or isinstance(scale, fx.Node):
        return []
    q, k = product.all_input_nodes if len(product.all_input_nodes) == 2 else (product, product)
    small = min(q, k, key=lambda n: counts[n.name])
    if counts[small.name] >= counts[node.name] or product.meta["val"].dtype != node.meta["val"].dtype:
        return []
    w = Writer(node)
    with node.graph.inserting_before(node):
        scaled = w(node.target, small, scale)
        counts[scaled.name] = counts[small.name]
        return [(node, w(MATMUL, *(scaled if n is small else n for n in (q, k))))]


def _alike(a: fx.Node, dim: int) -> bool:
    """Whether a factor is the same all along a dim."""
    shape = a.meta["val"].shape
    return len(shape) < -dim or (isinstance(shape[dim], int) and shape[dim] == 1)
