"""Source pruning: an encoder leaves its decoder the living rows and their mask, and the decoder says what it says of the masked source."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile.backends import runnable
from tpcompile.build import Compiled, compile_subject, fill
from tpcompile.bundle import stage
from tpcompile.models.library import transformers
from tpcompile.ops import MEMORY
from tpcompile.plan import Wish
from tpcompile.program import Program
from tpcompile.subject import subject_of

TARGETS = runnable()
WORDS = {"vocab_size": 60, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
SIDES = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "MarianMTModel": SIDES,
    "BartForConditionalGeneration": {**SIDES, "bos_token_id": 3, "forced_eos_token_id": None},
    "T5ForConditionalGeneration": {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
"""Positions in a table that sines or learning made, and by their distance; the last one ends with a norm behind its blocks."""
LENGTHS = (5, 12, 23)
TARGET = torch.tensor([[2, 7, 19, 33, 8]])


class Encoder(nn.Module):
    """A library's encoder; its output becomes a dict."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    kind = getattr(transformers(), request.param)
    torch.manual_seed(0)
    made = kind(kind.config_class(**WORDS, **MODELS[request.param])).eval()
    for weight in made.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5)
    return made


def source(length: int) -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def imposed(model: Any, memory: bool) -> Program:
    dynamic = {name: {1: "source"} for name in source(8)}
    return tpcompile.impose(Encoder(model.get_encoder()), source(8), dynamic=dynamic, threshold=0.9, memory=memory)


@pytest.fixture(scope="module")
def masked(model: Any) -> Program:
    return imposed(model, memory=True)


@pytest.fixture(scope="module")
def compiled(masked: Program) -> Compiled:
    """One compilation serves every target."""
    return compile_subject(subject_of(masked, None, None, None, None))


@pytest.fixture(scope="module")
def full(model: Any) -> Program:
    """The same sites, and every row at the end."""
    return imposed(model, memory=False)


def living(masked: Program, given: dict[str, Tensor]) -> Tensor:
    """Bool ``[B, N]``: what no site drops."""
    (memory,) = masked.graph.find_nodes(op="call_function", target=MEMORY)
    keep = str(memory.args[1])
    return masked.values([keep], **given)[keep]


def read(model: Any, rows: Tensor, alive: Tensor) -> dict[str, Tensor]:
    """What a decoder reads: rows that are not alive are masked in its cross-attention."""
    return {"encoder_outputs": transformers().modeling_outputs.BaseModelOutput(rows), "attention_mask": alive.to(torch.int64)}


def said(model: Any, rows: Tensor, alive: Tensor) -> Tensor:
    """The tokens that a decoder writes, greedily."""
    ids: Tensor = model.generate(**read(model, rows, alive), do_sample=False, num_beams=1, min_new_tokens=6, max_new_tokens=6)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_reads_the_shorter_memory_as_the_masked_source(
    model: Any, masked: Program, full: Program, compiled: Compiled, target: str, tmp_path: Path
) -> None:
    with stage(tmp_path / "out") as folder:
        fill(folder, compiled, target, wish=Wish(dims={"source": (2, 8, 64)}))  # as long as its table
    lengths = set()
    with tpcompile.load(tmp_path / "out") as engine:
        for length in LENGTHS:
            given = source(length)
            rows, keep = full(**given)["last_hidden_state"], living(masked, given)
            outputs = engine(**{name: value.numpy() for name, value in given.items()})
            short, alive = (torch.from_numpy(outputs[name]) for name in ("last_hidden_state", "memory_mask"))
            want = model(**read(model, rows, keep), decoder_input_ids=TARGET).logits
            got = model(**read(model, short, alive), decoder_input_ids=TARGET).logits
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))
            assert torch.equal(said(model, short, alive), said(model, rows, keep))
            assert short.shape[1] == max(2, int(keep.sum()))
            lengths.add(length - short.shape[1])
    assert min(lengths) > 0, "nothing was dropped"
    if target == "onnx":
        assert tpcompile.validate(tmp_path / "out").verdict == "PASSED"


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "openvino" not in TARGETS:
        pytest.skip("the example exports for openvino, which does not run here")
    text = (Path(__file__).parents[2] / "docs/decoders.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    transformers()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("tensor([[0,")
