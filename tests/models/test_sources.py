import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpcompile import models
from tpcompile.errors import ModelError, UsageError
from tpcompile.subject import subject_of

Tiny = Callable[..., Any]
Padded = tuple[Tensor, Tensor]


@pytest.fixture
def folder(tmp_path: Path, tiny: Tiny) -> Path:
    """A saved classifier."""
    return _save(tiny("bert", head=True), tmp_path)


def _save(model: Any, folder: Path, **config: Any) -> Path:
    model.config.architectures = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | config), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def _sentence(folder: Path, *kinds: str, **pooling: Any) -> Path:
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in zip(kinds, ("", "1_Pooling", "2"), strict=False)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
@torch.no_grad()
def test_classifier(name: str, tmp_path: Path, tiny: Tiny, padded: Padded) -> None:
    model = tiny(name, head=True)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    source = models.load(str(_save(model, tmp_path)))
    assert (source.family, source.architecture, source.imported) == ("bert", type(model).__name__, None)
    assert [asset.name for asset in source.assets] == ["config.json", "tokenizer.json"]
    assert not source.model.training
    expected = model(input_ids=padded[0], attention_mask=padded[1]).logits
    torch.testing.assert_close(source.model(*padded)["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("name", ["bert", "camembert", "distilbert"])
@torch.no_grad()
def test_heads_with_a_row_per_token(name: str, head: str, tmp_path: Path, tiny: Tiny, padded: Padded) -> None:
    model = tiny(name, head=head, num_labels=2)
    source = models.load(_save(model, tmp_path))
    assert source.architecture == type(model).__name__
    expected = model(input_ids=padded[0], attention_mask=padded[1])
    got = source.model(*padded)
    assert list(got) == (["logits"] if "Token" in head else ["start_logits", "end_logits"])
    torch.testing.assert_close(got, {key: expected[key] for key in got}, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["tokens", "none"])
@torch.no_grad()
def test_no_pooling_gives_a_vector_per_token(pooling: str, tmp_path: Path, tiny: Tiny, padded: Padded) -> None:
    encoder = tiny("bert")
    source = models.load(_save(encoder, tmp_path), pooling=pooling)
    expected = encoder(input_ids=padded[0], attention_mask=padded[1]).last_hidden_state
    torch.testing.assert_close(source.model(*padded), {"last_hidden_state": expected}, rtol=0, atol=1e-5)
    assert not [name for name in source.model.state_dict() if "pooler" in name]


def test_what_an_export_must_know(folder: Path) -> None:
    source = models.load(folder)
    assert {name: tuple(value.shape) for name, value in source.example.items()} == {
        "input_ids": (1, 16),
        "attention_mask": (1, 16),
    }
    assert source.dynamic == {"input_ids": {1: "seq"}, "attention_mask": {1: "seq"}}
    assert source.ranges == {"seq": (2, 40)}
    assert source.values == {"input_ids": (0, 59), "attention_mask": (0, 1)}
    assert (source.patches, source.documents, source.note) == (None, {}, "")


@pytest.mark.parametrize("batch", ["one", "ragged"])
def test_a_subject_of_text(batch: str, folder: Path) -> None:
    subject = subject_of(folder, None, None, "ltp", {"thresholds": [0.05] * 3}, batch=batch)
    ids, mask = subject.inputs["input_ids"], subject.inputs["attention_mask"]
    if batch == "one":
        assert (ids.shape, mask.shape) == ((1, 16), (1, 16))
        assert subject.dynamic == {"input_ids": {1: "seq"}, "attention_mask": {1: "seq"}}
        assert subject.ranges == {"seq": (2, 40)}
        return
    assert (ids.shape, mask.shape) == ((2, 16), (2, 16))
    assert not torch.equal(ids[0], ids[1])
    assert mask.sum(1).tolist() == [16, 12]
    assert mask[1, :12].all()
    assert subject.dynamic == {name: {0: "batch", 1: "seq"} for name in ("input_ids", "attention_mask")}
    assert subject.ranges == {"seq": (2, 40), "batch": (1, 512)}


@torch.no_grad()
def test_what_save_pretrained_writes_is_read(tmp_path: Path, tiny: Tiny, padded: Padded) -> None:
    model = tiny("distilbert", head=True)
    model.save_pretrained(tmp_path)
    expected = model(input_ids=padded[0], attention_mask=padded[1]).logits
    torch.testing.assert_close(models.load(tmp_path).model(*padded)["logits"], expected, rtol=0, atol=1e-5)


def test_bare_encoder_takes_its_pooler_or_the_mean(tmp_path: Path, tiny: Tiny, padded: Padded) -> None:
    _save(tiny("bert"), tmp_path)
    assert list(models.load(tmp_path).model(*padded)) == ["pooler_output"]
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "pooler" not in name}, tmp_path / "model.safetensors")
    source = models.load(tmp_path)
    assert list(source.model(*padded)) == ["sentence_embedding"]
    assert source.model.pooling.mode == "mean"
    assert not source.model.pooling.normalize


def test_explicit_pooling_drops_the_pooler(tmp_path: Path, tiny: Tiny) -> None:
    source = models.load(_save(tiny("bert"), tmp_path), pooling="cls")
    assert source.model.pooling.mode == "cls"
    assert not [name for name in source.model.state_dict() if "pooler" in name]


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {"pooling_mode": "mean"}]
)
@torch.no_grad()
def test_sentence_transformers_directory(pooling: dict[str, Any], tmp_path: Path, tiny: Tiny, padded: Padded) -> None:
    encoder = tiny("bert")
    _sentence(_save(encoder, tmp_path), "Transformer", "Pooling", "Normalize", **pooling)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 16}', encoding="utf-8")
    source = models.load(tmp_path)
    assert source.ranges == {"seq": (2, 16)}
    expected = models.SentenceEncoder(encoder, "mean", normalize=True)(*padded)
    torch.testing.assert_close(source.model(*padded), expected, rtol=0, atol=1e-6)


def test_other_modules_and_poolings_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    _sentence(_save(tiny("bert"), tmp_path), "Transformer", "Pooling", "Dense", pooling_mode="max")
    with pytest.raises(ModelError, match="asks for pooling max"):
        models.load(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}', encoding="utf-8")
    with pytest.raises(ModelError, match="names a Dense module"):
        models.load(tmp_path)


def test_a_module_outside_the_directory_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    _save(tiny("bert"), tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "x.Transformer", "path": "../.."}]', encoding="utf-8")
    with pytest.raises(ModelError, match="outside the directory"):
        models.load(tmp_path)


def test_weights_hash_ignores_the_file_format(folder: Path) -> None:
    first = models.load(folder).weights_sha256
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert models.load(folder).weights_sha256 == first


def test_shards_and_old_names_are_read(folder: Path) -> None:
    first = models.load(folder).weights_sha256
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {next((n.replace(a, b) for a, b in old.items() if n.endswith(a)), n): w for n, w in weights.items()}
    names = sorted(renamed)
    save_file({name: renamed[name] for name in names[::2]}, folder / "a.safetensors")
    save_file({name: renamed[name] for name in names[1::2]}, folder / "b.safetensors")
    table = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}), encoding="utf-8")
    assert models.load(folder).weights_sha256 == first


def test_half_precision_weights_become_float32(folder: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    assert {weight.dtype for weight in models.load(folder).model.state_dict().values()} == {torch.float32}


def test_random_state_and_verbosity_are_left_alone(folder: Path) -> None:
    from transformers import logging

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    before = logging.get_verbosity()
    models.load(folder)
    assert logging.get_verbosity() == before
    assert torch.equal(torch.rand(1), expected)


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.load(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "message", "fix"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "tpcompile does not download", "hf download sentence-transformers"),
        ("/no/such/dir", "no directory /no/such/dir", "save_pretrained"),
    ],
)
def test_missing_directory(source: str, message: str, fix: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        models.load(source)
    assert fix in caught.value.fix


def test_file_and_unknown_pooling_are_usage_errors(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        models.load(folder / "config.json")
    with pytest.raises(UsageError, match="unknown pooling 'max'"):
        models.load(folder, pooling="max")
    with pytest.raises(UsageError, match="pooling 'mean' has no place"):
        models.load(folder, pooling="mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": 5}, "is not a list of class names"),
        ({"model_type": "gpt2"}, "no family knows model_type 'gpt2'"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "never run"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM has no head that tpcompile knows"),
        ({"num_attention_heads": 5}, "does not describe a BertForSequenceClassification"),
        ({"intermediate_size": 41}, r"has shape \[40\], config.json asks for \[41\]"),
        ({"num_hidden_layers": 4}, r"weights are missing for bert.encoder.layer.3.*and 13 more"),
        ({"num_hidden_layers": 2}, "weights without a place in BertForSequenceClassification"),
    ],
)
def test_wrong_config(change: dict[str, Any], message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=message) as caught:
        models.load(folder)
    assert caught.value.fix


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff"])
def test_corrupt_config(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        models.load(folder)


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights in"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        models.load(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -4])
def test_truncated_weights(size: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="truncated or corrupt"):
        models.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"weight bert\.encoder\.layer\.1\.output\.dense\.weight holds 1 NaN or infinite"):
        models.load(folder)


def test_missing_head_is_not_filled_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "classifier" not in name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights are missing for classifier\.weight, classifier\.bias"):
        models.load(folder)


class _Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("unpickled",))


def test_pickles_run_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    for write in (
        lambda: torch.save({"a": _Boom()}, path),
        lambda: path.write_bytes(pickle.dumps(_Boom(), protocol=2)),
        lambda: path.write_bytes(b"x"),
    ):
        write()
        with pytest.raises(ModelError, match="does not unpickle"):
            models.load(folder)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ModelError, match="not a flat dict"):
        models.load(folder)


def test_a_shard_outside_the_directory_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    table = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ModelError, match="which is not in"):
        models.load(folder)
