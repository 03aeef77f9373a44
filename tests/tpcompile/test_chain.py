"""The chain: its gathers are the program's own ops, in numpy; a manifest whose stages do not fit is refused."""

from collections.abc import Mapping
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tpcompile import ops
from tpcompile.backends.base import Session
from tpcompile.chain import GATHERS, ChainSession, open_chain
from tpcompile.errors import BuildFailed, IntegrityError, UsageError
from tpcompile.manifest import STEPS, Manifest, ModelInfo, StageInfo, StepInfo, TensorInfo

GATE = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def test_a_manifest_knows_the_ops_that_are_computed() -> None:
    assert STEPS.keys() == GATHERS.keys() == set(get_args(StepInfo.model_fields["op"].annotation))


def step(op: Any, *numbers: int, reads: tuple[str, ...] = ("a",), gives: str = "b") -> StepInfo:
    return StepInfo(op=op, reads=reads, gives=gives, numbers=numbers)


@given(
    batch=st.integers(1, 3),
    shared=st.booleans(),
    dims=st.permutations(range(4)),
    seed=st.integers(0, 99),
    count=st.integers(1, 6),
)
@GATE
def test_take_is_the_op(batch: int, shared: bool, dims: list[int], seed: int, count: int) -> None:
    """Any layout of samples and tokens, what all samples share, and one sample."""
    rng = np.random.default_rng(seed)
    sizes = {dims[0]: 1 if shared else batch, dims[1]: 5, dims[2]: 2, dims[3]: 3}
    x = rng.standard_normal([sizes[d] for d in range(4)]).astype(np.float32)
    index = rng.integers(0, 5, (batch, count))
    got = GATHERS["take"](dims[:2], x, index)
    want = ops.take(torch.from_numpy(x), torch.from_numpy(index), dims[0], dims[1])
    np.testing.assert_array_equal(got, want.numpy())
    assert got.flags.c_contiguous


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3),
    prefix=st.integers(0, 2),
    ladder=st.sampled_from([(), (3,), (2, 5)]),
)
@GATE
def test_store_is_the_site(rows: list[list[bool]], prefix: int, ladder: tuple[int, ...]) -> None:
    keep = np.array(rows)
    pinned = np.broadcast_to(np.arange(7) < prefix, keep.shape)
    _, _, want = ops.compact(torch.zeros(*keep.shape, 1), torch.from_numpy(keep), torch.from_numpy(pinned.copy()), None, ladder)
    np.testing.assert_array_equal(GATHERS["store"]((0, *ladder), keep, pinned), want.numpy())


def test_store_of_a_constant_count() -> None:
    keep = np.array([[False, True, False, True]])
    assert GATHERS["store"]((3,), keep, np.array([[True, False, False, False]])).tolist() == [[0, 1, 3]]


def test_positions_are_brought_into_form() -> None:
    index = np.array([[4, 2]])
    assert GATHERS["row"]((0, 0), index).tolist() == [4, 2]
    assert GATHERS["reshape"]((-1,), index).tolist() == [4, 2]
    assert GATHERS["unsqueeze"]((0,), index[0]).tolist() == [[4, 2]]
    x = np.arange(10).reshape(2, 5)
    assert GATHERS["gather"]((1,), x, index[0]).tolist() == [[4, 2], [9, 7]]


class Stage(Session):
    """Adds one to ``a`` and remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.closed = False

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen.append(list(feeds))
        return {f"{name}x": value + 1 for name, value in feeds.items()}

    def close(self) -> None:
        self.closed = True


def tensors(*names: str) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=name, dtype="float32", shape=(1, "n")) for name in names)


def manifest(*stages: StageInfo, outputs: tuple[str, ...] = ("cx",)) -> Manifest:
    model = ModelInfo(id="m", family="f", architecture="a", sha256="0" * 64)
    return Manifest(target="onnx", role="pruned", model=model, inputs=tensors("a"), outputs=tensors(*outputs), stages=stages)


def chain(*picks: StepInfo) -> tuple[StageInfo, ...]:
    return (
        StageInfo(inputs=tensors("a"), outputs=tensors("ax")),
        StageInfo(steps=picks, inputs=tensors("c"), outputs=tensors("cx")),
        StageInfo(steps=(step("row", 0, 0, reads=("cx",), gives="site0.index"),)),
    )


GOOD = chain(step("row", 0, 0, reads=("ax",), gives="c"))


def test_stages_run_in_order_and_give_outputs_and_taps() -> None:
    both = [Stage(), Stage()]
    with ChainSession(manifest(*GOOD, outputs=("cx", "a")), both) as session:
        a = np.array([[[1.0, 2.0]]])
        assert {name: value.tolist() for name, value in session.run({"a": a}).items()} == {"cx": [[3.0, 4.0]], "a": a.tolist()}
        tapped = session.tapped(("site0.index",)).run({"a": a})
        assert tapped["site0.index"].tolist() == [3.0, 4.0]
        assert both[1].seen == [["c"], ["c"]]
        with pytest.raises(UsageError, match=r"the chain has no value site9\.keep"):
            session.tapped(("site9.keep",))
    assert [one.closed for one in both] == [True, True]


@pytest.mark.parametrize(
    ("stages", "outputs", "message"),
    [
        (chain(step("gather", 1, reads=("ax", "p"), gives="c")), ("cx",), "stage 1 reads p, which nothing gives"),
        (chain(step("row", 0, 0, reads=("ax",), gives="d")), ("cx",), "stage 1 reads c, which nothing gives"),
        (GOOD, ("y", "cx"), "no stage gives y"),
    ],
)
def test_a_chain_that_does_not_fit_together_is_refused(
    stages: tuple[StageInfo, ...], outputs: tuple[str, ...], message: str
) -> None:
    with pytest.raises(IntegrityError) as caught:
        ChainSession(manifest(*stages, outputs=outputs), [Stage(), Stage()])
    assert str(caught.value) == f"{message}\n  fix     export the bundle again"


def test_what_was_opened_is_closed_when_a_stage_cannot_be() -> None:
    opened: list[Stage] = []

    def open_(number: int) -> Any:
        if number == 1:
            raise BuildFailed("no", fix="f")
        opened.append(Stage())
        return opened[-1]

    with pytest.raises(BuildFailed):
        open_chain(manifest(*GOOD), open_)
    assert [one.closed for one in opened] == [True]


def test_a_manifest_with_stages_reads_back() -> None:
    whole = manifest(*GOOD)
    assert Manifest.model_validate_json(whole.model_dump_json()) == whole
    assert whole.identity != manifest(GOOD[0], outputs=("ax",)).identity
