"""Dense models become masked ones: which tokens fall, where the sites are, what outputs hold; the cases of ``passes/impose.py``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompile import impose, lower
from tpcompile.errors import AxisError, MarkError, UsageError
from tpcompile.passes.padding import prove_padding
from tpcompile.program import Program

Toy = Callable[..., Program]
WIDTH, HEADS = 8, 2


class Block(nn.Module):
    """A block as libraries have it; ``joined``: attention and feed-forward side by side."""

    def __init__(self, joined: bool = False) -> None:
        super().__init__()
        self.joined, self.norm, self.qkv = joined, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        nn.init.normal_(self.qkv.weight, std=1.0)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return tuple(y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        y = x + F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)
        return y + self.mlp(x if self.joined else y)


class Encoder(nn.Module):
    def __init__(self, joined: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.norm = Block(joined), Block(joined), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.second(self.first(x)))
        return x, x.mean(1)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def states(length: int, seed: int = 0) -> Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_cases_1_to_6_tokens_of_little_attention_fall_and_come_back_as_they_were(encoder: Encoder) -> None:
    masked = impose(encoder, {"x": states(9)}, dynamic={"x": {1: "n"}}, threshold=0.9, prefix=2)
    compact = lower(masked)
    assert len(compact.sites) == 2
    for seed, length in enumerate((3, 9, 14, 30)):
        x = states(length, seed)
        q, k, v = encoder.first.heads(x)
        weights = (q @ k.mT * (WIDTH // HEADS) ** -0.5).softmax(-1)
        received = weights.mean(1).sum(1)
        keep = (received >= 0.9) | (torch.arange(length) < 2)
        y = x + (weights @ v).transpose(1, 2).flatten(2)
        want, got = masked(x=x), compact.trace(x=x)
        assert torch.equal(got.keep[0], keep)
        torch.testing.assert_close(want["output_0"][~keep], encoder.norm(y)[~keep])
        torch.testing.assert_close(want["output_1"], want["output_0"].mean(1))
        for name, value in want.items():
            torch.testing.assert_close(got.outputs[name], value, rtol=0, atol=1e-5)


def test_only_the_blocks_that_are_named_decide(encoder: Encoder) -> None:
    (site,) = lower(impose(encoder, {"x": states(9)}, blocks=(1,))).sites
    assert "second" in site.where.module
    with pytest.raises(UsageError, match=r"blocks names no attention: \[2\]"):
        impose(encoder, {"x": states(9)}, blocks=(0, 2))


@torch.no_grad()
def test_case_6_a_memory_holds_the_living_rows_and_says_which(encoder: Encoder) -> None:
    masked = impose(encoder, {"x": states(9)}, dynamic={"x": {1: "n"}}, threshold=0.9, memory=True)
    full = impose(encoder, {"x": states(9)}, dynamic={"x": {1: "n"}}, threshold=0.9)
    compact = lower(masked)
    for seed, length in enumerate((2, 9, 30)):
        x = states(length, seed)
        want, got = masked(x=x), compact.trace(x=x)
        (alive,) = want["memory_mask"]
        assert alive.shape == want["output_0"].shape[1:2]
        assert torch.equal(got.outputs["memory_mask"], want["memory_mask"])
        torch.testing.assert_close(got.outputs["output_0"], want["output_0"], rtol=0, atol=1e-5)
        torch.testing.assert_close(want["output_0"][0, alive], full(x=x)["output_0"][0, _living(full, x)], rtol=0, atol=1e-5)


class Watched(Encoder):
    """Every block's states as well, by tuple."""

    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]  # by name
        first = self.first(x)
        last = self.second(first)
        return {"last": self.norm(last), "states": (x, first, last)}


@torch.no_grad()
def test_case_6_hidden_states_on_the_way_have_dropped_tokens_as_they_were(encoder: Encoder) -> None:
    watched = Watched().eval()
    watched.load_state_dict(encoder.state_dict())
    options = {"dynamic": {"x": {1: "n"}}, "threshold": 0.9}
    masked, plain = impose(watched, {"x": states(9)}, **options), impose(encoder, {"x": states(9)}, **options)
    compact = lower(masked)
    for seed, length in enumerate((3, 9, 30)):
        x = states(length, seed)
        want, got = masked(x=x), compact.trace(x=x)
        assert set(want) == {"last", "states.0", "states.1", "states.2"}
        keep, block = got.keep[0], encoder.first
        q, k, v = block.heads(x)
        y = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(want["states.1"], torch.where(keep.unsqueeze(-1), block(x), y), rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.norm(want["states.2"]), plain(x=x)["output_0"], rtol=0, atol=1e-5)
        for name, value in want.items():
            torch.testing.assert_close(got.outputs[name], value, rtol=0, atol=1e-5)


def _living(masked: Program, x: Tensor) -> Tensor:
    """Bool ``[N]``: what no site of a masked program drops."""
    (last,) = list(masked.graph.find_nodes(op="call_function", target=torch.ops.tpcompile.prune.default))[-1:]
    keep = last.args[1].name
    return masked.values([keep], x=x)[keep][0]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh().mean(1)


class Across(nn.Module):
    """Queries of one sequence on another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).softmax(-1) @ y


class Side(nn.Module):
    """Attention whose input is read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(joined=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.block(x), x], -1)


def test_a_model_without_self_attention_is_refused() -> None:
    with pytest.raises(MarkError, match="no softmax of the model runs over keys that are the queries' own tokens"):
        impose(Mean().eval(), {"x": states(5)})
    with pytest.raises(MarkError, match="no softmax of the model runs over keys that are the queries' own tokens"):
        impose(Across().eval(), {"x": states(5), "y": states(7)}, dynamic={"x": {1: "n"}, "y": {1: "m"}})


def test_case_4_a_stream_that_goes_round_the_attention_is_refused() -> None:
    with pytest.raises(MarkError, match="behind none of the 1 attentions of the model everything goes through hidden states"):
        impose(Side().eval(), {"x": states(5)})


class Window(nn.Module):
    """Blocks under a mask that may hide every living key of a row, with attention that then gives 0."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        near = (places[:, None] - places).abs() <= 1
        for block in self.blocks:
            q, k, v = block.heads(x)
            seen = near & (attention_mask != 0)[:, None, None, :]
            y = x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
            x = y + block.mlp(y)
        return x


@torch.no_grad()
def test_a_row_that_sees_nothing_is_zero_in_both_forms() -> None:
    torch.manual_seed(0)
    given = {"x": states(9), "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    masked = impose(Window().eval(), given, dynamic={name: {1: "n"} for name in given}, threshold=0.9)
    compact = lower(masked)
    for seed, length in enumerate((4, 12, 25)):
        mask = (torch.arange(length) % 4 < 2).long().unsqueeze(0)
        inputs = {"x": states(length, seed), "attention_mask": mask}
        torch.testing.assert_close(compact(**inputs)["output"], masked(**inputs)["output"], rtol=0, atol=1e-5)


class Padded(nn.Module):
    """Blocks whose attention does not see padding; with ``scaled`` its values are multiplied by the mask as well."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.scaled, self.blocks = scaled, nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        alive = attention_mask != 0
        x = x * alive.unsqueeze(-1) if self.scaled else x
        for block in self.blocks:
            q, k, v = block.heads(x)
            y = x + F.scaled_dot_product_attention(q, k, v, attn_mask=alive[:, None, None, :]).transpose(1, 2).flatten(2)
            x = y + block.mlp(y)
        return x[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_cases_2_and_3_padding_is_no_query_and_no_token(scaled: bool) -> None:
    torch.manual_seed(0)
    given = {"x": states(9), "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    masked = impose(Padded(scaled).eval(), given, dynamic={name: {1: "n"} for name in given}, threshold=0.9)
    compact, same = lower(masked), True
    for seed, length in enumerate((4, 9, 25)):
        alone = {"x": states(length, seed), "attention_mask": torch.ones(1, length, dtype=torch.int64)}
        longer = {"x": torch.cat([alone["x"], states(7, 50)], 1), "attention_mask": F.pad(alone["attention_mask"], (0, 7))}
        short, long = compact.trace(**alone), compact.trace(**longer)
        torch.testing.assert_close(long.outputs["output"], masked(**longer)["output"], rtol=0, atol=1e-5)
        same &= torch.equal(long.keep[0], F.pad(short.keep[0], (0, 7)))
    assert same is not scaled, "a mask that reaches the values is left alone"
    if scaled:
        with pytest.raises(AxisError):
            prove_padding(masked)
    else:
        assert prove_padding(masked).mask == "attention_mask"
