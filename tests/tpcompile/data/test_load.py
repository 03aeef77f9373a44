"""Texts: the docstring corpus, files, tokenising."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tpcompile.data import load as data
from tpcompile.errors import InputError, UsageError

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A word-level tokenizer with [CLS] and [SEP], and with padding and truncation on, as published tokenizers often come."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "hello": 4, "world": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


def test_corpus_is_large_stable_and_distinct():
    texts = data.docstrings()
    assert 1200 < len(texts) < 1700
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= 80
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    assert digests == sorted(digests)


def test_halves_share_nothing_and_are_alike_in_size(folder):
    calibration, report = (
        {sample.text for sample in data.load_data(f"docstrings:{part}", folder, 512)} for part in ("calibration", "report")
    )
    assert not calibration & report
    assert 0.8 < len(calibration) / len(report) < 1.25
    assert {data.half(text) for text in calibration} == {"calibration"}


def test_stream_keeps_to_its_lengths(folder):
    samples = data.load_data("docstrings:stream", folder, 512)
    assert len(samples) == 100
    assert all(64 <= sample.length <= 256 for sample in samples)


def test_pairs_come_query_then_target(folder):
    samples = data.load_data("docstrings:pairs", folder, 512, limit=20)
    assert len(samples) == 40
    assert [sample.role for sample in samples] == ["query", "target"] * 20
    assert all(a.pair == b.pair for a, b in zip(samples[::2], samples[1::2], strict=True))
    assert len({sample.text for sample in samples}) == 40


def test_pairs_are_unambiguous():
    long = "x" * 300
    texts = [
        f"Do the first thing here.\n\n{long}",
        f"Do another thing here, same body.\n\n{long}",
        f"Do the first thing here.\n\n{long}y",
        f"Two lines\nof summary are no first line.\n\n{long}z",
        f"Short.\n\n{long}q",
    ]
    assert data.pairs(texts) == [("Do the first thing here.", long)]


def test_length_is_the_texts_own(folder):
    path = write(folder / "a.txt", "hello world hello world hello\nhello\n")
    long, short = data.load_data(path, folder, 16)
    assert (long.length, short.length) == (7, 3)
    assert short.inputs["input_ids"].tolist() == [[2, 4, 3]]
    assert short.inputs["attention_mask"].dtype == np.int64
    assert short.spans == ((0, 0), (0, 5), (0, 0))
    assert short.words == (None, 0, None)


def test_asked_inputs_are_made(folder):
    path = write(folder / "b.txt", "hello")
    (sample,) = data.load_data(path, folder, 16, names=("input_ids", "token_type_ids"))
    assert set(sample.inputs) == {"input_ids", "token_type_ids"}
    with pytest.raises(UsageError, match="pixel_values"):
        data.load_data(path, folder, 16, names=("pixel_values",))


def test_too_long_is_refused_or_cut(folder):
    path = write(folder / "c.txt", "hello\nhello world hello world hello")
    with pytest.raises(InputError, match=r"c\.txt:2: the text has 7 tokens, the engine takes 5"):
        data.load_data(path, folder, 5)
    assert [sample.length for sample in data.load_data(path, folder, 5, truncate=True)] == [3, 5]


def test_docstrings_that_are_too_long_are_left_out(folder):
    assert all(sample.length <= 40 for sample in data.load_data("docstrings", folder, 40))


def test_jsonl_and_csv_rows(folder):
    rows = [{"text": "hello", "label": 1}, {"query": "hello", "target": "world"}]
    path = write(folder / "d.jsonl", "\n".join(map(json.dumps, rows)))
    labelled, query, target = data.load_data(path, folder, 16)
    assert (labelled.label, labelled.pair) == (1, None)
    assert (query.role, target.role, query.pair == target.pair) == ("query", "target", True)
    path = write(folder / "e.csv", 'text,label\n"hello, ""big""\nworld",0\nhello,\n')
    first, second = data.load_data(path, folder, 16)
    assert (first.text, first.label, second.label) == ('hello, "big"\nworld', 0, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.txt", "hello\n \nworld", r"f\.txt:2: the text is empty"),
        ("f.txt", "", "holds no texts"),
        ("f.jsonl", '{"text": "hello"}\n{"text": ', r"f\.jsonl:2: not JSON"),
        ("f.jsonl", "[1]", r"f\.jsonl:1: not a JSON object"),
        ("f.jsonl", '{"text": 3}', r"f\.jsonl:1: the text is int"),
        ("f.jsonl", '{"words": "x"}', r"f\.jsonl:1: no field 'text'"),
        ("f.jsonl", '{"text": "x", "label": "good"}', r"f\.jsonl:1: the label 'good'"),
        ("f.jsonl", '{"text": "x", "label": -3}', r"f\.jsonl:1: the label -3"),
        ("f.csv", "text\nhello, world\n", r"f\.csv:2: more fields"),
        ("f.csv", 'text\n"hello\n', r"f\.csv:\d"),
        ("f.csv", "text,label\nx,y\n", r"f\.csv:2: the label 'y'"),
        ("f.txt", b"hello\n\xff\xfe", r"f\.txt:2: not UTF-8"),
    ],
)
def test_bad_files_name_their_line(folder, name, content, message):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        data.load_data(path, folder, 16)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("spec", "limit", "message"), [("docstrings:half", None, "no part"), ("x.parquet", None, "none of"), (None, 0, "limit")]
)
def test_bad_requests_are_usage(folder, spec, limit, message):
    with pytest.raises(UsageError, match=message) as caught:
        data.load_data(spec, folder, 16, limit)
    assert caught.value.fix


def test_missing_and_broken_files(folder, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        data.load_data(tmp_path / "none.txt", folder, 16)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        data.load_data(None, tmp_path, 16)
    write(tmp_path / "tokenizer.json", "{")
    with pytest.raises(InputError, match="cannot be read"):
        data.load_data(None, tmp_path, 16)
