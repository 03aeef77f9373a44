"""Batches whose samples keep counts of their own: gathered equals masked, and each sample equals its own run."""

from functools import cache

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.capture import capture
from tpcompile.errors import MarkError, RigidAxis, TokenMismatch, UnmaskedFold
from tpcompile.ops import PUT, TAKE
from tpcompile.passes import pipeline
from tpcompile.program import Program

HEADS, HEAD, LONGEST = 2, 4, 10
WIDTH = HEADS * HEAD
GATE = settings(max_examples=25, derandomize=True, deadline=None, database=None)


class Block(nn.Module):
    """Attention with a position bias and a rotation that all samples share, a site, a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, LONGEST, LONGEST))
        self.register_buffer("turn", torch.randn(LONGEST, HEAD))

    def forward(self, x: Tensor, alive: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, HEADS, HEAD).transpose(1, 2) for part in self.qkv)
        logits = (q * self.turn[:n]) @ k.transpose(-1, -2) + self.bias[:, :n, :n]
        weights = logits.masked_fill(~alive[:, None, None, :], -1e4).softmax(-1) * alive[:, None, :, None]
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, n, WIDTH))
        alive = alive & keep
        base = x
        x = ops.prune(x, alive)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)))), alive, base


class Model(nn.Module):
    """Two blocks with a skip connection over both; a pooled, a first-row and two token-level outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor, keep1: Tensor, keep2: Tensor) -> dict[str, Tensor]:
        skip = x
        x, alive1, base1 = self.first(x, mask, keep1)
        x, alive2, base2 = self.second(x, alive1, keep2)
        x = x + skip
        weight = alive2.unsqueeze(-1).to(x.dtype)
        last = ops.restore(ops.restore(x, alive2, base2), alive1, base1)
        return {
            "mean": (x * weight).sum(1) / weight.sum(1).clamp(min=1.0),
            "first": torch.tanh(x[:, 0]),
            "tokens": self.head(last),
            "zeros": ops.restore(x, alive2, torch.zeros_like(skip)),
        }


@cache
def lowered(form: str) -> tuple[Model, Program]:
    """The model and its gathered program: batch and length dynamic, or fixed at 4 and 8 (heads times two, and the width)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Model().eval()
        mask = torch.ones(4, 8, dtype=torch.bool)
        inputs = {"x": torch.randn(4, 8, WIDTH), "mask": mask, "keep1": mask, "keep2": mask}
        dynamic = {name: {0: "batch", 1: "n"} for name in inputs} if form == "dynamic" else {}
        captured = capture(model, inputs, dynamic, {"n": (2, LONGEST)})
    return model, pipeline("ragged")(captured)


def rows(length: int) -> st.SearchStrategy[list[bool]]:
    one = st.integers(0, length - 1).map(lambda i: [j == i for j in range(length)])
    named = st.sampled_from([[True] * length, [j == 0 for j in range(length)], [False] * length])
    return st.one_of(named, one, st.lists(st.booleans(), min_size=length, max_size=length))


Drawn = list[tuple[int, list[bool], list[bool]]]


def batch(sizes: st.SearchStrategy[int], lengths: st.SearchStrategy[int]) -> st.SearchStrategy[Drawn]:
    """Per sample its real length and what each site keeps."""

    def samples(n: int, size: int) -> st.SearchStrategy[Drawn]:
        return st.lists(st.tuples(st.integers(1, n), rows(n), rows(n)), min_size=size, max_size=size)

    return st.tuples(lengths, sizes).flatmap(lambda drawn: samples(*drawn))


def check(form: str, drawn: Drawn) -> None:
    model, program = lowered(form)
    n = len(drawn[0][1])
    inputs = {
        "x": torch.randn(len(drawn), n, WIDTH, generator=torch.Generator().manual_seed(len(drawn))),
        "mask": torch.tensor([[i < real for i in range(n)] for real, _, _ in drawn]),
        "keep1": torch.tensor([keep for _, keep, _ in drawn]),
        "keep2": torch.tensor([keep for _, _, keep in drawn]),
    }
    with torch.no_grad():
        want = model(**inputs)
    trace = program.trace(**inputs)
    for name, value in want.items():
        assert torch.isfinite(value).all()
        assert (trace.outputs[name] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), name
    alive = inputs["mask"]
    held = n
    for keep, index, drawn_keep in zip(trace.keep, trace.index, (inputs["keep1"], inputs["keep2"]), strict=True):
        alive = alive & drawn_keep
        assert index is not None
        assert keep.sum(1).tolist() == alive.sum(1).tolist()
        stored = alive.clone()
        stored[:, 0] = True
        held = min(held, max(2, int(stored.sum(1).max())))
        assert index.shape == (len(drawn), held)  # the batch's largest count
    if form != "dynamic":
        return
    for b, (real, _, _) in enumerate(drawn):  # batch 1, unpadded: what it gives does not depend on its neighbours
        own = program(**{name: value[b : b + 1, : max(real, 2)] for name, value in inputs.items()})
        for name in ("mean", "first"):
            assert (own[name][0] - trace.outputs[name][b]).abs().max() <= 1e-5 * max(1.0, own[name].abs().max().item()), name
        assert (own["tokens"][0] - trace.outputs["tokens"][b, : max(real, 2)]).abs().max() <= 1e-5


@given(drawn=batch(st.integers(1, 5), st.integers(2, LONGEST)))
@example(drawn=[(4, [True] * 4, [True] * 4), (4, [False] * 4, [False] * 4)])  # one unpruned, one that loses everything
@example(drawn=[(1, [True, False], [True, False])])
@example(drawn=[(5, [True, False, True, False, True], [True] * 5)] * 3)  # ties: equal counts need no filler
@GATE
def test_gathered_equals_masked(drawn: Drawn) -> None:
    check("dynamic", drawn)


@given(drawn=batch(st.just(4), st.just(8)))
@GATE
def test_sizes_that_coincide_are_told_apart(drawn: Drawn) -> None:
    """Batch 4 is the head size, 8 tokens are the width: nothing may be decided by a value."""
    check("fixed", drawn)


def test_gathers_are_per_sample() -> None:
    targets = [node.target for node in lowered("dynamic")[1].graph.nodes]
    assert targets.count(PUT) == 3
    assert TAKE in targets
    assert torch.ops.aten.index_select.default not in targets


def ragged(model: nn.Module, size: int = 3) -> Program:
    inputs = {"x": torch.randn(size, 6, 4), "keep": torch.ones(size, 6, dtype=torch.bool)}
    return pipeline("ragged")(capture(model.eval(), inputs, {name: {0: "batch", 1: "n"} for name in inputs}, {"n": (2, 64)}))


class AcrossSamples(nn.Module):
    """A sum over samples of what each pruned for itself."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep) * keep.unsqueeze(-1)
        return x.sum(0).sum(0)


class Union(nn.Module):
    """A mask that is true where any sample keeps the token hides nothing in the others."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep)
        return (x * keep.to(x.dtype).amax(0)[None, :, None]).sum(1)


class Neighbour(nn.Module):
    """Each sample under the mask of the next one."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        other = torch.cat([keep[1:], keep[:1]])
        return (ops.prune(x, keep) * other.unsqueeze(-1)).sum(1)


class Crossed(nn.Module):
    """Every sample under every sample's mask."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep)[:, None] * keep[None, :, :, None]).sum(2)


class Folded(nn.Module):
    """Batch and heads on one dim."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = ops.prune(x, keep) * keep.unsqueeze(-1)
        heads = x.view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2).reshape(-1, x.shape[1], 2)
        return heads.sum(1)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (AcrossSamples(), RigidAxis, "aten.sum.dim_IntList mixes samples of the batch, and each has its own t1"),
        (Union(), UnmaskedFold, "aten.sum.dim_IntList combines over tokens that site0"),
        (Neighbour(), UnmaskedFold, "aten.sum.dim_IntList combines over tokens that site0"),
        (Crossed(), RigidAxis, "aten.mul.Tensor mixes samples of the batch, and each has its own t1"),
        (Folded(), RigidAxis, "aten.reshape.default mixes samples of the batch, and each has its own t1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_samples_that_mix_are_refused(model: nn.Module, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        ragged(model)
    assert str(caught.value.message).startswith(message)  # type: ignore[attr-defined]


class Plain(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep) * keep.unsqueeze(-1)).sum(1)


class OneMask(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (ops.prune(x, keep[:1]) * keep[:1].unsqueeze(-1)).sum(1)


def test_the_policy_must_fit() -> None:
    batch_of_two = {"x": torch.randn(2, 6, 4), "keep": torch.ones(2, 6, dtype=torch.bool)}
    cases = [
        (Plain(), batch_of_two, "one", "a batch is pruned, each sample to a count of its own, and the batch policy is one"),
        (
            Plain(),
            {name: value[:1] for name, value in batch_of_two.items()},
            "ragged",
            "the batch policy is ragged, and the model was captured with a batch of 1",
        ),
        (OneMask(), batch_of_two, "ragged", "one keep mask prunes a whole batch"),
    ]
    for model, inputs, policy, message in cases:
        with pytest.raises(MarkError) as caught:
            pipeline(policy)(capture(model.eval(), inputs))
        assert caught.value.message == message


def test_equal_counts_need_no_filler() -> None:
    """A fixed number of tokens per sample (top-k by rank) stores exactly those, whatever the batch."""

    class TopThree(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            ahead = (x[..., 0][:, None, :] > x[..., 0][:, :, None]).sum(-1)
            top = (ahead < 3) & keep
            return (ops.prune(x, top) * top.unsqueeze(-1)).sum(1)

    inputs = {"x": torch.randn(5, 7, 4), "keep": torch.ones(5, 7, dtype=torch.bool)}
    inputs["x"][:, 0, 0] = 9.0
    program = pipeline("ragged")(capture(TopThree().eval(), inputs))
    trace = program.trace(**inputs)
    assert trace.index[0] is not None
    assert trace.index[0].shape == (5, 3)
    assert trace.keep[0].sum(1).tolist() == [3] * 5


class Table(nn.Module):
    """A position table longer than any sequence, added behind the site: plain, spread out by hand, and bent."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 80, 4))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = ops.prune(x, keep) + self.table[:, :n]
        y = y * torch.tanh(self.table[0, :n]) + self.table[:, :n].expand(b, n, 4)
        return (y * keep.unsqueeze(-1)).sum(1)


class Layouts(nn.Module):
    """One shared bias read by ``[B, C, N]`` and by ``[C, B, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 1, 80))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y, bias = ops.prune(x, keep), self.table[..., : x.shape[1]]
        one = ((y.transpose(1, 2) + bias) * keep[:, None]).sum(-1)
        two = ((y.permute(2, 0, 1) + bias) * keep[None]).sum(-1)
        return one + two.T


@pytest.mark.parametrize("model", [Table(), Layouts()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("size", [3, 4])
def test_tables_that_all_samples_share(model: nn.Module, size: int) -> None:
    program = ragged(model, size)
    for batch, length in [(1, 2), (3, 9), (4, 30)]:
        keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) > 0.5
        x = torch.randn(batch, length, 4)
        with torch.no_grad():
            torch.testing.assert_close(program(x=x, keep=keep)["output"], model(x=x, keep=keep), rtol=0, atol=1e-5)


class Weighted(nn.Module):
    """A vector over tokens on the left of a matmul: it has no dim that a batch could take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.weight @ (ops.prune(x, keep) * keep.unsqueeze(-1))


def test_a_vector_is_no_table() -> None:
    inputs = {"x": torch.randn(3, 6, 4), "keep": torch.ones(3, 6, dtype=torch.bool)}
    with pytest.raises(RigidAxis, match=r"aten\.matmul\.default reads tokens of a tensor without one batch dim"):
        pipeline("ragged")(capture(Weighted().eval(), inputs, {name: {0: "batch"} for name in inputs}))


class Segments(nn.Module):
    """A number is true whatever it is: that a token lived does not make its segment 1."""

    def forward(self, x: Tensor, keep: Tensor, seg: Tensor) -> Tensor:
        first = torch.logical_and(seg, keep)
        y = ops.prune(x, first)
        second = first & (y[..., 0] > 0)
        y = ops.prune(y, second)
        return (y * (1 - seg).unsqueeze(-1) * first.unsqueeze(-1)).sum(1)


class Map(nn.Module):
    """The channels are tokens too."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = ops.prune(x, keep) * keep.unsqueeze(-1)
        return (ops.prune(torch.tanh(y @ y.transpose(1, 2)), keep) * keep.unsqueeze(-1)).sum((1, 2))


@pytest.mark.parametrize("policy", ["one", "ragged"])
def test_what_looks_like_a_mask_or_like_channels(policy: str) -> None:
    size = 1 if policy == "one" else 3
    inputs = {"x": torch.randn(size, 6, 4), "keep": torch.ones(size, 6, dtype=torch.bool)}
    with pytest.raises(UnmaskedFold):
        pipeline(policy)(capture(Segments().eval(), {**inputs, "seg": torch.rand(size, 6)}))
    with pytest.raises(TokenMismatch, match="the channels of these rows are tokens as well"):
        pipeline(policy)(capture(Map().eval(), inputs))


class Base(nn.Module):
    """``restore`` with a base of another shape."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return ops.restore(ops.prune(x, keep), keep, x[:1])


def test_restore_takes_a_base_like_its_rows() -> None:
    with pytest.raises(MarkError) as caught:
        ragged(Base())
    assert caught.value.message.startswith("restore takes x [B, N, C], keep bool [B, N] and base like x; it got float32 [")
    assert caught.value.fix == "expand and cast the base to the hidden states' shape and dtype"
