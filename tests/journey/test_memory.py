"""Source pruning: an encoder leaves its decoder the living rows and their mask, and the decoder says what it says of the masked source."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile.models.library import transformers
from tpcompile.ops import MEMORY
from tpcompile.program import Program

SIZES = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 2,
}  # fmt: skip
LENGTHS = (5, 12, 23)


class Encoder(nn.Module):
    """A library's encoder; its output becomes a dict."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state}


@pytest.fixture(scope="module")
def marian() -> Any:
    library = transformers()
    torch.manual_seed(0)
    model = library.MarianMTModel(library.MarianConfig(**SIZES)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
    return model


def source(length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def masked(marian: Any) -> Program:
    dynamic = {name: {1: "source"} for name in source(8)}
    return tpcompile.impose(Encoder(marian.model.encoder), source(8), dynamic=dynamic, threshold=0.9, memory=True)


def decoded(marian: Any, rows: Tensor, alive: Tensor) -> Tensor:
    """Logits of a decoder over some target; rows that are not alive are masked in its cross-attention."""
    target = torch.tensor([[2, 7, 19, 33, 8]])
    states = marian.model.decoder(
        input_ids=target, encoder_hidden_states=rows, encoder_attention_mask=alive.to(torch.int64)
    ).last_hidden_state
    logits: Tensor = marian.lm_head(states)
    return logits


@torch.no_grad()
def test_a_decoder_reads_the_shorter_memory_as_the_masked_source(marian: Any, masked: Program, tmp_path: Path) -> None:
    bundle = tpcompile.export(masked, out=tmp_path / "out", dims={"source": (2, 8, 64)})  # as long as its table of positions
    (memory,) = masked.graph.find_nodes(op="call_function", target=MEMORY)
    rows, keep = (node.name for node in memory.args)
    lengths = set()
    with tpcompile.load(bundle.path) as engine:
        for length in LENGTHS:
            given = source(length)
            full = masked.values([rows, keep], **given)
            want = decoded(marian, full[rows], full[keep])
            outputs = engine(**{name: value.numpy() for name, value in given.items()})
            short = torch.from_numpy(outputs["last_hidden_state"])
            got = decoded(marian, short, torch.from_numpy(outputs["memory_mask"]))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))
            assert short.shape[1] == max(2, int(full[keep].sum()))
            lengths.add(length - short.shape[1])
    assert min(lengths) > 0, "nothing was dropped"
    assert tpcompile.validate(bundle.path).verdict == "PASSED"
