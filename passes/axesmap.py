"""Which dims of a graph run over the pruned tokens, and which over samples: union of dims that share a factor, seeded at the prune sites.

Nothing here looks at sizes: with 64 tokens and head size 64 a value says nothing, a factor does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._ops import OpOverload

from tpcompile.axes import Factors, parse
from tpcompile.ops import MEMORY, PRUNE, PUT, RESTORE
from tpcompile.passes.rules import RULES, Held, Rule, call_of, tensor_nodes
from tpcompile.passes.rules.base import size

LOOSE = "loose"
"""How the factor of a dim begins that a rule says nothing of."""

Key = tuple[str, int, int]
"""(node, output, dim)."""

_SITES = {
    PRUNE: Factors(*parse("b n c, b n, b n -> b n c")),
    RESTORE: Factors(*parse("b n c, b n, b n c -> b n c")),
    MEMORY: Factors(*parse("b n c, b n -> b m c, b m")),
    PUT: Factors(*parse("b n c, b k c, b k, b k -> b n c")),
}


@dataclass(frozen=True, slots=True)
class Described:
    """An op call with its factors.

    Attributes:
        node: the call.
        factors: how its dims correspond; None when the op has no rule.
        operands: tensor inputs, in the order of ``factors.ins``.
        rule: its rule; None for prune, restore and memory, and for ops without one.
    """

    node: fx.Node
    factors: Factors | None
    operands: tuple[fx.Node, ...]
    rule: Rule | None = None

    def of(self, operand: int, factor: str) -> Iterator[int]:
        """Dims of an operand that belong to a factor."""
        assert self.factors is not None
        return (d for d, f in enumerate(self.factors.ins[operand]) if f == factor)


class AxesMap:
    """The token dims of a graph.

    Args:
        graph: a functional ATen graph with at least one prune node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.calls: dict[str, Described] = {}
        self._parent: dict[Key, Key] = {}
        for node in graph.nodes:
            self._visit(node)
        keeps = [n.args[1] for n in graph.nodes if n.target is PRUNE]
        self.roots = {self._find((keep.name, 0, 1)) for keep in keeps}
        self.samples = {self._find((keep.name, 0, 0)) for keep in keeps if keep.meta["val"].shape[0] != 1}

    def is_token(self, node: fx.Node, dim: int, output: int = 0) -> bool:
        """Whether a dim runs over the pruned tokens."""
        return self._find((node.name, output, dim)) in self.roots

    def axis(self, node: fx.Node, dim: int) -> Key:
        """What a dim of a node's (first) output runs over: equal for dims that share factors."""
        return self._find((node.name, 0, dim))

    def batch_dims(self, node: fx.Node) -> list[int]:
        """The dims of a node's (first) output that run over samples; none where the batch is the literal 1."""
        value = node.meta.get("val")
        rank = value.dim() if isinstance(value, torch.Tensor) and self.samples else 0
        return [d for d in range(rank) if self._find((node.name, 0, d)) in self.samples]

    def alias(self, new: fx.Node, old: fx.Node) -> None:
        """Say that a new node has the dims of an old one."""
        for d in range(old.meta["val"].dim()):
            self._union([(old.name, 0, d), (new.name, 0, d)])

    def mixes(self, call: "Described") -> bool:
        """Whether a call combines, picks or reorders samples, or lays two batches across each other."""
        if not self.samples or call.factors is None:
            return bool(self.samples)
        bound = {*call.factors.rigid, *call.factors.folds, *call.factors.reads}
        tensors = [*zip(call.operands, call.factors.ins, strict=False), (call.node, call.factors.outs[0])]
        return any(dims[d] in bound for n, dims in tensors for d in self.batch_dims(n)) or len(self.batch_dims(call.node)) > 1

    def token_dims(self, node: fx.Node) -> list[int]:
        """The token dims of a node's (first) output."""
        value = node.meta.get("val")
        return [d for d in range(value.dim()) if self.is_token(node, d)] if isinstance(value, torch.Tensor) else []

    def _find(self, key: Key) -> Key:
        while (above := self._parent.get(key, key)) != key:
            self._parent[key] = self._parent.get(above, above)
            key = above
        return key

    def _union(self, keys: list[Key]) -> None:
        for key in keys[1:]:
            self._parent[self._find(key)] = self._find(keys[0])

    def _visit(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        if not isinstance(node.target, OpOverload):
            self._getitem(node)
            return
        operands = tuple(tensor_nodes(node))
        call = describe(node, operands)
        if call is None:
            return
        self.calls[node.name] = call
        if call.factors is None:
            return
        linked: dict[str, list[Key]] = {}
        tensors = [(n.name, 0, dims) for n, dims in zip(operands, call.factors.ins, strict=False)]
        tensors += [(node.name, o, dims) for o, dims in enumerate(call.factors.outs)]
        for name, output, dims in tensors:
            for d, factor in enumerate(dims):
                if factor is not None:
                    linked.setdefault(factor, []).append((name, output, d))
        for keys in linked.values():
            self._union(keys)

    def _getitem(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and len(node.args) == 2:
            source, output = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(output, int)
            for d in range(value.dim()):
                self._union([(source.name, output, d), (node.name, 0, d)])


def broadcasting(call: Described) -> bool:
    """Whether an op aligns its operands' dims from the right, so that a dim of size 1 may be put in front of one."""
    return call.rule is not None and (call.rule.held is Held.MAP or call.node.target is torch.ops.aten.matmul.default)


def describe(node: fx.Node, operands: tuple[fx.Node, ...]) -> Described | None:
    """The factors of one call; None for ops without tensor inputs or outputs (sizes, assertions, constants)."""
    value = node.meta.get("val")
    if not operands or not isinstance(value, (torch.Tensor, tuple, list)):
        return None
    if node.target in _SITES:
        return Described(node, _SITES[node.target], operands)
    rule = RULES.get(node.target)  # type: ignore[call-overload]
    if rule is None:
        return Described(node, None, operands)
    return Described(node, _guarded(rule.factors(call_of(node)), operands), operands, rule)


def _guarded(factors: Factors, operands: tuple[fx.Node, ...]) -> Factors:
    """A dim without a factor is broadcast, so it has size 1; any other would escape every proof: it becomes rigid and is refused."""
    absent = [(i, d) for i, dims in enumerate(factors.ins) for d, f in enumerate(dims) if f is None]
    loose = {(i, d) for i, d in absent if size(operands[i].meta["val"].shape[d]) != 1}
    if not loose:
        return factors
    ins = tuple(
        tuple(f"{LOOSE}{i}.{d}" if (i, d) in loose else f for d, f in enumerate(dims)) for i, dims in enumerate(factors.ins)
    )
    return replace(factors, ins=ins, rigid=factors.rigid | {f"{LOOSE}{i}.{d}" for i, d in loose})
