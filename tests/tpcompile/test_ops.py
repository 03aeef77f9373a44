import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tpcompile import ops


def bools(*rows: str) -> Tensor:
    """``bools("x.x")``: True where there is an x."""
    return torch.tensor([[c == "x" for c in row] for row in rows])


def test_prune_is_the_identity_on_its_own_memory() -> None:
    x = torch.randn(2, 5, 3)
    y = ops.prune(x, bools("x.x.x", "....."), torch.randn(2, 5))
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()


def test_compact_stores_kept_rows_in_order() -> None:
    x = torch.arange(5.0).reshape(1, 5, 1)
    rows, alive, index = ops.compact(x, bools(".x.xx"), bools("....."))
    assert rows.flatten().tolist() == [1.0, 3.0, 4.0]
    assert alive.tolist() == [[True] * 3]
    assert index.tolist() == [[1, 3, 4]]
    assert (rows.dtype, alive.dtype, index.dtype) == (torch.float32, torch.bool, torch.int64)


def test_a_pinned_row_is_stored_though_dropped() -> None:
    _, alive, index = ops.compact(torch.randn(1, 5, 2), bools(".x.xx"), bools("x...."))
    assert index.tolist() == [[0, 1, 3, 4]]
    assert alive.tolist() == [[False, True, True, True]]


def test_free_slots_hold_dropped_rows_of_the_same_sample() -> None:
    x = torch.arange(8.0).reshape(2, 4, 1)
    rows, alive, index = ops.compact(x, bools("x.x.", "...x"), bools("x...", "x..."))
    assert index.tolist() == [[0, 2], [0, 3]]
    assert alive.tolist() == [[True, True], [False, True]]
    rows, alive, index = ops.compact(x, bools("xxx.", "...x"), bools("....", "...."))
    assert index.tolist() == [[0, 1, 2], [3, 0, 1]]
    assert rows[1].flatten().tolist() == [7.0, 4.0, 5.0]
    assert alive.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(("length", "count"), [(4, ops.MIN_COUNT), (1, 1)])
def test_at_least_two_rows_are_stored(length: int, count: int) -> None:
    nothing = torch.zeros(1, length, dtype=torch.bool)
    rows, alive, index = ops.compact(torch.randn(1, length, 3), nothing, nothing)
    assert rows.shape == (1, count, 3)
    assert not alive.any()
    assert index.tolist() == [list(range(count))]


def test_a_memory_is_the_living_rows_and_zeros() -> None:
    x = torch.arange(1.0, 9.0).reshape(2, 4, 1)
    rows, alive = ops.memory(x, bools("x.x.", "...x"))
    assert rows.flatten(1).tolist() == [[1.0, 3.0], [8.0, 0.0]]
    assert alive.tolist() == [[True, True], [True, False]]


class Gather(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, alive, index = ops.compact(x, keep, torch.zeros_like(keep))
        return rows * 2, alive, index


def test_the_fake_kernels_agree_with_the_real_ones() -> None:
    x, keep = torch.randn(1, 6, 3), bools("xx.x.x")
    torch.library.opcheck(ops.PRUNE, (x, keep), test_utils=("test_schema", "test_faketensor"))
    exported = torch.export.export(Gather(), (x, keep), dynamic_shapes=({1: Dim.AUTO}, {1: Dim.AUTO}), strict=False)
    (node,) = exported.graph.find_nodes(op="call_function", target=ops.COMPACT)
    rows, alive, index = node.meta["val"]
    assert [t.dtype for t in (rows, alive, index)] == [torch.float32, torch.bool, torch.int64]
    assert rows.shape[1] is not x.shape[1]
    real = exported.module()(x, keep)
    assert [list(t.shape) for t in real] == [[1, 4, 3], [1, 4], [1, 4]]


def test_a_ladder_fills_up_with_dropped_rows_of_the_same_sample() -> None:
    x = torch.arange(12.0).reshape(2, 6, 1)
    keep, nothing = bools(".x.x..", "xxx..."), bools("......")
    rows, alive, index = ops.compact(x, keep, nothing, None, [4])
    assert index.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert alive.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert rows.flatten().tolist() == [1.0, 3.0, 0.0, 2.0, 6.0, 7.0, 8.0, 9.0]
    assert ops.compact(x, keep, nothing, None, [2, 5])[2].shape == (2, 5)
    assert ops.compact(x, keep, nothing, None, [16])[2].shape == (2, 6)  # never more than there are


def test_a_constant_count_is_stored_whatever_is_kept() -> None:
    keep = bools("xx..", "x...")
    assert ops.compact(torch.randn(2, 4, 2), keep, bools("x..."), None, None, 3)[2].tolist() == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(ValueError, match="3 rows do not fit into 2"):
        ops.compact(torch.randn(1, 4, 2), bools("xx.x"), bools("x..."), None, None, 2)


def test_what_fits_has_the_highest_scores() -> None:
    keep, score = bools("xxxx", "x..x", ".xxx"), torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.0, 0.8], [9.0, 0.2, 0.2, 0.2]])
    fits = ops.fit(keep, bools("x..."), score, 3)
    assert torch.equal(fits, bools("xx.x", "x..x", ".xx."))  # position 0 takes room whatever its score, and kept or not
    assert torch.equal(ops.fit(keep, bools("x..."), score, 4), keep)
    assert torch.equal(ops.fit(keep, bools("...."), None, 2), bools("xx..", "x..x", ".xx."))  # no score: the last are lost


class Constant(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return ops.compact(x, keep, torch.zeros_like(keep), None, None, 4)[0] * 2


@pytest.mark.parametrize(("length", "count"), [(6, 4), (3, 3)])
def test_a_constant_count_of_fixed_tokens_is_a_number(length: int, count: int) -> None:
    x, keep = torch.randn(1, length, 3), bools("xx.x.x"[:length])
    exported = torch.export.export(Constant(), (x, keep), strict=False)
    (node,) = exported.graph.find_nodes(op="call_function", target=ops.COMPACT)
    assert [type(size) for size in node.meta["val"][0].shape] == [int, int, int]
    assert exported.module()(x, keep).shape == (1, count, 3)
