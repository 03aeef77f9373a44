"""The IR's own ops in ONNX: what ``torch.onnx`` is told to write for prune, rank, restore, compact, take, put; and stable sorts.

A graph that is to be cut into stages leaves the gathers to its host: there ``compact`` and ``take`` become ``Store`` and ``Take`` of a
domain of their own, which no runtime knows (``tpcompile.onnx.stages``).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript.onnx_types import BOOL, FLOAT, INT64
from onnxscript.values import Op, Opset

from tpcompile.errors import StageError
from tpcompile.ops import COMPACT, FIT, GATHERED, MEMORY, PRUNE, PUT, RANK, RESTORE, TAKE
from tpcompile.program import Program
from tpcompile.rows import FAR, MIN_COUNT

op: Any = onnxscript.opset20  # its own types know no chains of calls

BOOLEAN, INTEGER, REAL = 9, 7, 1
"""ONNX's numbers for the dtypes."""
HOST = "tpcompile"
"""Domain of what the host computes between stages."""


def _prune(x: FLOAT, keep: BOOL, score: FLOAT | None = None) -> FLOAT:
    y: FLOAT = op.Identity(x)
    return y


def _gathered(
    rows: FLOAT, x: FLOAT, index: INT64, keep: BOOL | None = None, score: FLOAT | None = None, into: INT64 | None = None
) -> FLOAT:
    y: FLOAT = op.Identity(rows)
    return y


def _rank(score: FLOAT) -> INT64:
    """By comparing every two tokens: runtimes' sorts differ in what they make of equal scores."""
    own, other = op.Unsqueeze(score, op.Constant(value_ints=[2])), op.Unsqueeze(score, op.Constant(value_ints=[1]))
    places = _places(score)
    later, earlier = op.Unsqueeze(places, op.Constant(value_ints=[2])), op.Unsqueeze(places, op.Constant(value_ints=[1]))
    before = op.Or(op.Greater(other, own), op.And(op.Equal(other, own), op.Less(earlier, later)))
    y: INT64 = op.ReduceSum(op.Cast(before, to=INTEGER), op.Constant(value_ints=[2]), keepdims=0)
    return y


def _compact(x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None) -> tuple[FLOAT, BOOL, INT64]:
    """Batch 1: the stored positions in order; no slot is ever padded, so K may be 1."""
    flat: Any = op.Constant(value_ints=[-1])
    index = op.NonZero(op.Reshape(keep if keep is pinned else op.Or(keep, pinned), flat))
    positions = op.Squeeze(index, op.Constant(value_ints=[0]))
    return op.Gather(x, positions, axis=1), op.Gather(keep, positions, axis=1), index


def _compact_ragged(x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None) -> tuple[FLOAT, BOOL, INT64]:
    """Each sample's stored positions first, in order, then its dropped ones; cut at the batch's largest count."""
    return _fetch(x, keep, _first(op.Or(keep, pinned), lambda needed: needed))


def _memory(x: FLOAT, keep: BOOL) -> tuple[FLOAT, BOOL]:
    """Each sample's living rows first, in order, then zeros: at least two rows where there are as many."""
    least, length = op.Constant(value_ints=[MIN_COUNT]), op.Shape(x, start=1, end=2)
    rows, alive, _ = _fetch(x, keep, _first(keep, lambda needed: op.Min(op.Max(needed, least), length)))
    return op.Where(op.Unsqueeze(alive, op.Constant(value_ints=[-1])), rows, op.Constant(value_float=0.0)), alive


def _compact_bucketed(
    x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None, ladder: Sequence[int] = (), limit: int = 0
) -> tuple[FLOAT, BOOL, INT64]:
    """The same, cut at the rung that holds the count: ``Rows.rung`` in ONNX."""
    length = op.Shape(x, start=1, end=2)
    return _fetch(x, keep, _first(op.Or(keep, pinned), lambda needed: op.Min(_rung(needed, ladder), length)))


def _rung(needed: Any, ladder: Sequence[int]) -> Any:
    """The first size of the ladder that holds a count, and beyond the last a multiple of it; ``[1]`` each."""
    last = op.Constant(value_ints=[ladder[-1]])
    beyond = (needed + op.Constant(value_ints=[ladder[-1] - 1])) / last * last
    if len(ladder) == 1:
        return beyond
    rungs = op.Constant(value_ints=list(ladder))
    first = op.ReduceMin(op.Where(rungs >= needed, rungs, last), op.Constant(value_ints=[0]), keepdims=1)
    return op.Where(needed > last, beyond, first)


def _compact_static(
    x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None, ladder: Sequence[int] | None = None, limit: int = 0
) -> tuple[FLOAT, BOOL, INT64]:
    """The same, cut at a constant: of a fixed number of tokens, a fixed shape."""
    shape: Any = x.shape
    tokens = shape[1]
    count = op.Constant(value_ints=[min(limit, tokens) if isinstance(tokens, int) else limit])
    least = count if isinstance(tokens, int) else op.Min(count, op.Shape(x, start=1, end=2))
    return _fetch(x, keep, _ranked(op.Or(keep, pinned), least))


def _fit(keep: BOOL, pinned: BOOL, score: FLOAT | None, limit: int) -> BOOL:
    """Each token's rank by two sorts: pinned, kept by falling score, dropped. ``tpcompile.rows.fit`` in ONNX."""
    length = op.Shape(keep, start=1, end=2)
    rank = op.Cast(score, to=REAL) if score is not None else op.Neg(op.Cast(_places(keep), to=REAL))
    known = op.Clip(rank, op.Constant(value_float=-FAR / 2), op.Constant(value_float=FAR / 2))
    high, low = op.Constant(value_float=FAR), op.Constant(value_float=-FAR)
    _, order = op.TopK(op.Where(pinned, high, op.Where(keep, known, low)), length, axis=1, largest=1, sorted=1)
    _, ranks = op.TopK(order, length, axis=1, largest=0, sorted=1)
    y: BOOL = op.And(keep, ranks < op.Constant(value_int=limit))
    return y


def _first(stored: Any, count: Callable[[Any], Any]) -> Any:
    """Positions ``[B, K]``: stored ones in order, then the others in order; K from the largest number of stored ones, ``[1]``.

    ``TopK`` puts the lower position first where values are equal: nothing else is needed, and where shapes cost every node counts.
    """
    stored = op.Cast(stored, to=INTEGER)
    counts = op.ReduceSum(stored, op.Constant(value_ints=[1]), keepdims=0)
    _, index = op.TopK(stored, count(op.ReduceMax(counts, op.Constant(value_ints=[0]), keepdims=1)), axis=1, largest=1, sorted=1)
    return index


def _ranked(stored: Any, count: Any) -> Any:
    """The same, of a constant count, by ranks that are all different: TensorRT says nothing of equal values."""
    one = op.Constant(value_ints=[1])
    last: Any = op.Constant(value_int=1)
    stored = op.Cast(stored, to=INTEGER)
    front = op.CumSum(stored, last) - one
    back = op.ReduceSum(stored, one, keepdims=1) + op.CumSum(one - stored, last) - one
    _, index = op.TopK(op.Where(op.Cast(stored, to=BOOLEAN), front, back), count, axis=1, largest=0, sorted=1)
    return index


def _places(like: Any) -> Any:
    """``0, 1, 2, ...`` in every row of ``[B, N]``."""
    one = op.Constant(value_ints=[1])
    return op.CumSum(op.Expand(one, op.Shape(like)), op.Constant(value_int=1)) - one


def _fetch(x: Any, keep: Any, index: Any) -> tuple[FLOAT, BOOL, INT64]:
    if x.shape[0] == 1:
        positions = op.Reshape(index, op.Constant(value_ints=[-1]))
        return op.Gather(x, positions, axis=1), op.Gather(keep, positions, axis=1), index
    return _rows(x, index), op.GatherElements(keep, index, axis=1), index


def _take(x: FLOAT, index: INT64, batch: int, dim: int) -> FLOAT:
    """Whole rows where samples come first; else elements, the positions spread over the other dims."""
    shape: Any = x.shape  # an IR value while tracing
    if (batch, dim) == (0, 1) and shape[0] != 1 and all(isinstance(size, int) for size in shape[2:]):
        return _rows(x, index)
    others = [d for d in range(len(shape)) if d not in (batch, dim)]
    index = op.Transpose(index, perm=[1, 0]) if batch > dim else index
    spread = op.Unsqueeze(index, op.Constant(value_ints=others)) if others else index
    positions = op.Expand(spread, _sizes(len(shape), op.Shape(x), dim))
    y: FLOAT = op.GatherElements(op.Expand(x, _sizes(len(shape), op.Shape(positions), dim)), positions, axis=dim)
    return y


def _sizes(rank: int, sizes: Any, dim: int) -> Any:
    """Sizes with a 1 at ``dim``: what ``Expand`` leaves as it is there."""
    there = op.Cast(op.Constant(value_ints=[int(d == dim) for d in range(rank)]), to=BOOLEAN)
    y: FLOAT = op.Where(there, op.Constant(value_ints=[1]), sizes)
    return y


def _rows(x: FLOAT, index: INT64) -> FLOAT:
    """Rows ``[B, K, ...]`` of ``[B, N, ...]`` by one Gather from all samples' rows laid end to end."""
    shape: Any = x.shape
    samples = op.Shape(x, start=0, end=1)
    tokens = op.Shape(x, start=1, end=2)
    last = op.Constant(value_int=0)
    first = (op.CumSum(op.Expand(op.Constant(value_ints=[1]), samples), last) - op.Constant(value_ints=[1])) * tokens
    flat = op.Reshape(x, op.Constant(value_ints=[-1, *shape[2:]]))
    rows: FLOAT = op.Gather(flat, index + op.Unsqueeze(first, op.Constant(value_ints=[1])), axis=0)
    return rows


def _restore(x: FLOAT, keep: BOOL, base: FLOAT) -> FLOAT:
    y: FLOAT = op.Where(op.Unsqueeze(keep, op.Constant(value_ints=[-1])), x, base)
    return y


def _put(base: FLOAT, rows: FLOAT, index: INT64, keep: BOOL) -> FLOAT:
    """Stored rows that are not kept are written back as ``base`` has them."""
    last = op.Constant(value_ints=[-1])
    new = op.Where(op.Unsqueeze(keep, last), rows, _rows(base, index))
    wide = op.Expand(op.Unsqueeze(index, last), op.Shape(new))
    y: FLOAT = op.ScatterElements(base, wide, new, axis=1)
    return y


def _sort(x: FLOAT, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[FLOAT, INT64]:
    """A stable sort: TopK of all puts the lower index first where values are equal."""
    shape: Any = x.shape
    axis = dim % len(shape)
    values, index = op.TopK(x, op.Shape(x, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1)
    return values, index


def _select(x: FLOAT, dim: int, index: int) -> FLOAT:
    """What stands at one position of a dim; of a dim of size 1 nothing is fetched."""
    shape: Any = x.shape
    y: FLOAT = op.Squeeze(x, op.Constant(value_ints=[dim])) if shape[dim] == 1 else op.Gather(x, index, axis=dim)
    return y


def _index_select(x: FLOAT, dim: int, index: INT64) -> FLOAT:
    """Positions ``[K]`` of a dim; one position without a dim of its own counts as one."""
    shape: Any = index.shape
    positions = index if len(shape) == 1 else op.Reshape(index, op.Constant(value_ints=[-1]))
    y: FLOAT = op.Gather(x, positions, axis=dim)
    return y


def _floordiv(a: INT64, b: INT64) -> INT64:
    """Sizes divided as Python does, towards minus infinity: ``-(-n // 2)`` is half of n, rounded up. ONNX's Div rounds towards zero."""
    y: INT64 = op.Div(op.Sub(a, op.Mod(a, b)), b)
    return y


def _host_op(name: str, reads: Mapping[str, str], gives: str, numbers: Mapping[str, OpSchema.AttrType]) -> Any:
    """An op that only the host knows: its operands with their types, its result's type, its attributes."""
    kinds = [("T", [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "double", "int32", "int64", "bool")], "")]
    schema = OpSchema(
        name, HOST, 1,
        inputs=[OpSchema.FormalParameter(operand, kind) for operand, kind in reads.items()],
        outputs=[OpSchema.FormalParameter("y", gives)],
        attributes=[OpSchema.Attribute(number, kind, required=True) for number, kind in numbers.items()],
        type_constraints=kinds if "T" in reads.values() else [],
    )  # fmt: skip
    return Op(Opset(HOST, 1), name, schema)


INT, INTS = OpSchema.AttrType.INT, OpSchema.AttrType.INTS
STORE = _host_op("Store", {"keep": "tensor(bool)", "pinned": "tensor(bool)"}, "tensor(int64)", {"rows": INTS})
FETCH = _host_op("Take", {"x": "T", "index": "tensor(int64)"}, "T", {"batch": INT, "dim": INT})


def _compact_hosted(
    x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None, ladder: Sequence[int] | None = None, limit: int = 0,
    exact: bool = False,
) -> tuple[FLOAT, BOOL, INT64]:
    if exact:
        raise StageError("a host stores two rows at least, and this program masks none of them", fix="cut one that is not so lowered")
    index = STORE(keep, pinned, rows=[limit, *(ladder or ())])
    return FETCH(x, index, batch=0, dim=1), FETCH(keep, index, batch=0, dim=1), index


def _take_hosted(x: FLOAT, index: INT64, batch: int, dim: int) -> FLOAT:
    y: FLOAT = FETCH(x, index, batch=batch, dim=dim)
    return y


def translations(program: Program, hosted: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the IR's own ops are written in ONNX: a site of one sample needs no order, unless it stores dropped rows.

    Args:
        program: what is written.
        hosted: leave sites and their gathers to the host.
    """
    ragged = any(program.node(site.keep).meta["val"].shape[0] != 1 for site in program.sites)
    free = _compact_ragged if ragged else _compact

    def compact(
        x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None, ladder: Sequence[int] | None = None, limit: int = 0,
        exact: bool = False,
    ) -> tuple[FLOAT, BOOL, INT64]:  # fmt: skip
        if limit:
            return _compact_static(x, keep, pinned, score, ladder, limit)
        return _compact_bucketed(x, keep, pinned, score, ladder, limit) if ladder else free(x, keep, pinned, score)

    own: dict[Callable[..., Any], Callable[..., Any]] = {
        GATHERED: _gathered,
        MEMORY: _memory,
        PRUNE: _prune,
        RANK: _rank,
        RESTORE: _restore,
        COMPACT: _compact_hosted if hosted else compact,
        FIT: _fit,
        TAKE: _take_hosted if hosted else _take,
        PUT: _put,
    }
    plain: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.sort.stable: _sort,
        torch.ops.aten.select.int: _select,
        torch.ops.aten.index_select.default: _index_select,
        operator.floordiv: _floordiv,
    }
    return {**own, **plain}
