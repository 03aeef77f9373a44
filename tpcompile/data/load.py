"""Real data to calibrate, prove and time on, tokenised: the standard library's docstrings, a user's file, or a data set's own layout.

Images are in ``pictures.py``, tensors in ``tensors.py``.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tpcompile.data.corpus import PARTS, docstrings, half, pairs
from tpcompile.data.images import CONFIG
from tpcompile.data.pictures import load_images
from tpcompile.data.samples import Sample, batches, collate
from tpcompile.data.tasks import Labels, open_task
from tpcompile.data.tensors import is_tensors, read_tensors
from tpcompile.data.textfiles import Text, read_file
from tpcompile.errors import EnvironmentFault, InputError, UsageError
from tpcompile.spec import Patches

__all__ = [
    "PARTS",
    "Sample",
    "Text",
    "batches",
    "collate",
    "docstrings",
    "half",
    "load_data",
    "open_tokenizer",
    "pairs",
    "read_file",
]

STREAM_TOKENS = (64, 256)
STREAM_LENGTH = 100


def load_data(
    spec: str | Path | None,
    folder: Path,
    max_length: int,
    limit: int | None = None,
    *,
    truncate: bool = False,
    names: Sequence[str] = ("input_ids", "attention_mask"),
    patches: Patches | None = None,
) -> list[Sample]:
    """Read and tokenise texts; or images, where the folder has a ``preprocessor_config.json`` and no ``tokenizer.json``.

    Args:
        spec: None or ``docstrings`` for all docstrings; ``docstrings:PART`` for one of ``PARTS``: the ``calibration`` half, the
            ``report`` half, the ``stream`` of design.md 10 (100 texts of 64 to 256 tokens, of the report half), retrieval
            ``pairs`` (of the report half; query, target, query, ...) and ``calibration-pairs``. Else a file: ``.txt`` (a text a
            line), ``.jsonl`` or ``.csv`` (``text`` and maybe ``label``, two texts, ``query`` and ``target``, or ``question``,
            ``context`` and ``answers``: see ``tpcompile.data.textfiles.row_texts``); or a data set, see
            ``tpcompile.data.tasks.open_task``. For images see ``tpcompile.data.pictures.load_images``, for tensors
            ``tpcompile.data.tensors.read_tensors``.
        folder: the bundle, with ``tokenizer.json`` or ``preprocessor_config.json``.
        max_length: the most tokens the engine takes, special tokens counted.
        limit: the most texts, pairs or images to return, from the front.
        truncate: cut longer texts instead of refusing them. Docstrings that are too long are left out either way.
        names: inputs to make: ``input_ids``, ``attention_mask``, ``token_type_ids``; the one input of an engine for images.
        patches: what the manifest says of an image's tokens.

    Raises:
        InputError: an empty or too long text, a bad row (with its line), a broken image, a missing file or tokenizer.
        UsageError: an unknown part, kind of file or input name, a limit below 1.
        EnvironmentFault: the package ``tokenizers``, or the standard library's sources, are missing.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit on samples is {limit}", fix="give 1 or more")
    if spec is not None and is_tensors(Path(spec)):
        return read_tensors(Path(spec), names, limit, patches)
    if (folder / CONFIG).is_file() and not (folder / "tokenizer.json").is_file():
        return load_images(spec, folder, limit, names=names, patches=patches)
    tokenizer = open_tokenizer(folder)
    name, _, part = ("docstrings" if spec is None else str(spec)).partition(":")
    if name == "docstrings":
        return _docstring_samples(part or "all", tokenizer, max_length, limit, names)
    rows = open_task(str(spec), Labels.read(folder))
    if rows is None:
        rows = read_file(Path(str(spec)))
    if not rows:
        raise InputError(f"{spec} holds no texts", fix="pass data with at least one")
    count = None if limit is None else limit * (2 if rows[0].role else 1)
    if truncate:
        tokenizer.enable_truncation(max_length, strategy="longest_first" if rows[0].answers is None else "only_second")
    return [_tokenise(row, tokenizer, max_length, names) for row in rows[:count]]


def open_tokenizer(folder: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a folder, with padding and truncation off: lengths are the text's own.

    Raises:
        InputError: there is no readable ``tokenizer.json``.
        EnvironmentFault: the package ``tokenizers`` is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EnvironmentFault("texts need the package 'tokenizers'", fix="pip install 'tpcompile[hf]'") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"no tokenizer.json in {folder}",
            fix="save the tokenizer beside the model (a fast tokenizer), or pass tensors instead of texts",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception for every malformed file
        raise InputError(
            f"{path} cannot be read: {error}", fix="save the tokenizer again with tokenizers or transformers"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _groups(part: str) -> list[tuple[Text, ...]]:
    """The texts of one part: alone, or two by two where they are pairs."""
    if part not in PARTS:
        raise UsageError(f"docstrings have no part {part!r}", fix=f"one of {', '.join(PARTS)}")
    wanted = {"all": "", "calibration": "calibration", "calibration-pairs": "calibration"}.get(part, "report")
    texts = [text for text in docstrings() if wanted in ("", half(text))]
    if not part.endswith("pairs"):
        return [(Text(text, "docstrings"),) for text in texts]
    return [
        (Text(head, "docstrings", pair=number, role="query"), Text(body, "docstrings", pair=number, role="target"))
        for number, (head, body) in enumerate(pairs(texts))
    ]


def _docstring_samples(part: str, tokenizer: Any, max_length: int, limit: int | None, names: Sequence[str]) -> list[Sample]:
    """Samples of one part, leaving out what does not fit; a pair comes whole or not at all."""
    least, most = STREAM_TOKENS if part == "stream" else (0, max_length)
    most = min(most, max_length)
    encoded = ([_encode(row, tokenizer, names) for row in group] for group in _groups(part))
    fitting = (group for group in encoded if all(least <= sample.length <= most for sample in group))
    bound = min(limit or sys.maxsize, STREAM_LENGTH if part == "stream" else sys.maxsize)
    return [sample for group in itertools.islice(fitting, bound) for sample in group]


def _tokenise(row: Text, tokenizer: Any, max_length: int, names: Sequence[str]) -> Sample:
    sample = _encode(row, tokenizer, names)
    if sample.length > max_length:
        raise InputError(
            f"{row.source}: the text has {sample.length} tokens, the engine takes {max_length}",
            fix="pass --truncate (truncate=True), or split the text",
        )
    return sample


def _encode(row: Text, tokenizer: Any, names: Sequence[str]) -> Sample:
    encoding = tokenizer.encode(row.text, *([row.second] if row.second else []))
    made = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
    unknown = [name for name in names if name not in made]
    if unknown:
        raise UsageError(f"texts give no input {unknown[0]!r}", fix=f"one of {', '.join(made)}; pass tensors for other inputs")
    if not encoding.ids:
        raise InputError(f"{row.source}: the text has no tokens", fix="remove it, or use a tokenizer that adds special tokens")
    start, words = len(row.text) + 1, 1 + max((word for word in encoding.word_ids if word is not None), default=0)
    places = list(zip(encoding.offsets, encoding.word_ids, encoding.sequence_ids, strict=True))
    return Sample(
        text=f"{row.text}\n{row.second}" if row.second else row.text,
        inputs={name: np.array([made[name]], dtype=np.int64) for name in names},
        spans=tuple((low + start, high + start) if sequence == 1 and high > low else (low, high) for (low, high), _, sequence in places),
        words=tuple(word if word is None or sequence != 1 else word + words for _, word, sequence in places),
        pieces=tuple(encoding.tokens),
        label=row.label,
        pair=row.pair,
        role=row.role,
        number=row.number,
        answers=row.answers,
        context=start if row.second else 0,
        metric=row.metric,
    )
