"""Cut an emitted graph at its sites: a chain of graphs without a size that follows from data, and the gathers between them.

Every value has a *time*. Stage ``s`` computes at time ``2 s``; between stage ``i`` and the next, at ``2 i + 1``, the host gathers. A site,
and every gather of rows by its positions (``tpcompile.onnx.ops``), takes the first such time at which all that it reads is there;
everything else is computed as soon as it can be, by the next stage. Then, by liveness, what only later stages read is computed by the
first of them, if all it is computed from travels that far anyway. What is read across a cut travels by name, whatever it is: rows, masks of
an older set, a residual stream that ``put`` writes into. What is made of weights alone is written again in every stage that reads it.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from onnx_ir.convenience import extract, get_const_tensor
from onnx_ir.external_data import convert_tensors_to_external

from tpcompile.errors import StageError
from tpcompile.manifest import StageInfo, StepInfo, TensorInfo
from tpcompile.onnx.emit import OnnxModel, check
from tpcompile.onnx.ops import HOST
from tpcompile.spec import TensorSpec

WEIGHT = -1
"""The time of what no input reaches."""
SHARED = "model.onnx.data"
"""The weights of all stages."""
SMALL = 1024
"""Tensors of fewer bytes stand in the graph: sizes and numbers that a runtime's shape inference asks for."""

DEPTH = 16
"""Steps that are followed back to see whether a value can be computed later."""


@dataclass(frozen=True)
class Chain:
    """A graph in stages.

    Attributes:
        models: the stages that have outputs, in order.
        stages: what happens before each of them, and what it takes and gives; steps behind the last stage stand in one without outputs.
        outputs: of the whole chain.
    """

    models: tuple[OnnxModel, ...]
    stages: tuple[StageInfo, ...]
    outputs: tuple[TensorSpec, ...]

    def save(self, folder: Path) -> list[Path]:
        """Write ``stage0.onnx``, ``stage1.onnx``, ... and their weights, each once, into ``model.onnx.data``; return the graphs' files."""
        held = [value for one in self.models for value in one.model.graph.initializers.values()]
        tensors = {id(v.const_value): v.const_value for v in held if v.const_value is not None and v.const_value.nbytes >= SMALL}
        if tensors:
            apart = dict(zip(tensors, convert_tensors_to_external(list(tensors.values()), folder, SHARED), strict=True))
            for value in held:
                value.const_value = apart.get(id(value.const_value), value.const_value)
        paths = [folder / f"stage{number}.onnx" for number in range(len(self.models))]
        for one, path in zip(self.models, paths, strict=True):
            ir.save(one.model, path)
        return paths


def cut(model: OnnxModel) -> Chain:
    """Cut a graph that ``emit(program, hosted=True)`` wrote at its sites.

    Raises:
        StageError: a value crosses a cut whose type or rank the exporter does not say.
        EmitError: the ONNX checker refused a stage.
    """
    return _Cut(model).run()


class _Cut:
    """One cut of one graph.

    Args:
        model: with host ops; the graph is changed where the host reads a weight.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.whole, self.graph = model, model.model.graph
        self.asked = {v for n in self.graph for v in n.outputs if v.name in model.taps} | set(self.graph.outputs)
        _hand_over_weights(self.graph)
        self.nodes = _alive(self.graph, self.asked)
        self.readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in self.nodes:
            for value in _reads(node):
                self.readers[value].append(node)
        self.time: dict[ir.Value, int] = dict.fromkeys(self.graph.inputs, 0)
        for node in self.nodes:
            self.time |= dict.fromkeys(node.outputs, self._earliest(node))
        for node in reversed(self.nodes):
            self._delay(node)
        _name_dims(self.nodes)

    def run(self) -> Chain:
        models: list[OnnxModel] = []
        stages: list[StageInfo] = []
        steps: list[StepInfo] = []
        for now in range(0, max(self.time.values()) + 2, 2):
            steps += [step for n in self.nodes if now and self._when(n) == now - 1 and (step := _step(n)) is not None]
            if gives := self._gives(now):
                models.append(self._stage(now, gives))
                inputs, outputs = (tuple(map(TensorInfo.of, specs)) for specs in (models[-1].inputs, models[-1].outputs))
                stages.append(StageInfo(steps=tuple(steps), inputs=inputs, outputs=outputs))
                steps = []
        behind = (StageInfo(steps=tuple(steps)),) if steps else ()
        return Chain(tuple(models), (*stages, *behind), self.whole.outputs)

    def _at(self, value: ir.Value) -> int:
        return self.time.get(value, WEIGHT)  # an initializer

    def _when(self, node: ir.Node) -> int:
        return self._at(node.outputs[0])

    def _earliest(self, node: ir.Node) -> int:
        latest = max(map(self._at, _reads(node)), default=WEIGHT)
        if latest == WEIGHT:
            hosted = any(one.domain == HOST for value in node.outputs for one in self.readers[value])
            return 0 if hosted or self.asked.intersection(node.outputs) else WEIGHT
        if node.domain == HOST or (latest % 2 and self._movable(node)):
            return latest | 1
        return latest + latest % 2

    def _movable(self, node: ir.Node) -> bool:
        """Whether the host can compute a node: it gathers, or brings positions into form, and reads no weight."""
        step = _step(node)
        return step is not None and all(self._at(v) != WEIGHT for v in _reads(node) if v.name in step.reads)

    def _delay(self, node: ir.Node) -> None:
        """Compute a value where it is first read, if that is in a later stage, and all it is computed from travels there anyway."""
        now = self._when(node)
        first = min((self._when(one) for value in node.outputs for one in self.readers[value]), default=now)
        if now == WEIGHT or first <= now or first % 2 or self.asked.intersection(node.outputs):
            return
        if now % 2 and (node.domain == HOST or node.op_type == "Gather"):
            return
        if all(self._travels(value, node, first) for value in _reads(node)):
            self.time |= dict.fromkeys(node.outputs, first)
        elif now % 2:  # positions brought into form for no gather
            self.time |= dict.fromkeys(node.outputs, now + 1)

    def _travels(self, value: ir.Value, reader: ir.Node, to: int, depth: int = DEPTH) -> bool:
        """Whether a value is at hand at a time, one reader left aside, or is a size; or can be computed there for that reader."""
        others = [one for one in self.readers[value] if one is not reader]
        at_hand = value in self.asked or value.is_graph_input() or self._at(value) == WEIGHT
        if at_hand or any(self._when(one) >= to for one in others):
            return True
        made = value.producer()
        if made is not None and made.op_type == "Shape":
            return True
        if made is None or others or depth == 0 or self._when(made) % 2:
            return False
        return all(self._travels(one, made, to, depth - 1) for one in _reads(made))

    def _gives(self, now: int) -> list[ir.Value]:
        """What a stage hands on: to the host, to later stages, to the caller."""
        made = [v for n in self.nodes if self._when(n) == now for v in n.outputs]
        return [v for v in made if v in self.asked or any(self._when(one) != now for one in self.readers[v])]

    def _stage(self, now: int, gives: Sequence[ir.Value]) -> OnnxModel:
        own = [n for n in self.nodes if self._when(n) == now]
        takes = list(dict.fromkeys(v for n in own for v in _reads(n) if v.is_graph_input() or self._at(v) not in (WEIGHT, now)))
        inputs, outputs = tuple(map(_spec, takes)), tuple(map(_spec, gives))
        graph = extract(self.graph, takes, gives)
        graph.name = f"stage{now // 2}"
        graph.opset_imports.pop(HOST, None)
        model = ir.Model(graph, ir_version=self.whole.model.ir_version, producer_name=self.whole.model.producer_name)
        check(model)
        return OnnxModel(model, inputs, outputs, ())


def _hand_over_weights(graph: ir.Graph) -> None:
    """Let the first stage give the host the weights that it reads, such as pinned positions of a fixed number of tokens."""
    given: dict[ir.Value, ir.Value] = {}
    first = next(iter(graph))
    for node in [n for n in graph if n.domain == HOST]:
        for position, value in enumerate(node.inputs):
            if value is None or not value.is_initializer():
                continue
            if value not in given:
                copy = ir.node("Identity", [value])
                made = copy.outputs[0]
                made.name, made.type, made.shape = f"{value.name}.given", value.type, value.shape
                graph.insert_before(first, copy)
                given[value] = made
            node.replace_input_with(position, given[value])


def _alive(graph: ir.Graph, asked: Collection[ir.Value]) -> list[ir.Node]:
    """The nodes that an output or a tap needs, in order."""
    wanted, found = set(asked), []
    for node in reversed(graph):
        if wanted.intersection(node.outputs):
            wanted.update(_reads(node))
            found.append(node)
    return found[::-1]


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node is computed from; a branch or a loop reads values from outside too."""
    own = [value for value in node.inputs if value is not None]
    for inner in [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]:
        made = {*inner.inputs, *inner.initializers.values(), *(value for one in inner for value in one.outputs)}
        own += [value for one in inner for value in _reads(one) if value not in made]
    return own


def _step(node: ir.Node) -> StepInfo | None:
    """A node as a step of the host; None where it is none."""
    reads = [value for value in node.inputs if value is not None]
    attributes = node.attributes
    op: Literal["", "store", "take", "gather", "row", "reshape", "unsqueeze"] = ""
    numbers: tuple[int, ...] = ()
    if node.op_identifier() == (HOST, "Store", ""):
        op, numbers = "store", tuple(attributes["rows"].as_ints())
    elif node.op_identifier() == (HOST, "Take", ""):
        op, numbers = "take", (attributes["batch"].as_int(), attributes["dim"].as_int())
    elif not node.domain and node.op_type in ("Gather", "Reshape", "Unsqueeze"):
        op, numbers = _plain(node.op_type, node.attributes.get_int("axis", 0), get_const_tensor(reads[1]))
        reads = reads[:1] if op != "gather" else reads
    names = tuple(str(value.name) for value in reads)
    return StepInfo(op=op, reads=names, gives=str(node.outputs[0].name), numbers=numbers) if op else None


def _plain(
    op_type: str, axis: int, second: ir.TensorProtocol | None
) -> tuple[Literal["", "gather", "row", "reshape", "unsqueeze"], tuple[int, ...]]:
    """A gather, or what brings positions into form: its name as a step, and its numbers; an empty name where it is neither.

    Args:
        op_type: ``Gather``, ``Reshape`` or ``Unsqueeze``.
        axis: of ``Gather``.
        second: the second operand, where it is constant.
    """
    if second is None:
        return ("gather", (axis,)) if op_type == "Gather" else ("", ())
    sizes = second.numpy()
    if op_type == "Gather":
        return ("row", (axis, int(sizes))) if sizes.ndim == 0 else ("", ())
    numbers = tuple(int(size) for size in sizes.reshape(-1))
    if op_type == "Unsqueeze":
        return "unsqueeze", numbers
    return ("reshape", numbers) if 0 not in numbers else ("", ())  # 0 stands for the size that was


def _name_dims(nodes: Sequence[ir.Node]) -> None:
    """Call the size behind a site ``t1``, ``t2``, ... instead of what the exporter counted."""
    names: dict[str, str] = {}
    for number, node in enumerate(one for one in nodes if (one.domain, one.op_type) == (HOST, "Store")):
        shape = node.outputs[0].shape
        if shape is not None and not isinstance(shape[1], int):
            names[str(shape[1])] = f"t{number + 1}"
    for value in (v for one in nodes for v in one.outputs if v.shape is not None):
        value.shape = ir.Shape([names.get(str(size), size) for size in value.shape or ()])
    for node in nodes:  # positions of a single sample, flat: the exporter does not say how many
        source, flat = node.inputs[0] if node.inputs else None, node.outputs[0]
        if _step(node) is not None and source is not None and source.shape is not None and flat.shape == [None]:
            flat.shape = ir.Shape([source.shape[-1]]) if set(source.shape[:-1]) <= {1} else flat.shape


def _spec(value: ir.Value) -> TensorSpec:
    """What a stage takes or gives.

    Raises:
        StageError: the exporter does not say of which type it is.
    """
    if value.dtype is None or value.shape is None:
        raise StageError(
            f"{value.name} crosses a cut, and its type is not known", fix="export with form single, and report this model"
        )
    shape = tuple(size if isinstance(size, int) else str(size.value or "?") for size in value.shape)
    return TensorSpec(str(value.name), str(value.dtype.numpy()), shape)
