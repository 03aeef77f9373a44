"""FLOPs of a program as a polynomial over token set sizes, counted from the graph itself."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import sympy
import torch
from torch import fx

from tpcompile.axes import Factors
from tpcompile.passes.axesmap import describe
from tpcompile.passes.rules import Held, tensor_nodes
from tpcompile.passes.rules.base import Size, size
from tpcompile.program import Program, Stage, where_of

Polynomial = tuple[tuple[int, tuple[str, ...]], ...]
"""``((coefficient, ("t0", "t1")), ...)``: the sum of coefficient x product of sizes; a multiply-accumulate is two."""
Term = tuple[fx.Node, int, tuple[str, ...]]


def polynomial(program: Program) -> Polynomial:
    """FLOPs per sample of every matmul-like op, by the token sets of its factors.

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
        call = describe(node, tuple(tensor_nodes(node)))
        if call is None or call.factors is None or call.rule is None or call.rule.held is not Held.ZERO or len(call.operands) < 2:
            continue
        sizes = _factor_sizes(program, node, call.operands, call.factors, sets, samples)
        names = tuple(sorted(s for s in sizes.values() if isinstance(s, str)))
        coefficient = 2
        for s in sizes.values():
            coefficient *= s if isinstance(s, int) else 1
        yield node, coefficient, names


def _samples(program: Program) -> Size:
    """The size of the batch: a symbol where it is dynamic."""
    return size(program.node(program.sites[0].keep).meta["val"].shape[0]) if program.sites else sympy.Integer(1)


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
    """Factor -> its size, or the name of the token set it runs over."""
    sizes: dict[str, int | str] = {}
    levels: dict[str, int] = {}
    for tensor, dims in [*zip(operands, factors.ins, strict=False), (node, factors.outs[0])]:
        value = tensor.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        placement = program.placements.get(tensor.name)
        for d, factor in enumerate(dims):
            if factor is None:
                continue
            if placement is not None and d in placement.dims:
                levels[factor] = max(levels.get(factor, 0), placement.dims[d])
            expression = size(value.shape[d])
            if samples.free_symbols and samples.free_symbols <= expression.free_symbols:
                expression = sympy.cancel(expression / samples)
            if isinstance(expression, sympy.Integer):
                sizes.setdefault(factor, int(expression))
            else:
                sizes[factor] = sets.get(expression, "t0")
    if program.stage is not Stage.COMPACT:
        sizes.update({factor: f"t{level}" for factor, level in levels.items()})
    return sizes
