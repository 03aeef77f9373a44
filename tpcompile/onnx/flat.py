"""Rows as a matrix: where a batch is one sample, what works on each token by itself is written for ``[N, C]`` instead of ``[1, N, C]``.

A product of matrices with its bias is then one op, ``Gemm``; of three dims ONNX knows only ``MatMul`` and ``Add``. Around attention, and
wherever else the batch is asked for, a reshape brings it back; values keep their names.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor, replace_all_uses_with
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tpcompile.onnx.names import exposed

ALIKE = {"Cast", "Clip", "Erf", "Gelu", "HardSwish", "Identity", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"}
"""Ops of one tensor that take each number by itself."""
PAIRED = {"Add", "Div", "Mul", "Sub"}
"""Ops of two tensors that are laid over each other from the last dim on."""
VIEWS = {"Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Ops that a runtime computes once where their operands are constants."""
RANK = 3


def flatten_rows(model: ir.Model) -> int:
    """Write linear layers, and what stands between them, for matrices.

    Args:
        model: with the shapes of its values; changed.

    Returns:
        How many ops were written.
    """
    with exposed(model.graph):
        flat = _Flat(model.graph)
        for node in list(model.graph):
            flat.write(node)
        RemoveUnusedNodesPass()(model)
        flat.name()
    return flat.count


class _Flat:
    """The values of a graph that have a matrix of the same numbers beside them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._matrix: dict[ir.Value, ir.Value] = {}
        self._sizes: dict[tuple[int, ...], ir.Value] = {}
        self.count = 0
        """Ops written."""

    def write(self, node: ir.Node) -> None:
        """Write one op for matrices, where it is one that can be."""
        if node.op_type == "Reshape":
            self._split(node)
        elif len(node.outputs) == 1 and _is_rows(node.outputs[0]):
            kind, first = node.op_type, node.inputs[0]
            if kind == "MatMul":
                self._linear(node)
            elif (kind in ALIKE or _is_norm(node)) and first in self._matrix:
                self._replace(node, kind, [self._matrix[first], *node.inputs[1:]], _options(node))
            elif kind in PAIRED and any(value in self._matrix for value in node.inputs) and all(map(_lies_flat, node.inputs)):
                self._replace(node, kind, [self._flat(value, node) for value in node.inputs])
            elif kind == "Gather" and first in self._matrix and _options(node).get("axis") == 1 and _rank(node.inputs[1]) == 1:
                self._replace(node, kind, [self._matrix[first], node.inputs[1]], {"axis": 0})

    def name(self) -> None:
        """Where nothing asks for the batch any more, the matrix goes by the value's name."""
        for rows, matrix in self._matrix.items():
            producer = rows.producer()
            if producer is not None and producer.graph is None:
                name, rows.name = rows.name, None
                matrix.name = name

    def _linear(self, node: ir.Node) -> None:
        """``MatMul`` and ``Add`` of constants as ``Gemm``; without a bias there is nothing to gain but for a matrix that is there."""
        rows, weight = node.inputs
        if rows is None or not _is_rows(rows) or not _is_constant(weight, 2):
            return
        product = node.outputs[0]
        readers = [use.node for use in product.uses()]
        add = readers[0] if len(readers) == 1 and not product.is_graph_output() and readers[0].op_type == "Add" else None
        bias = next((value for value in add.inputs if value is not product), None) if add is not None else None
        if add is not None and _is_constant(bias, 1):
            self._replace(add, "Gemm", [self._flat(rows, node), weight, bias])
        elif rows in self._matrix:
            self._replace(node, "MatMul", [self._matrix[rows], weight])

    def _split(self, node: ir.Node) -> None:
        """Read heads from the matrix: ``[1, N, H, D]``, whatever stands behind the tokens."""
        rows, result = node.inputs[0], node.outputs[0]
        if rows not in self._matrix or _rank(result) <= RANK or result.shape is None or rows is None or rows.shape is None:
            return
        rest = [size for size in result.shape[2:] if isinstance(size, int)]
        if result.shape[0] == 1 and result.shape[1] == rows.shape[1] and len(rest) == _rank(result) - 2:
            node.replace_input_with(0, self._matrix[rows])
            node.replace_input_with(1, self._constant((1, -1, *rest)))
            node.attributes.pop("allowzero", None)

    def _flat(self, value: ir.Value | None, before: ir.Node) -> ir.Value | None:
        """The matrix of a value ``[1, N, C]``; any other is laid as it is."""
        if value is None or not _is_rows(value):
            return value
        if value not in self._matrix:
            assert value.shape is not None
            made = value.producer()
            source = made.inputs[0] if made is not None and made.op_type == "Reshape" else value
            width = value.shape[2]
            assert isinstance(width, int)
            self._matrix[value] = self._insert(before, "Reshape", [source, self._constant((-1, width))])
            self._matrix[value].type = value.type
        return self._matrix[value]

    def _replace(
        self, node: ir.Node, kind: str, inputs: Sequence[ir.Value | None], options: dict[str, Any] | None = None
    ) -> None:
        """Put an op for matrices, and a reshape, in the place of one for rows."""
        old = node.outputs[0]
        assert old.shape is not None
        width = old.shape[2]
        assert isinstance(width, int)
        matrix = self._insert(node, kind, inputs, options)
        new = self._insert(node, "Reshape", [matrix, self._constant((1, -1, width))])
        matrix.type = new.type = old.type
        matrix.shape, new.shape = ir.Shape(old.shape[1:]), old.shape
        name, old.name = old.name, None
        new.name = name
        replace_all_uses_with(old, new, replace_graph_outputs=True)
        self._matrix[new] = matrix
        self.count += 1

    def _insert(
        self, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], options: dict[str, Any] | None = None
    ) -> ir.Value:
        """A new op right before another, with that one's notes."""
        made = ir.node(kind, inputs, attributes=options or {})
        made.metadata_props.update(before.metadata_props)
        self._graph.insert_before(before, made)
        return made.outputs[0]

    def _constant(self, sizes: tuple[int, ...]) -> ir.Value:
        """The sizes of a reshape; each is there once, in front of everything."""
        if sizes not in self._sizes:
            made = ir.node("Constant", [], attributes={"value": ir.tensor(list(sizes), dtype=ir.DataType.INT64)})
            self._graph.insert_before(self._graph[0], made)
            self._sizes[sizes] = made.outputs[0]
        return self._sizes[sizes]


def _is_rows(value: ir.Value | None) -> bool:
    """Whether a value is ``[1, N, C]`` of a known width."""
    shape = value.shape if value is not None else None
    return shape is not None and len(shape) == RANK and shape[0] == 1 and isinstance(shape[2], int)


def _lies_flat(value: ir.Value | None) -> bool:
    """Whether a value can be laid over a matrix: it has one, or no more dims than one."""
    return _is_rows(value) or 0 <= _rank(value) < RANK


def _is_norm(node: ir.Node) -> bool:
    """Whether this normalises each token over its width."""
    return node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) == -1


def _is_constant(value: ir.Value | None, rank: int) -> bool:
    """Whether a value of so many dims is the same in every run: a weight, or a part or a view of one."""
    return value is not None and _rank(value) == rank and _is_given(value)


def _is_given(value: ir.Value | None) -> bool:
    made = value.producer() if value is not None else None
    if value is None or value.is_initializer() or get_const_tensor(value) is not None:
        return True
    return made is not None and made.op_type in VIEWS and all(_is_given(one) for one in made.inputs)


def _rank(value: ir.Value | None) -> int:
    """How many dims; -1 where that is not known."""
    return len(value.shape) if value is not None and value.shape is not None else -1


def _options(node: ir.Node) -> dict[str, Any]:
    """The attributes of an op."""
    return {name: attribute.value for name, attribute in node.attributes.items()}
