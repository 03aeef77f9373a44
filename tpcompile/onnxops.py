"""The IR's own ops in ONNX: what ``torch.onnx`` is told to write for prune, restore, compact, take and put."""

from collections.abc import Callable
from typing import Any

import onnxscript
from onnxscript.onnx_types import BOOL, FLOAT, INT64

from tpcompile.ops import COMPACT, PRUNE, PUT, RESTORE, TAKE
from tpcompile.program import Program

op: Any = onnxscript.opset20  # its own types know no chains of calls

BOOLEAN, INTEGER = 9, 7
"""ONNX's numbers for the dtypes."""


def _prune(x: FLOAT, keep: BOOL, score: FLOAT | None = None) -> FLOAT:
    y: FLOAT = op.Identity(x)
    return y


def _compact(x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None) -> tuple[FLOAT, BOOL, INT64]:
    """Batch 1: the stored positions in order; no slot is ever padded, so K may be 1."""
    flat: Any = op.Constant(value_ints=[-1])
    index = op.NonZero(op.Reshape(op.Or(keep, pinned), flat))
    positions = op.Reshape(index, flat)
    return op.Gather(x, positions, axis=1), op.Gather(keep, positions, axis=1), index


def _compact_ragged(x: FLOAT, keep: BOOL, pinned: BOOL, score: FLOAT | None = None) -> tuple[FLOAT, BOOL, INT64]:
    """Each sample's stored positions first, in order, then its dropped ones; cut at the batch's largest count."""
    one = op.Constant(value_ints=[1])
    last: Any = op.Constant(value_int=1)
    stored = op.Cast(op.Or(keep, pinned), to=INTEGER)
    counts = op.ReduceSum(stored, one, keepdims=1)
    front = op.CumSum(stored, last) - one
    back = counts + op.CumSum(one - stored, last) - one
    rank = op.Where(op.Cast(stored, to=BOOLEAN), front, back)
    _, index = op.TopK(rank, op.ReduceMax(counts, keepdims=0, noop_with_empty_axes=0) * one, axis=1, largest=0, sorted=1)
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


def translations(program: Program) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the IR's own ops are written in ONNX: a site of one sample needs no order."""
    ragged = any(program.node(site.keep).meta["val"].shape[0] != 1 for site in program.sites)
    return {PRUNE: _prune, RESTORE: _restore, COMPACT: _compact_ragged if ragged else _compact, TAKE: _take, PUT: _put}
