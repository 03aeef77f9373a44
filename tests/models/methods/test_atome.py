"""A-ToMe on both speech encoders: who merges, in which order frames stay, and that engines give what it gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile import models
from tpcompile.errors import UsageError
from tpcompile.models.library import transformers
from tpcompile.models.methods.atome import likeness


@pytest.fixture(scope="module")
def whisper() -> Any:
    library = transformers()
    torch.manual_seed(0)
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    inner = {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    config = library.WhisperConfig(
        vocab_size=40, num_mel_bins=8, d_model=16, max_source_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, **sides, **inner,
    )  # fmt: skip
    return library.WhisperModel(config).eval()


def test_pairs_are_neighbours_of_one_band() -> None:
    key = torch.randn(1, 2, 8, 4)
    band = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1]])
    pairs = likeness(key, band, prefix=1)
    means = nn.functional.normalize(key.mean(1), dim=-1)[0]
    assert pairs.shape == (1, 3)
    torch.testing.assert_close(pairs[0, 0], means[1] @ means[2])
    assert pairs[0, 1] == -torch.inf
    torch.testing.assert_close(pairs[0, 2], means[5] @ means[6])


@torch.no_grad()
def test_frames_merge_into_their_mean_and_stay_in_order(tiny_ast: nn.Module) -> None:
    pruned = models.prune(tiny_ast, "atome", blocks=[0, 2], ratio=0.25)
    spectrogram = torch.randn(1, 40, 16)
    program = tpcompile.lower(pruned, {"input_values": spectrogram})
    assert program.gathered
    trace = program.trace(input_values=spectrogram)
    assert [keep.shape[1] - int(keep.sum()) for keep in trace.keep] == [3, 2]
    for index, into in zip(trace.index, trace.into, strict=True):
        assert index is not None
        assert into is not None
        assert bool((index.diff(dim=1) > 0).all())
        moved = torch.arange(into.shape[1]) - into[0]
        assert moved.max() == 1
        assert not moved[:2].any()
    torch.testing.assert_close(trace.outputs["logits"], pruned(spectrogram)["logits"], rtol=0, atol=1e-5)
    weight = pruned.body(*pruned.parts.embed({"input_values": spectrogram}))[-1].weight
    assert weight is not None
    assert float(weight.sum()) == 14


@torch.no_grad()
def test_whispers_decoder_reads_a_shorter_memory(whisper: Any, tmp_path: Path) -> None:
    pruned = models.prune(whisper.encoder, "atome", blocks=[0, 1], ratio=0.25)
    sound = torch.randn(1, 8, 40)
    bundle = tpcompile.export(pruned, {"input_features": sound}, tmp_path / "out")
    with tpcompile.load(bundle.path) as engine:
        outputs = engine(input_features=sound.numpy())
    memory = torch.from_numpy(outputs["last_hidden_state"])
    assert memory.shape == (1, 12, 16)
    assert outputs["memory_mask"].all()
    torch.testing.assert_close(memory, pruned(sound)["last_hidden_state"], rtol=0, atol=1e-5)
    ids = torch.tensor([[1, 5, 9]])
    assert whisper.decoder(input_ids=ids, encoder_hidden_states=memory).last_hidden_state.shape == (1, 3, 16)
    assert tpcompile.validate(bundle.path).verdict == "PASSED"


@torch.no_grad()
def test_the_parts_are_those_of_the_library(tiny_ast: nn.Module, whisper: Any) -> None:
    spectrogram, sound = torch.randn(2, 40, 16), torch.randn(2, 8, 40)
    off: list[float] = [0.0] * 3
    torch.testing.assert_close(models.prune(tiny_ast, "ltp", thresholds=off)(spectrogram)["logits"], tiny_ast(spectrogram).logits)
    plain = models.prune(whisper.encoder, "ltp", thresholds=off[:2])(sound)["last_hidden_state"]
    torch.testing.assert_close(plain, whisper.encoder(sound).last_hidden_state)


def test_a_model_without_time_is_refused() -> None:
    library = transformers()
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    bert: Tensor | Any = library.BertForSequenceClassification(library.BertConfig(**sizes, vocab_size=30)).eval()
    with pytest.raises(UsageError, match="atome merges neighbours in time, and BertForSequenceClassification takes input_ids"):
        models.prune(bert, "atome", blocks=[0], ratio=0.2)
