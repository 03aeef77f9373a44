"""What OpenVINO's graph is told before it is saved: what the converter leaves to the plugin, and the plugin gets wrong or takes long for.

1. A TopK puts the lower index first where values are equal, as ONNX has it.
2. ``c / x`` and ``c * x ** -1`` are ``(x / c) ** -1``. The plugin makes a power of ``c / x`` itself, but not in front of the ``k`` of a
   TopK: there it joins the division to the sum before it, and computes ``x / c``. A product with the power it makes a division first.
3. In float32, a product with weights stands alone (decision 0031). What the plugin joins to it makes it another kernel's, whose layout of
   the weights depends on the number of rows: they are laid out anew, and held once more, for ever new counts. Alone it is one
   kernel's, with one layout. So GELU reads its input twice, which nothing is joined to, and a scale goes into the weights.
"""

import math
from typing import Any

import numpy as np

LINEAR = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "MatMul"})
"""Of a scaled value, its first operand scaled instead is the same."""


def settle(graph: Any, computed: str) -> None:
    """Rewrite in place.

    Args:
        graph: OpenVINO's model.
        computed: what the plugin computes in, ``f32`` or ``bf16``.
    """
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "TopK" and node.get_attributes()["sort"] == "value":
            node.set_attribute("stable", True)
        elif kind in ("Divide", "Multiply") and node.get_element_type().is_real():
            quotient = _quotient(node)
            if quotient is not None:
                _invert(node, *quotient)
    for node in graph.get_ordered_ops() if computed == "f32" else ():
        kind = node.get_type_name()
        if kind == "Gelu" and _product(node.input_value(0)) is not None:
            _part(node)
        elif kind == "Multiply":
            _absorb(node)


def _ops() -> Any:
    from openvino import opset13

    return opset13


def _quotient(node: Any) -> tuple[Any, Any] | None:
    """The constant and the divisor of ``c / x`` and ``c * x ** -1``."""
    first, second = (port.get_source_output() for port in node.inputs())
    if node.get_type_name() == "Divide":
        return (first, second) if _is_constant(first) else None
    for constant, other in ((first, second), (second, first)):
        if _is_constant(constant) and other.get_node().get_type_name() == "Power":
            base, exponent = (port.get_source_output() for port in other.get_node().inputs())
            if _is_constant(exponent) and (exponent.get_node().get_data() == -1).all():
                return constant, base
    return None


def _is_constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def _invert(node: Any, constant: Any, divisor: Any) -> None:
    """Replace ``c / x`` by ``(x / c) ** -1``."""
    ops = _ops()
    number = constant.get_node().get_data()
    if number.size != 1 or number.item() != 1 or divisor.get_partial_shape() != node.output(0).get_partial_shape():
        divisor = ops.divide(divisor, constant)
        divisor.set_friendly_name(f"{node.get_friendly_name()}.inverse")
    _replace(node, ops.power(divisor, ops.constant(np.full((), -1.0, number.dtype))))


def _replace(node: Any, made: Any) -> None:
    """Put ``made`` in the place of a node, under its names."""
    made.set_friendly_name(node.get_friendly_name())
    made.output(0).get_tensor().set_names(node.output(0).get_names())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(made.output(0))


def _product(value: Any) -> Any | None:
    """The product with weights that a value is, a bias added or not."""
    node = value.get_node()
    if node.get_type_name() == "Add":
        parts = [port for port in node.input_values() if not _is_constant(port)]
        node = parts[0].get_node() if len(parts) == 1 else node
    return node if node.get_type_name() == "MatMul" and _is_constant(node.input_value(1)) else None


def _part(node: Any) -> None:
    """Write GELU of x as ``h + h * g(x)``, ``h = x / 2``, which reads x twice."""
    ops, x = _ops(), node.input_value(0)
    dtype = x.get_element_type().to_dtype()

    def scaled(value: Any, by: float) -> Any:
        return ops.multiply(value, ops.constant(np.array(by, dtype)))

    half = scaled(x, 0.5)
    if node.get_attributes()["approximation_mode"] == "ERF":
        gate = ops.erf(scaled(x, math.sqrt(0.5)))
    else:
        cubic = ops.add(x, scaled(ops.multiply(ops.multiply(x, x), x), 0.044715))
        gate = ops.tanh(scaled(cubic, math.sqrt(2 / math.pi)))
    _replace(node, ops.add(half, ops.multiply(half, gate)))


def _absorb(node: Any) -> None:
    """Scale the weights, and the bias, of a product instead of what alone is computed from it, as the logits of attention are."""
    scale = [port for port in node.input_values() if _is_constant(port) and math.prod(port.get_shape()) == 1]
    others = [port for port in node.input_values() if not _is_constant(port)]
    if len(scale) != 1 or len(others) != 1 or others[0].get_partial_shape() != node.output(0).get_partial_shape():
        return
    value, passed = others[0], []
    while (product := _product(value)) is None and value.get_node().get_type_name() in LINEAR:
        if len(value.get_target_inputs()) != 1:
            return
        passed.append(value)
        value = value.get_node().input_value(0)
    if product is None or len(value.get_target_inputs()) != 1 or len(product.output(0).get_target_inputs()) != 1:
        return
    number, root = scale[0].get_node().get_data(), value.get_node()
    for owner in {id(one): one for one in (product, root)}.values():
        for port in owner.inputs():
            if _is_constant(port.get_source_output()):
                held = port.get_source_output().get_node()
                scaled = _ops().constant((held.get_data() * number.reshape(())).astype(number.dtype))
                scaled.set_friendly_name(f"{held.get_friendly_name()}.scaled")
                port.replace_source_output(scaled.output(0))
    for one in {product.output(0), value, *passed}:
        one.get_tensor().set_names(set())  # no value of the program any more
    others[0].get_tensor().set_names(node.output(0).get_names())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(others[0])
