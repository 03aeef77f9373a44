"""What the values of an emitted graph are called: a node's own name where the program has that node, ``val_<n>`` otherwise.

torch.onnx traces the program once more and counts anew, so its names shift with every node a pass adds or drops: ``where_1`` of the
engine need not be ``where_1`` of the reference. With the program's names, ``--dump-ir``, engine and reference speak of the same values.
"""

import operator
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from tpcompile.frames import innermost
from tpcompile.manifest import TAP
from tpcompile.program import Program

SCOPES, TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
"""Under which torch.onnx notes a node's module, and its user's line."""


def taps(graph: ir.Graph) -> list[ir.Value]:
    """The inner values of a graph that a session can be asked for."""
    return [v for node in graph for v in node.outputs if TAP.fullmatch(str(v.name)) and not v.is_graph_output()]


@contextmanager
def exposed(graph: ir.Graph) -> Iterator[None]:
    """Taps are outputs meanwhile: a rewrite of the graph leaves them, and of their types."""
    count = len(graph.outputs)
    graph.outputs.extend(taps(graph))
    try:
        yield
    finally:
        while len(graph.outputs) > count:
            graph.outputs.pop()  # a slice that is deleted leaves its values marked as outputs


def keep_notes(model: ir.Model) -> None:
    """Of what torch.onnx notes leave each node's module and the user's line, its file without folders: a file says nothing of a machine."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes, frame = node.metadata_props.get(SCOPES), innermost(node.metadata_props.get(TRACE, ""))
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
        if frame is not None:
            line = f'File "{Path(frame.file).name}", line {frame.line}, in {frame.function}\n    {frame.source}'
            node.metadata_props[TRACE] = line


def name_values(
    model: ir.Model, program: Program, exported: ExportedProgram, fixed: Collection[str], retraced: bool = True
) -> None:
    """Rename the values between inputs and outputs, and the weights that the exporter turned round.

    Args:
        model: what torch.onnx made.
        program: what it was made from.
        exported: the program as torch.onnx wrote it.
        fixed: names that stay, such as taps.
        retraced: torch.onnx traced it again, and counted anew.
    """
    fixed = {*fixed, *(str(v.name) for v in (*model.graph.inputs, *model.graph.outputs))}
    _name_weights(model, exported)
    renamed = {traced: own for own, traced in _origins(program, exported, retraced) if own not in fixed}
    taken = {str(value.name) for value in model.graph.initializers.values()} | fixed
    number = 0
    for value in [v for node in model.graph for v in node.outputs if v.name not in fixed]:
        own = renamed.get(str(value.name))
        while own is None or own in taken:
            own, number = f"val_{number}", number + 1
        taken.add(own)
        value.name = own


def _origins(program: Program, exported: ExportedProgram, retraced: bool) -> Iterator[tuple[str, str]]:
    """(name in the program, name in the trace) of every node whose one result is a tensor; the last of those it became."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    found: dict[str, str] = {}
    for node in exported.graph.nodes:
        origin = _origin(node) if retraced else node.name
        if retraced and node.op == "call_function" and node.target is operator.getitem:
            origin = next((n.name for n in nodes.values() if _same_part(n, node)), "")
        if origin in nodes and _alike(nodes[origin], node):
            found[origin] = node.name
    yield from found.items()


def _origin(node: fx.Node) -> str:
    """The node of the program that a traced node came from; empty where torch does not say."""
    came = node.meta.get("from_node")
    return str(came[-1].name) if came else ""


def _same_part(own: fx.Node, traced: fx.Node) -> bool:
    """Whether both take the same part of the same op's results."""
    if own.target is not operator.getitem or own.args[1] != traced.args[1]:
        return False
    source, origin = own.args[0], traced.args[0]
    return isinstance(source, fx.Node) and isinstance(origin, fx.Node) and source.name == _origin(origin)


def _alike(own: fx.Node, traced: fx.Node) -> bool:
    """Whether a traced node can be a node's result, and not a step on the way to it."""
    a, b = own.meta.get("val"), traced.meta.get("val")
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.dim() == b.dim()


def _name_weights(model: ir.Model, exported: ExportedProgram) -> None:
    """Call a weight that was transposed ahead of time ``<parameter>.T``; the exporter gives it a number."""
    parameters = exported.graph_signature.inputs_to_parameters
    for node in model.graph:
        source = node.meta.get("node")
        if not isinstance(source, fx.Node):
            continue
        names = [parameters[a.name] for a in source.all_input_nodes if a.name in parameters]
        for value in node.inputs:
            if value is None or value.const_value is None or not value.is_initializer() or value.name in parameters.values():
                continue
            for name in names:
                if f"{name}.T" not in model.graph.initializers and _turned(value, exported.state_dict[name]):
                    value.name, value.const_value = f"{name}.T", _turn(exported.state_dict[name])
                    break


def _turn(parameter: Tensor) -> ir.LazyTensor:
    """A matrix with rows and columns exchanged whenever it is read: every graph of a model holds each weight once, together."""
    turned = parameter.detach().t()
    return ir.LazyTensor(lambda: ir.tensor(turned.contiguous()), dtype=ir.tensor(turned[:1]).dtype, shape=ir.Shape(turned.shape))


def _turned(value: ir.Value, parameter: Tensor) -> bool:
    """Whether an initializer is a matrix with rows and columns exchanged."""
    constant = value.const_value
    if constant is None or parameter.dim() != 2 or tuple(constant.shape.numpy()) != tuple(parameter.shape)[::-1]:
        return False
    return np.array_equal(constant.numpy(), parameter.detach().numpy().T)
