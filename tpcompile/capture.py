"""nn.Module and example inputs -> Program[captured]: plain ATen from ``torch.export``, functional, in eval mode."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpcompile.errors import CaptureError, NotDeterministic, TpcompileError, Where
from tpcompile.frames import user_frames
from tpcompile.frozen import frozen
from tpcompile.manifest import TAP
from tpcompile.program import Program, Stage, where_of
from tpcompile.spec import TensorSpec
from tpcompile.untraceable import ValueAsked, check_inputs, listening, refusal

Dynamic = Mapping[str, Mapping[int, str]]
Ranges = Mapping[str, tuple[int, int]]

LONGEST = 8192
"""Greatest size of a dynamic dim that nobody bounded."""

aten = torch.ops.aten
COMPOUND: tuple[OpOverload, ...] = (
    aten.tensordot.default, aten.inner.default, aten.outer.default, aten.dot.default, aten.linalg_multi_dot.default,
    aten.linalg_vecdot.default, aten.isclose.default, aten.linalg_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim,
    aten.frobenius_norm.dim, aten.cosine_similarity.default, aten.count_nonzero.default, aten.count_nonzero.dim_IntList,
    aten.nansum.default, aten.nanmean.default, aten.glu.default, aten.hstack.default, aten.vstack.default, aten.meshgrid.default,
    aten.meshgrid.indexing, aten.tile.default, aten.pad.default, aten.diff.default, aten.type_as.default, aten.argsort.default,
    aten.prelu.default, aten.atleast_1d.Sequence, aten.atleast_2d.Sequence,
)  # fmt: skip
"""Ops that capture writes out in simpler ones. What engines fuse stays whole: attention, norms, softmax, gelu, linear, convolutions."""


def capture(
    model: nn.Module | ExportedProgram | Program,
    inputs: Mapping[str, Tensor],
    dynamic: Dynamic | None = None,
    ranges: Ranges | None = None,
) -> Program:
    """Trace a model to functional ATen.

    Args:
        model: a module in eval mode whose forward takes the inputs by name and returns tensors, in tuples, mappings or dataclasses
            (``name_outputs`` names them); or an ExportedProgram of one. A program that is captured already is returned as it is.
        inputs: example tensors by parameter name; dynamic dims need a size of at least 3 here.
        dynamic: per input, dim -> name; dims of one name share a size.
        ranges: per dim name, least and greatest size; default 2 to 8192, and from 1 for what stands first, the batch.

    Where Python branches on the value of a 0-d parameter or buffer, all of them are taken at their present values; the program's
    assumptions say so.

    Returns:
        A Program at stage captured.

    Raises:
        NotDeterministic: the model is in training mode, or changes a buffer.
        CaptureError: torch.export failed; its error is the cause; or what it returns is no tensor.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, ExportedProgram):
        return _adopt(model, _in_order(model, inputs), dynamic or {})
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise NotDeterministic(
            "the model is in training mode: dropout and batch statistics would be compiled in",
            where=Where(module=training) if training else None, fix="call model.eval() first",
        )  # fmt: skip
    check_inputs(model, inputs)
    dynamic = dynamic or {}
    shapes = _shapes(inputs, dynamic, ranges or {})
    names: dict[str, None] = {}
    wrapped = _Named(model, dynamic, names)
    examples = {name: value.clone() for name, value in inputs.items()}  # one tensor given twice would be traced as one input

    def trace() -> ExportedProgram:
        with tracing(), torch.no_grad(), _from_one(shapes):
            return torch.export.export(wrapped, (), {"inputs": examples}, dynamic_shapes={"inputs": shapes}, strict=False)

    constants: tuple[str, ...] = ()
    with listening(model) as ear:
        try:
            try:
                exported = trace()
            except ValueAsked:
                ear.fixed.clear()
                with frozen(model) as constants:
                    exported = trace()
        except TpcompileError:
            raise  # a model of ours that refuses its inputs
        except Exception as error:
            cause = error.__cause__ if isinstance(error, ValueAsked) and error.__cause__ is not None else error
            raise refusal(model, cause, ear.fixed, dynamic) from cause
    program = _adopt(exported, dict(inputs), dynamic, tuple(names))
    return replace(program, assumptions=tuple(f"{text}, its value at capture" for text in constants))


def _in_order(exported: ExportedProgram, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The example inputs in the order of a traced program's own: names decide, never the caller's order."""
    names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    if sorted(names) != sorted(inputs):
        raise CaptureError(
            f"the program takes {', '.join(map(str, names))}, the example gives {', '.join(inputs) or 'nothing'}",
            fix="name the example inputs as the traced program does",
        )
    return {str(name): inputs[str(name)] for name in names}


@contextmanager
def tracing() -> Iterator[None]:
    """The context of every trace, decomposition and emission: attention is plain math, lines are the user's, third-party noise silent."""
    with sdpa_kernel(SDPBackend.MATH), user_frames(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield


class _Named(nn.Module):
    """Takes one dict of inputs, returns a tuple of tensors, and leaves the outputs' names in ``names``.

    Dims of one name are declared equal here rather than through ``Dim`` objects: a model may narrow the range (a position table, a
    slice), and that is to be reported, not refused.
    """

    def __init__(self, model: nn.Module, dynamic: Dynamic, names: dict[str, None]) -> None:
        super().__init__()
        self.captured, self.dynamic = model, dynamic
        self.note: Callable[[Iterable[str]], None] = lambda found: names.update(dict.fromkeys(found))

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        check: Any = torch._check  # untyped in torch
        first: dict[str, Any] = {}
        for name, dims in self.dynamic.items():
            for dim, symbol in dims.items():
                size = inputs[name].shape[dim]
                check(size == first.setdefault(symbol, size))
        try:
            result = self.captured(**inputs)
        except GuardOnDataDependentSymNode as error:
            raise ValueAsked from error
        named = name_outputs(result)
        if not named:
            raise CaptureError(
                f"the forward of {type(self.captured).__name__} returns no tensor but {type(result).__name__}",
                fix="return a tensor, a tuple of tensors, or a mapping of names to tensors",
            )
        self.note(named)
        return tuple(named.values())


def name_outputs(result: Any) -> dict[str, Tensor]:
    """A module's result as name -> tensor.

    A mapping or a dataclass keeps its names, a tuple gets ``output_0``, one tensor is ``output``; what lies deeper adds its own:
    ``hidden_states.0``. What is None is left out.

    Raises:
        CaptureError: something in it is no tensor, or two tensors have one name, or that of a tap.
    """
    if isinstance(result, Tensor):
        return {"output": result}
    named = dict[str, Tensor]()
    first = "output_" if isinstance(result, (tuple, list)) else ""
    for name, value in (leaf for key, part in _parts(result) or () for leaf in _leaves(f"{first}{key}", part)):
        if name in named:
            fix = "name them apart: what lies in a tuple or a mapping has its name behind a dot"
            raise CaptureError(f"the forward returns two tensors named {name}", fix=fix)
        if TAP.fullmatch(name):
            raise CaptureError(f"{name}, which the forward returns, is a tap's name", fix="name it otherwise")
        named[name] = value
    return named


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in part of a result, by name.

    Raises:
        CaptureError: something in it is no tensor.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif value is not None:
        parts = _parts(value)
        if parts is None:
            raise _no_tensor(name, value)
        for key, part in parts:
            yield from _leaves(f"{name}.{key}", part)


def _no_tensor(name: str, value: Any) -> CaptureError:
    return CaptureError(
        f"the forward returns {name}, which is no tensor but {type(value).__name__}",
        fix="switch it off (use_cache=False), or wrap the model in a module that returns the tensors you want",
    )


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, by name or number; None for anything else."""
    if isinstance(value, Mapping):
        return [(str(name), part) for name, part in value.items()]
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return [(str(i), part) for i, part in enumerate(value)] if isinstance(value, (tuple, list)) else None


def _shapes(inputs: Mapping[str, Tensor], dynamic: Dynamic, ranges: Ranges) -> dict[str, dict[int, Any]]:
    unknown = set(dynamic) - set(inputs)
    if unknown:
        raise CaptureError(
            f"dynamic dims name inputs that were not given: {', '.join(sorted(unknown))}", fix=f"inputs are {', '.join(inputs)}"
        )
    names = _named_sizes(inputs, dynamic)
    first = {dims[0] for dims in dynamic.values() if 0 in dims}
    bounds = {name: ranges.get(name, (1 if name in first else 2, LONGEST)) for name in names}
    known = {name: Dim.DYNAMIC(min=low, max=high) for name, (low, high) in bounds.items()}
    return {name: {d: known[n] for d, n in dynamic.get(name, {}).items()} for name in inputs}


def _named_sizes(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, int]:
    """Dim name -> its size in the example, which must be the same wherever the name stands."""
    sizes: dict[str, int] = {}
    for name, dim, symbol in ((name, dim, symbol) for name, dims in dynamic.items() for dim, symbol in dims.items()):
        shape = list(inputs[name].shape)
        if not -len(shape) <= dim < len(shape):
            raise CaptureError(f"{name} has no dim {dim} to call {symbol}", fix=f"its shape is {shape}: count dims from 0")
        if sizes.setdefault(symbol, shape[dim]) != shape[dim]:
            raise CaptureError(
                f"dim {symbol} is {sizes[symbol]} in the inputs before {name}, and {shape[dim]} there",
                fix="give the dims of one name one size, or name them apart",
            )
    return sizes


@contextmanager
def _from_one(shapes: Mapping[str, Mapping[int, Any]]) -> Iterator[None]:
    """Torch takes every dynamic size for 2 or more while it traces, unless told that 1 must do as well: a batch may be one sample."""
    one = any(dim.min == 1 for dims in shapes.values() for dim in dims.values())
    settings: Any = torch.fx.experimental._config
    with settings.patch(backed_size_oblivious=True) if one else nullcontext():
        yield


def _adopt(exported: ExportedProgram, inputs: dict[str, Tensor], dynamic: Dynamic, names: tuple[str, ...] = ()) -> Program:
    with tracing():
        exported = exported.run_decompositions(_table(exported))
    signature = exported.graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        state = [name.removeprefix("captured.") for name in signature.buffers_to_mutate.values()]
        state += [f"its input {name.removeprefix('inputs_')}" for name in signature.user_inputs_to_mutate.values()]
        node = next(node for node in exported.graph.nodes if node.name in changed)
        raise NotDeterministic(
            f"the model changes its own state while it runs: {', '.join(state)}", where=where_of(node), during="capture",
            fix="write y = x + 1 instead of x.add_(1), and keep state that changes out of forward",
        )  # fmt: skip
    users = [s for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    specs = tuple(_spec(name, value, dynamic.get(name, {})) for name, value in inputs.items())
    if len(users) != len(specs):
        raise CaptureError(
            f"the program takes {len(users)} inputs, the example gives {len(specs)}", fix="pass one example tensor per input"
        )
    outputs = names or tuple(f"output_{i}" for i in range(len(signature.output_specs)))
    return _tensors(Program(exported, Stage.CAPTURED, specs, outputs, dims=_ranges(exported, users, specs)))


def _tensors(program: Program) -> Program:
    """A program without the outputs that are None.

    Raises:
        CaptureError: one is no tensor.
    """
    results: Any = program.graph.output_node().args[0]
    if all(isinstance(result, fx.Node) for result in results):
        return program
    there = [(i, name) for i, name in enumerate(program.output_names) if results[i] is not None]
    for i, name in there:
        if not isinstance(results[i], fx.Node):
            raise _no_tensor(name, results[i])
    draft = program.draft()
    copied: Any = draft.graph.output_node().args[0]
    draft.graph.output_node().args = (tuple(copied[i] for i, _ in there),)
    return program.adopt(draft, refresh=False, output_names=tuple(name for _, name in there))


def _table(exported: ExportedProgram) -> dict[OpOverload, Callable[..., Any]]:
    """Torch's own decompositions of the compound ops; empty, and quickly so, for a program without one."""
    if not any(node.target in COMPOUND for node in exported.graph.nodes):
        return {}
    known: Any = torch.export.default_decompositions()
    return {op: known[op] if op in known else decomposition_table[op] for op in COMPOUND}


def _ranges(exported: ExportedProgram, users: Sequence[InputSpec], specs: Sequence[TensorSpec]) -> dict[str, tuple[int, int]]:
    """Dynamic dim name -> least and greatest size that the traced program takes; a model may have narrowed it."""
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    found: dict[str, tuple[int, int]] = {}
    for user, spec in zip(users, specs, strict=True):
        for size, name in zip(values[user.arg.name].shape, spec.shape, strict=True):
            if isinstance(name, str) and isinstance(size, torch.SymInt):
                bounds = exported.range_constraints.get(size.node.expr)
                if bounds is None:
                    raise CaptureError(f"dim {name} has the derived size {size}", fix="make the dim's size an input of its own")
                upper = int(bounds.upper) if bounds.upper < LONGEST else LONGEST
                found[name] = (int(bounds.lower), upper)
    return found


def _spec(name: str, value: Tensor, dims: Mapping[int, str]) -> TensorSpec:
    return TensorSpec(
        name, str(value.dtype).removeprefix("torch."), tuple(dims.get(d, int(s)) for d, s in enumerate(value.shape))
    )
