"""A traced program as ``diff`` and ``bisect`` look at it; see ``graphview``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from tpcompile.compare.graphview import CAPTURED, Graph, Op, Weight
from tpcompile.program import where_of


def view(exported: ExportedProgram, outputs: Sequence[str] = (), taps: Mapping[str, str] | None = None) -> Graph:
    """The graph of an exported program; its values are called as its nodes are.

    Args:
        exported: the program.
        outputs: name of each output; default ``output_0``, ...
        taps: further name -> node.
    """
    weights: dict[str, Weight] = {}
    given: list[str] = []
    nodes = {node.name: node for node in exported.graph.nodes}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            given.append(_name(spec.arg))
        elif spec.target in exported.state_dict or spec.target in exported.constants:
            weights[_name(spec.arg)] = _weight(str(spec.target), exported)
    calls = [node for node in nodes.values() if node.op == "call_function"]
    values = {node.name: node.name for node in calls if isinstance(node.meta.get("val"), Tensor)}
    results = exported.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    names = tuple(outputs) or tuple(f"output_{i}" for i in range(len(results)))
    given_out = {name: node for name, node in zip(names, results, strict=True) if isinstance(node, fx.Node)}
    values |= {name: node.name for name, node in given_out.items()}
    interface = {f"input {name}": _type(nodes[name]) for name in given}
    interface |= {f"output {name}": _type(node) for name, node in given_out.items()}
    return Graph(tuple(map(_op, calls)), tuple(given), names, {**values, **(taps or {})}, weights, interface)


def _name(argument: Any) -> str:
    return str(argument.name)


def _type(node: fx.Node) -> str:
    """``float32[1, s91]``."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _weight(name: str, exported: ExportedProgram) -> Weight:
    value = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
    assert isinstance(value, Tensor)
    dtype = str(value.dtype).removeprefix("torch.")

    def read() -> Any:
        plain = value.detach().cpu()
        return (plain.float() if plain.dtype is torch.bfloat16 else plain).numpy()  # numpy has no bfloat16

    return Weight(name.removeprefix(CAPTURED), dtype, tuple(value.shape), read)


def _op(node: fx.Node) -> Op:
    """One call: tensors and sizes are inputs, everything else is detail."""
    target = node.target
    kind = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    texts = [*map(_text, node.args), *(f"{key}={_text(value)}" for key, value in sorted(node.kwargs.items()))]
    inputs: list[str] = []
    fx.map_arg((node.args, node.kwargs), lambda n: inputs.append(n.name))
    return Op(kind, ", ".join(texts), tuple(inputs), (node.name,), where_of(node))


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return "_"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:.9g}" if isinstance(value, float) else str(value)
