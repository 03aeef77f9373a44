"""What a program costs, counted from the graph itself: polynomials over token set sizes, and one op at expected counts."""

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from tpcompile.axes import Factors, Placement
from tpcompile.ops import COMPACT, TAKE
from tpcompile.passes.axesmap import AxesMap, Described, describe
from tpcompile.passes.rules import Held, tensor_nodes
from tpcompile.passes.rules.base import Size, size
from tpcompile.program import Program, Stage, where_of

aten = torch.ops.aten
VIEWS = frozenset(
    {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.view.default}
)
"""Ops that move nothing: the result is the operand, read in another shape."""
LOOKUPS = frozenset({aten.select.int, aten.slice.Tensor, aten.index_select.default, aten.embedding.default, TAKE, COMPACT})
"""Ops that take some rows and leave the rest unread."""
CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.default}
)
"""Products whose factors are positions: each element of the result sums over a kernel."""
ELEMENTWISE = 12
"""Further bytes per element where each sample has its own positions and rows are not whole: a position of its own, and its spread."""

Polynomial = tuple[tuple[int, tuple[str, ...]], ...]
"""``((coefficient, ("t0", "t1")), ...)``: the sum of coefficient x product of sizes; a multiply-accumulate is two."""
Term = tuple[fx.Node, int, tuple[str, ...]]


def polynomial(program: Program) -> Polynomial:
    """FLOPs per sample of every matmul-like op and convolution, by the token sets of its factors.

    On a placed program this is the paper's accounting (each op at the tokens alive where it stands); on a compact one the engine's.
    """
    return _sum(program, _terms(program))


def by_module(program: Program) -> dict[str, Polynomial]:
    """The same, apart for each module of the model (``encoder.layer.3.attention``), in program order."""
    found: dict[str, list[Term]] = {}
    for term in _terms(program):
        found.setdefault(where_of(term[0]).module, []).append(term)
    return {module: _sum(program, terms) for module, terms in found.items()}


def _sum(program: Program, terms: Iterable[Term]) -> Polynomial:
    total: Counter[tuple[str, ...]] = Counter()
    for _, coefficient, names in terms:
        total[names] += coefficient
    samples = _samples(program)
    fixed = int(samples) if isinstance(samples, sympy.Integer) else 1
    return tuple((coefficient // fixed, names) for names, coefficient in sorted(total.items()))


def _terms(program: Program) -> Iterator[Term]:
    """Every matmul-like op with its FLOPs for the whole batch, where that is fixed."""
    sets = _compact_sizes(program) if program.stage is Stage.COMPACT else {}
    samples = _samples(program)
    for node in program.graph.nodes:
        if node.target in CONVOLUTIONS:
            yield _convolution(program, node, sets, samples)
            continue
        call = describe(node, tuple(tensor_nodes(node)))
        if call is None or call.factors is None or call.rule is None or call.rule.held is not Held.ZERO or len(call.operands) < 2:
            continue
        sizes = _factor_sizes(program, node, call.operands, call.factors, sets, samples)
        names = tuple(sorted(s for s in sizes.values() if isinstance(s, str)))
        yield node, 2 * math.prod(s for s in sizes.values() if isinstance(s, int)), names


def _convolution(program: Program, node: fx.Node, sets: Mapping[Size, str], samples: Size) -> Term:
    """Every element of the result, times what one of them sums over: the kernel, and the channels of its group."""
    value, kernel = node.meta["val"], tensor_nodes(node)[1].meta["val"]
    sizes = [_dim(program, node, value, d, sets, samples) for d in range(value.dim())]
    counted = math.prod(s for s in sizes if isinstance(s, int)) * math.prod(kernel.shape[1:])
    return node, 2 * counted, tuple(sorted(s for s in sizes if isinstance(s, str)))


def traffic(program: Program) -> Polynomial:
    """Bytes per sample that the ops read and write, weights left out; of what is only looked up, the rows that are taken."""
    sets = _compact_sizes(program) if program.stage is Stage.COMPACT else {}
    samples, weights = _samples(program), set(program.constants())
    total: Counter[tuple[str, ...]] = Counter()
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target in VIEWS or node.target is operator.getitem:
            continue
        if (given := tensor_nodes(node)) and weights.issuperset(n.name for n in given):
            weights.add(node.name)  # a part of a weight: runtimes cut it once, when they load the model
            continue
        value = node.meta.get("val")
        outs = [(node, v) for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]
        ins = [(n, n.meta["val"]) for n in given if n.name not in weights]
        for tensor, value in [*outs, *(outs if node.target in LOOKUPS or not outs else ins)]:  # a size is no element
            sizes = [_dim(program, tensor, value, d, sets, samples) for d in range(value.dim())]
            names = tuple(sorted(s for s in sizes if isinstance(s, str)))
            total[names] += value.element_size() * math.prod(s for s in sizes if isinstance(s, int))
    fixed = int(samples) if isinstance(samples, sympy.Integer) else 1
    return tuple((coefficient // fixed, names) for names, coefficient in sorted(total.items()))


def _samples(program: Program) -> Size:
    """The size of the batch: a symbol where it is dynamic. Without sites (a dense program) a fixed batch counts as one sample."""
    if program.sites:
        return size(program.node(program.sites[0].keep).meta["val"].shape[0])
    value = program.node(next(iter(program.placeholders()))).meta["val"]
    samples = size(value.shape[0]) if value.dim() else sympy.Integer(1)
    return samples if samples.free_symbols else sympy.Integer(1)


def _compact_sizes(program: Program) -> Mapping[Size, str]:
    """The symbol of each set's size in a compact program."""
    found = {}
    for site in program.sites:
        index = program.node(site.index).meta["val"]
        found[size(index.shape[1])] = site.tokens.name
    return found


def _factor_sizes(
    program: Program, node: fx.Node, operands: tuple[fx.Node, ...], factors: Factors, sets: Mapping[Size, str], samples: Size
) -> dict[str, int | str]:
    """Factor -> its size, or the name of the newest token set it runs over."""
    found: dict[str, list[int | str]] = {}
    for tensor, dims in [*zip(operands, factors.ins, strict=False), (node, factors.outs[0])]:
        value = tensor.meta["val"]
        for d, factor in enumerate(dims if isinstance(value, torch.Tensor) else ()):
            if factor is not None:
                found.setdefault(factor, []).append(_dim(program, tensor, value, d, sets, samples))
    return {f: max(sizes, key=lambda s: (isinstance(s, str), int(str(s).lstrip("t")))) for f, sizes in found.items()}


def _dim(program: Program, tensor: fx.Node, value: torch.Tensor, d: int, sets: Mapping[Size, str], samples: Size) -> int | str:
    """The size of a tensor's dim per sample, or the name of the token set it runs over."""
    placement = program.placements.get(tensor.name)
    if (program.stage is not Stage.COMPACT or program.gathered) and placement is not None and d in placement.dims:
        return f"t{placement.dims[d]}"
    expression = size(value.shape[d])
    if samples.free_symbols and samples.free_symbols <= expression.free_symbols:
        expression = sympy.cancel(expression / samples)
    return int(expression) if isinstance(expression, sympy.Integer) else sets.get(expression, "t0")


@dataclass(frozen=True)
class Expected:
    """What a run is taken to look like where a pass must decide before any is seen.

    Attributes:
        tokens: at the input, where the program does not fix their number.
        keep: share of the tokens that every site keeps.
        balance: operations that cost as much as moving one byte.
    """

    tokens: int = 128
    keep: float = 0.7
    balance: float = 4.0


class Meter:
    """What an op costs at expected counts: its operations, and ``balance`` for every byte it reads or writes.

    Args:
        program: a placed program.
        axes: its token dims.
        expected: the counts.
    """

    def __init__(self, program: Program, axes: AxesMap, expected: Expected) -> None:
        self.axes, self.balance = axes, expected.balance
        full = (n.meta["val"].shape[d] for n in program.graph.nodes for d in axes.token_dims(n))
        fixed = next(full, expected.tokens)
        tokens = fixed if isinstance(fixed, int) else expected.tokens
        self.sizes = [tokens * expected.keep**level for level in range(len(program.sites) + 1)]

    def work(self, call: Described, levels: Callable[[str], int]) -> float:
        """The cost of a call whose token factors run over the sets of these levels."""
        if call.factors is None or call.node.target in VIEWS:
            return 0.0
        sizes: dict[str, float] = {}
        moved = 0.0
        for tensor, dims in [*zip(call.operands, call.factors.ins, strict=False), (call.node, call.factors.outs[0])]:
            value, count = tensor.meta["val"], 1.0
            if not isinstance(value, torch.Tensor):
                continue
            for d, factor in enumerate(dims):
                size = self.sizes[levels(factor)] if factor and self.axes.is_token(tensor, d) else self._size(value.shape[d])
                count *= size
                if factor is not None:
                    sizes[factor] = size
            moved += count * value.element_size()
        product = call.rule is not None and call.rule.held is Held.ZERO and len(call.operands) > 1
        return (2 * math.prod(sizes.values()) if product else 0.0) + self.balance * moved

    def count(self, node: fx.Node, placement: Placement | None) -> float:
        """Elements of a tensor; 0 for what is none."""
        value, dims = node.meta.get("val"), placement.dims if placement else {}
        if not isinstance(value, torch.Tensor):
            return 0.0
        return math.prod(self.sizes[dims[d]] if d in dims else self._size(size) for d, size in enumerate(value.shape))

    def gather(self, node: fx.Node, dims: Mapping[int, int], dim: int, new: int) -> float:
        """The cost of fetching the rows of set ``new`` along one dim of a tensor whose token dims run over the sets ``dims``."""
        value = node.meta["val"]
        count = self.count(node, Placement({**dims, dim: new}))
        batch = self.axes.batch_dims(node)
        whole = not self.axes.samples or (batch == [0] and dim == 1)
        each: int = 2 * value.element_size() + (0 if whole else ELEMENTWISE)
        return self.balance * count * each

    def _size(self, size: Any) -> float:
        return float(size) if isinstance(size, int) else 1.0
