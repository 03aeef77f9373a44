"""What every test shares: one thread, and a tiny random BERT as a model directory."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its pool: two test processes share few cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import string
from pathlib import Path
from typing import Any

import pytest

MAX_LENGTH = 64


def write_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer whose pieces are single characters: it needs no training and knows every ASCII text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizerFast", "model_max_length": MAX_LENGTH, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_bert(folder: Path, **changes: Any) -> Path:
    """A BERT with three layers of 32 and random weights, as ``save_pretrained`` writes it, with a tokenizer."""
    import torch

    from tpcompile.models.library import transformers

    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"initializer_range": 0.2}  # the usual 0.02 gives attention so even that all scores are alike
    config = transformers().BertConfig(**{**sizes, "max_position_embeddings": MAX_LENGTH, **changes})
    torch.manual_seed(0)
    transformers().BertModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT's directory; read only."""
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def short_bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer, for what need not be deep; read only."""
    return write_bert(tmp_path_factory.mktemp("models") / "short", num_hidden_layers=1)
