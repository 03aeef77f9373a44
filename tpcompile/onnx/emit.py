"""Program -> ONNX: opset 23, named inputs, outputs and dims, and *taps*: internal values under fixed names.

``site0.keep``, ``site0.score``, (compact only) ``site0.index`` and (where tokens merge) ``site0.into`` stay inside the graph; a session
can be asked for them, plain runtimes never see them.
"""

import contextlib
import copy
import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch import fx
from torch.export import ExportedProgram
from torch.onnx._internal import _lazy_import
from torch.onnx._internal.fx.passes import type_promotion

from tpcompile.capture import tracing
from tpcompile.errors import EmitError, first_line
from tpcompile.onnx.fuse import fuse_attention
from tpcompile.onnx.names import keep_notes, name_values
from tpcompile.onnx.ops import translations
from tpcompile.program import Bound, Program, Stage, forget_symbols, where_of
from tpcompile.spec import TensorSpec
from tpcompile.text import line

aten = torch.ops.aten
OPSET = 23
NODE = re.compile(r"translating node %(\w+)")
"""How torch.onnx names what it could not translate."""
LIBRARY: Any = _lazy_import.onnxscript_apis  # type: ignore[attr-defined]  # a lazy module: what it holds is not typed
ASK: Callable[[], Iterable[Any]] = LIBRARY.get_torchlib_ops
MATCHER: Any = SimplePatternMatcher
MATCH: Callable[..., Any] = MATCHER.match
PLAIN_NAMES: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor, aten.__xor__.Tensor: aten.bitwise_xor.Tensor
}  # fmt: skip
"""Operators of Python, under the names that torch.onnx knows them by."""
INLINE_LIMIT = 1 << 26
"""Weights beyond this many bytes go to ``model.onnx.data``: a protobuf is copied whenever it is written or read, and ends at 2 GB."""
LIGHT = 4096
"""Weights of at most so many bytes are shown to the checker: sizes and numbers that shapes follow from."""


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX graph with its interface.

    Attributes:
        model: the graph, onnx-ir.
        inputs: what it takes.
        outputs: what it gives.
        taps: names of internal values a session can be asked for.
    """

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    taps: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write the file; weights stand inside it below ``INLINE_LIMIT`` bytes, else in ``<name>.data`` beside it."""
        save(self.model, path)


def save(model: ir.Model, path: Path, limit: int = INLINE_LIMIT) -> None:
    """Write a graph; weights of more than ``limit`` bytes in all lie in ``<name>.data`` beside it."""
    heavy = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None) > limit
    ir.save(model, path, external_data=f"{path.name}.data" if heavy else None)


def emit(program: Program, hosted: bool = False) -> OnnxModel:
    """Write a program of any stage as ONNX.

    Args:
        program: what to write.
        hosted: leave sites and their gathers to the host, as ops that only ``tpcompile.onnx.stages`` knows.

    Raises:
        EmitError: torch.onnx or the ONNX checker refused it; their error is the cause.
    """
    tapped, taps = _with_taps(program)
    dynamic = {d for spec in program.inputs for d in spec.shape if isinstance(d, str)}
    try:
        with tracing(), quiet(), hastened():
            exported = torch.onnx.export(
                _Plain.of(tapped.exported),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in program.inputs],
                output_names=[*(f"output.{i}" for i in range(len(program.output_names))), *taps],
                custom_translation_table=translations(program, hosted),
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        raise _refusal(tapped, error) from error
    assert exported is not None
    assert exported.exported_program is not None
    model = exported.model
    _name_dims(model, program)
    _fix_reshapes(model)
    if program.stage is not Stage.PLACED:  # the reference stays as the model is written
        fuse_attention(model)
    outputs = _demote(model, len(program.output_names))
    name_values(model, program, exported.exported_program, taps, not isinstance(exported.exported_program, _Plain))
    _name_outputs(model, program.output_names)
    keep_notes(model)
    if not hosted:
        check(model)
    specs = tuple(_spec(v, dynamic) for v in outputs)
    return OnnxModel(model, program.inputs, specs, taps)


class _Plain(ExportedProgram):
    """A program that is not traced once more where every op of it is one that torch.onnx knows: most of its time would go there."""

    @classmethod
    def of(cls, program: ExportedProgram) -> ExportedProgram:
        """The same program, as one of this class."""
        plain = copy.copy(program)
        plain.__class__ = cls
        return plain

    def run_decompositions(
        self,
        decomp_table: dict[torch._ops.OperatorBase, Callable[..., Any]] | None = None,
        decompose_custom_triton_ops: bool = False,
    ) -> ExportedProgram:
        """Decompose what the table names; the program itself where it names nothing in it."""
        targets = {node.target for node in self.graph.nodes if node.op == "call_function"}
        if decomp_table is not None and targets.isdisjoint(decomp_table):
            return self
        forget_symbols(self.graph)
        decomposed: ExportedProgram = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return decomposed


def _refusal(program: Program, error: Exception) -> EmitError:
    """What torch.onnx said first, of the node that it said it of."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    named = {match[1] for link in chain if (match := NODE.search(str(link)))}
    node = next((node for node in program.graph.nodes if node.name in named), None)
    return EmitError(
        f"torch.onnx could not translate the program: {first_line(chain[-1])}",
        where=where_of(node) if node is not None else None, node=line(node) if node is not None else "", during="emit",
        fix="write that line with torch's own ops, or keep the op out of the model; -v shows torch.onnx's own error",
    )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx prints its progress and logs hints about other packages; neither is ours to show."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def hastened() -> Iterator[None]:
    """Keep torch.onnx from three things that take long and change nothing; all is put back at the end.

    The source of some 500 functions is read for its list of translations, a second: the function that makes the list is exchanged for one
    that remembers. Its promotion of types computes every value's type and shape again, a third of the rest. And its rules walk the whole
    graph at each node, where they look for two nodes at once, whatever the node is.
    """
    module: Any = type_promotion
    LIBRARY.get_torchlib_ops, module._TypePromotionInterpreter, MATCHER.match = _translations, _Promote, _match
    try:
        yield
    finally:
        LIBRARY.get_torchlib_ops, module._TypePromotionInterpreter, MATCHER.match = ASK, _Promote.__base__, MATCH


def _match(matcher: Any, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **how: Any) -> Any:
    """What the matcher finds; nothing where the first node of its pattern is of another op."""
    op = matcher.pattern.output_nodes[0].op_identifier()
    if op is not None and op != node.op_identifier():
        return MatchResult().fail("another op")
    return MATCH(matcher, model, graph, node, **how)


class _Promote(type_promotion._TypePromotionInterpreter):
    """Promotes types; what a node gives is known."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or "val" not in n.meta:
            return super().run_node(n)
        with self._set_current_node(n):
            if rule := type_promotion.get_type_promotion_rule(n, self.type_promotion_table):
                self._maybe_promote_node(n, rule)
        return n.meta["val"]


@cache
def _translations() -> tuple[Any, ...]:
    return tuple(ASK())


def _with_taps(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program with what its sites decide as further outputs: so the exporter keeps those values, under known names."""
    draft = program.draft()
    nodes = {n.name: n for n in draft.graph.nodes}
    for node in nodes.values():
        node.target = PLAIN_NAMES.get(node.target, node.target)
    wanted = {f"{site.name}.{kind}": nodes[name] for site in program.sites for kind, name in site.taps.items()}
    output = draft.graph.output_node()
    results = output.args[0]
    assert isinstance(results, (tuple, list))
    bounded = program.stage is Stage.PLACED and bool(program.bounds)
    if bounded:
        with draft.graph.inserting_before(output):
            wanted |= {f"bound{i}": _margin(draft.graph, nodes, bound) for i, bound in enumerate(program.bounds)}
    output.args = ((*results, *wanted.values()),)
    return program.adopt(draft, refresh=bounded, output_names=(*program.output_names, *wanted)), tuple(wanted)


def _margin(graph: fx.Graph, nodes: Mapping[str, fx.Node], bound: Bound) -> fx.Node:
    """How far the dropped keys of living rows lie below their row's largest logit, at least: float, 0-d; infinite where nothing fell."""
    logits, keep = nodes[bound.logits], nodes[bound.keep]
    rank = logits.meta["val"].dim()
    gap = graph.call_function(aten.sub.Tensor, (graph.call_function(aten.amax.default, (logits, [bound.dim], True)), logits))
    hidden = graph.call_function(aten.logical_not.default, (_over(graph, keep, bound.batch, bound.dim, rank),))
    if bound.queries is not None:
        hidden = graph.call_function(aten.logical_and.default, (hidden, _over(graph, keep, bound.batch, bound.queries, rank)))
    far = graph.call_function(aten.where.ScalarOther, (hidden, gap, math.inf))
    return graph.call_function(aten.amin.default, (far, list(range(rank)), False))


def _over(graph: fx.Graph, keep: fx.Node, batch: int | None, dim: int, rank: int) -> fx.Node:
    """A mask ``[B, N]`` laid along these dims of a tensor of some rank."""
    if batch is None:
        keep = graph.call_function(aten.select.int, (keep, 0, 0))
    elif batch > dim:
        keep = graph.call_function(aten.transpose.int, (keep, 0, 1))
    for d in range(rank):
        if d not in (batch, dim):
            keep = graph.call_function(aten.unsqueeze.default, (keep, d))
    return keep


def _name_dims(model: ir.Model, program: Program) -> None:
    """Give dynamic sizes their own names, wherever they show."""
    names: dict[object, str] = {}
    for value, spec in zip(model.graph.inputs, program.inputs, strict=True):
        assert value.shape is not None
        names |= {traced: named for traced, named in zip(value.shape, spec.shape, strict=True) if isinstance(named, str)}
        value.shape = ir.Shape(spec.shape)
    for value in (v for node in model.graph for v in node.outputs if v.shape is not None):
        value.shape = ir.Shape([names.get(size, size) for size in value.shape])  # type: ignore[union-attr]  # not None


def _fix_reshapes(model: ir.Model) -> None:
    """Write every reshape with one constant: sizes that stay are 0, one that follows from the others is -1.

    Shapes computed at run time cost a chain of nodes each, and a runtime's shape inference when a new size comes.
    """
    for node in list(model.graph):
        before, after = (node.inputs[0], node.outputs[0]) if node.op_type == "Reshape" else (None, None)
        if before is None or after is None or before.shape is None or after.shape is None:
            continue
        old = [*before.shape, *([None] * len(after.shape))]
        sizes = [s if isinstance(s, int) else 0 if _same(s, o) else -1 for s, o in zip(after.shape, old, strict=False)]
        if sizes.count(-1) > 1:
            continue
        constant = ir.node("Constant", [], attributes={"value": ir.tensor(sizes, dtype=ir.DataType.INT64)})
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)
    RemoveUnusedNodesPass()(model)


def _same(size: object, other: object) -> bool:
    """Whether two sizes are one symbol."""
    return isinstance(size, ir.SymbolicDim) and size.value is not None and size == other


def _demote(model: ir.Model, count: int) -> list[ir.Value]:
    """Turn every output behind the first ``count`` back into an internal value; its name stays."""
    kept = list(model.graph.outputs)[:count]
    while len(model.graph.outputs) > count:
        model.graph.outputs.pop()
    return kept


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Give the outputs the library's names; an internal value that happens to have one makes room."""
    for node in model.graph:
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}.inner"
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name


def check(model: ir.Model) -> None:
    """Show a graph to the ONNX checker; heavy weights stand there as inputs, so that none is copied.

    Raises:
        EmitError: the checker refused it.
    """
    held = list(model.graph.initializers.values())
    heavy = [v for v in held if v.const_value is not None and v.const_value.nbytes > LIGHT]
    for value in heavy:
        del model.graph.initializers[str(value.name)]
    model.graph.inputs.extend(heavy)
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except onnx.checker.ValidationError as error:
        raise EmitError(f"the ONNX checker refused the graph: {error}", fix="please report it with a --dump-ir") from error
    finally:
        for _ in heavy:
            model.graph.inputs.pop()
        model.graph.initializers.clear()
        model.graph.initializers.update({str(value.name): value for value in held})


def _spec(value: ir.Value, dynamic: set[str]) -> TensorSpec:
    dtype = str(value.dtype.numpy()) if value.dtype is not None else "float32"
    shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape or ())
    return TensorSpec(str(value.name), dtype, shape)
