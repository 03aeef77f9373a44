"""The law of an axis rule, checked by machine on its samples: ``op(gather(x)) == gather(op(fill(x)))``.

For every factor that is not rigid, some positions are dropped:

- *gather* takes the kept positions along every operand dim of the factor, and shortens size arguments (``Rule.sized``);
- *fill* writes the neutral value of a fold at the dropped positions of one operand: each operand must suffice alone;
- of a factor that is only read from (start, stop), the prefix up to stop is kept.

A plugin author calls ``breaches(RULES[op])`` in a test; an empty list is a lawful rule.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tpcompile.axes import Factors
from tpcompile.passes.rules.base import Rule, bind, call_of, tensor_nodes

LEAST = 3
"""A factor shorter than this has no uneven subset worth the name."""


@dataclass(frozen=True)
class Case:
    """One sample of a rule.

    Attributes:
        rule: the rule.
        args: the arguments, real tensors among them.
        kwargs: those that the op takes by keyword only; the last of a sample's arguments where it is a dict.
        node: the call as a graph node, its metadata real.
        factors: what the rule says of it.
        tensors: the tensor arguments in order.
        results: what the op gives.
    """

    rule: Rule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    node: fx.Node
    factors: Factors
    tensors: tuple[Tensor, ...]
    results: tuple[Tensor, ...]

    def sizes(self) -> dict[str, set[int]]:
        """Factor -> the sizes of its dims; one size in a well-formed rule."""
        found: dict[str, set[int]] = {}
        for tensor, dims in [
            *zip(self.tensors, self.factors.ins, strict=True),
            *zip(self.results, self.factors.outs, strict=True),
        ]:
            for size, factor in zip(tensor.shape, dims, strict=True):
                if factor is not None:
                    found.setdefault(factor, set()).add(size)
        return found

    def lawful(self) -> dict[str, int]:
        """Factor -> size, for the factors under the law: those that are not rigid."""
        return {factor: max(sizes) for factor, sizes in self.sizes().items() if factor not in self.factors.rigid}


def cases(rule: Rule, seed: int = 0) -> Iterator[Case]:
    """Every sample of a rule, run once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        samples = rule.samples()
    for sample in samples:
        args, kwargs = (sample[:-1], sample[-1]) if sample and isinstance(sample[-1], dict) else (sample, {})
        graph = fx.Graph()
        result = rule.op(*args, **kwargs)
        node = graph.call_function(rule.op, _map(args, lambda tensor, graph=graph: _input(graph, tensor)), kwargs)
        node.meta["val"] = result
        tensors = tuple(n.meta["val"] for n in tensor_nodes(node))
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        yield Case(rule, tuple(args), kwargs, node, rule.factors(call_of(node)), tensors, results)


def breaches(rule: Rule, seed: int = 0) -> list[str]:
    """Where a rule does not hold, one line each; empty for a lawful rule.

    Args:
        rule: the rule; its samples are run.
        seed: of the samples' numbers and of the dropped positions.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, case in enumerate(cases(rule, seed)):
        head = f"{rule.op} ({rule.where}) sample {number}"
        wrong = list(_malformed(case))
        if not wrong:
            wrong = [text for factor, size in case.lawful().items() for text in _broken(case, factor, size, generator)]
        found += [f"{head}: {text}" for text in wrong]
    return found


def unexercised(rule: Rule) -> list[str]:
    """Factors under the law that no sample gives at least three positions (and two behind a prefix that is read)."""
    seen: dict[str, bool] = {}
    for case in cases(rule):
        for factor, size in case.lawful().items():
            least = max(LEAST, case.factors.reads.get(factor, (0, 0))[1] + 2)
            seen[factor] = seen.get(factor, False) or size >= least
    return [factor for factor, enough in seen.items() if not enough]


def _malformed(case: Case) -> Iterator[str]:
    for kind, tensors, sides in (("operand", case.tensors, case.factors.ins), ("result", case.results, case.factors.outs)):
        ranks = [t.dim() for t in tensors]
        if ranks != [len(dims) for dims in sides]:
            yield f"{kind}s of rank {ranks} are described as {list(sides)}"
            return
        for i, (tensor, dims) in enumerate(zip(tensors, sides, strict=True)):
            yield from (
                f"{kind} {i}: dim {d} of size {tensor.shape[d]} belongs to no factor"
                for d, f in enumerate(dims)
                if f is None and tensor.shape[d] != 1
            )
    yield from (f"factor {factor} has dims of sizes {sorted(sizes)}" for factor, sizes in case.sizes().items() if len(sizes) > 1)


def _broken(case: Case, factor: str, size: int, generator: torch.Generator) -> Iterator[str]:
    least = max(case.factors.reads.get(factor, (0, 0))[1], 1)
    for count in sorted({least, (least + size) // 2, size - 1}):
        if not least <= count < size:
            continue
        prefix = list(range(least)) if factor in case.factors.reads else []
        rest = torch.randperm(size - len(prefix), generator=generator)[: count - len(prefix)] + len(prefix)
        keep = torch.tensor(sorted([*prefix, *rest.tolist()]))
        for filled in _fills(case, factor, keep):
            text = _differs(case, factor, keep, filled)
            if text:
                yield f"factor {factor}, kept {keep.tolist()} of {size}: {text}"
                return


def _fills(case: Case, factor: str, keep: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The operands, filled: as they are where nothing folds; else once per operand dim of the factor."""
    if factor not in case.factors.folds:
        yield case.tensors
        return
    for i, dims in enumerate(case.factors.ins):
        for d in (d for d, f in enumerate(dims) if f == factor):
            yield tuple(put(t, d, keep, case.factors.folds[factor]) if j == i else t for j, t in enumerate(case.tensors))


def _differs(case: Case, factor: str, keep: Tensor, filled: Sequence[Tensor]) -> str:
    few = [_gather(t, dims, factor, keep) for t, dims in zip(filled, case.factors.ins, strict=True)]
    want = [_gather(t, dims, factor, keep) for t, dims in zip(run(case, filled), case.factors.outs, strict=True)]
    try:
        got = run(case, few, _sized(case, factor, len(keep)))
    except (RuntimeError, IndexError) as error:
        return f"the op refuses gathered operands: {str(error).splitlines()[0]}"
    for o, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            return f"result {o} has shape {list(a.shape)} instead of {list(b.shape)}"
        if not torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6, equal_nan=True):
            return f"result {o} differs by {(a.double() - b.double()).abs().max().item():.3g}"
    return ""


def run(case: Case, tensors: Sequence[Tensor], sizes: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """The op on other tensors, and other sizes for its size argument."""
    given = iter(tensors)
    args = bind(case.rule.op, _map(case.args, lambda _: next(given)), {})
    if sizes is not None:
        args[case.rule.sized] = list(sizes)
    result = case.rule.op(*args.values(), **case.kwargs)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _sized(case: Case, factor: str, count: int) -> list[int] | None:
    if not case.rule.sized:
        return None
    written = bind(case.rule.op, case.args, {})[case.rule.sized]
    return [count if f == factor and s != -1 else s for s, f in zip(written, case.factors.outs[0], strict=True)]


def put(tensor: Tensor, dim: int, keep: Tensor, number: float) -> Tensor:
    """The tensor with a number at every position of a dim that is not kept."""
    dropped = torch.ones(tensor.shape[dim], dtype=torch.bool)
    dropped[keep] = False
    filled = tensor.clone()
    filled[(slice(None),) * dim + (dropped,)] = torch.tensor(number).to(tensor.dtype)
    return filled


def _gather(tensor: Tensor, dims: Sequence[str | None], factor: str, keep: Tensor) -> Tensor:
    for d, f in enumerate(dims):
        tensor = tensor.index_select(d, keep) if f == factor else tensor
    return tensor


def _input(graph: fx.Graph, tensor: Tensor) -> fx.Node:
    node = graph.placeholder("x")
    node.meta["val"] = tensor
    return node


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_map(v, change) for v in value) if isinstance(value, (list, tuple)) else value
