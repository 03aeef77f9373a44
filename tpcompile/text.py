"""The text form of a Program: tests, dumps and errors all use this one.

::

    program @ placed
    tokens t0          input attention_mask
    tokens t1 < t0     ltp.py:88   blocks.3
    %softmax: f32[1, 12, t0, t0] = aten.softmax.int(%add, -1)   # blocks.3.attn vit.py:81
"""

import re

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from tpcompile.axes import Placement
from tpcompile.program import Program, where_of

_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8", torch.bool: "bool",
}  # fmt: skip


def render(program: Program) -> str:
    """The whole program; weights are left out, token sets stand in the shapes."""
    head = [f"program @ {program.stage.name.lower()}"]
    head += [
        f"tokens t{site.tokens.level} < t{site.tokens.level - 1}   {site.name}  {_site(program, site.node)}"
        for site in program.sites
    ]
    weights = {s.arg.name for s in program.exported.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT}
    body = [line(node, program.placements.get(node.name)) for node in program.graph.nodes if node.name not in weights]
    return "\n".join([*head, *body])


def _site(program: Program, name: str) -> str:
    where = where_of(program.node(name))
    return f"{where.short}  {where.module}".rstrip()


def line(node: fx.Node, placement: Placement | None = None) -> str:
    """One node: ``%a: f32[1, t0, 32] = aten.add.Tensor(%x, %y)   # module file.py:12``."""
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    kind = _type(node, placement)
    if node.op == "placeholder":
        return f"input %{node.name}: {kind}"
    arguments = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    where = where_of(node)
    place = " ".join(p for p in (where.module, where.short if where.file else "") if p)
    return f"%{node.name}: {kind} = {_target(node)}({', '.join(arguments)})" + (f"   # {place}" if place else "")


def _target(node: fx.Node) -> str:
    target = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _type(node: fx.Node, placement: Placement | None) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return type(value).__name__ if not isinstance(value, (tuple, list)) else "tuple"
    sizes = [_symbol(s) for s in value.shape]
    shape = placement.shape(sizes) if placement else "[" + ", ".join(sizes) + "]"
    return _SHORT.get(value.dtype, str(value.dtype)) + shape


def _symbol(size: object) -> str:
    return re.sub(r"\s+", "", str(size))


def _value(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_value(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_value(v)}" for k, v in value.items()) + "}"
    return str(value)
