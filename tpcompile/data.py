"""Real data to calibrate, prove and time on: the standard library's docstrings, or a user's file, tokenised; images in ``pictures.py``.

The docstrings need no network and are real prose of uneven length (design.md 11). They are read with ``ast`` from the sources:
no module is imported. Their order is that of their sha256, so that any first part is a fair sample, and so is each half.
"""

import ast
import csv
import functools
import hashlib
import io
import itertools
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tpcompile.errors import EnvironmentFault, InputError, UsageError
from tpcompile.images import CONFIG
from tpcompile.pictures import load_images
from tpcompile.samples import Role, Sample, batches, collate
from tpcompile.spec import Patches
from tpcompile.tensors import is_tensors, read_tensors

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

MODULES = """
abc argparse ast base64 bisect calendar cmd code codecs collections configparser contextlib copy csv dataclasses
datetime difflib dis doctest email enum fileinput fractions functools glob graphlib gzip hashlib heapq hmac http
importlib inspect io ipaddress json linecache locale logging lzma mailbox mimetypes numbers operator optparse os pathlib
pickle pkgutil platform pprint queue random re sched selectors shelve shlex shutil smtplib socket socketserver ssl
statistics string subprocess tarfile tempfile textwrap threading timeit tokenize traceback types typing unittest urllib
uuid warnings wave weakref webbrowser zipfile
""".split()  # noqa: SIM905  a literal list would take 83 lines
"""The modules whose docstrings are the corpus. Fixed, so that a figure means the same on every machine with the same Python."""

LEAST_CHARACTERS = 80
STREAM_TOKENS = (64, 256)
STREAM_LENGTH = 100
BODY_CHARACTERS = (240, 1600)
PARTS = ("all", "calibration", "report", "stream", "pairs", "calibration-pairs")


@dataclass(frozen=True, slots=True)
class Text:
    """One text before tokenising.

    Attributes:
        text: the text, not empty.
        source: where it came from, for error messages: ``data.csv:12``.
        label: class index, where the data has labels.
        pair: number of the retrieval pair it belongs to.
        role: its side of the pair.
    """

    text: str
    source: str
    label: int | None = None
    pair: int | None = None
    role: Role = ""


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
            line), ``.jsonl`` or ``.csv`` (``text`` and maybe ``label``, or ``query`` and ``target``). For images see
            ``tpcompile.pictures.load_images``.
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
    rows = read_file(Path(str(spec)))
    count = None if limit is None else limit * (2 if rows[0].role else 1)
    if truncate:
        tokenizer.enable_truncation(max_length)
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


@functools.cache
def docstrings() -> tuple[str, ...]:
    """The corpus: distinct docstrings of 80 characters or more, in the order of their sha256.

    Raises:
        EnvironmentFault: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for module in MODULES:
        for path in (root / f"{module}.py", root / module / "__init__.py"):
            if path.is_file():
                found.update(dict.fromkeys(_docstrings_of(path.read_bytes())))
    if not found:
        raise EnvironmentFault(
            "this Python comes without the sources of its standard library, so there are no docstrings to use",
            fix="pass --data FILE (.txt, .jsonl or .csv)",
        )
    return tuple(sorted(found, key=_digest))


def half(text: str) -> Literal["calibration", "report"]:
    """Which half a docstring belongs to: thresholds are chosen on one, figures reported on the other."""
    return "report" if _digest(text)[-1] % 2 else "calibration"


def pairs(texts: Iterable[str]) -> list[tuple[str, str]]:
    """The docstrings that have both a first line and a body, as (first line, body).

    The first line is a paragraph of its own (PEP 257) of 20 characters or more, the body 240 to 1,600 characters. No body or
    first line is used twice, since then the right answer would not be unique.
    """
    least, most = BODY_CHARACTERS
    found: dict[str, str] = {}
    bodies: set[str] = set()
    for text in texts:
        head, _, body = (part.strip() for part in text.partition("\n\n"))
        if len(head) < 20 or "\n" in head or not least <= len(body) <= most or head in found or body in bodies:
            continue
        found[head] = body
        bodies.add(body)
    return list(found.items())


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _docstrings_of(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stray escape in somebody's source is not ours to report
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= LEAST_CHARACTERS:
                yield text


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
    encoding = tokenizer.encode(row.text)
    made = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
    unknown = [name for name in names if name not in made]
    if unknown:
        raise UsageError(f"texts give no input {unknown[0]!r}", fix=f"one of {', '.join(made)}; pass tensors for other inputs")
    if not encoding.ids:
        raise InputError(f"{row.source}: the text has no tokens", fix="remove it, or use a tokenizer that adds special tokens")
    return Sample(
        text=row.text,
        inputs={name: np.array([made[name]], dtype=np.int64) for name in names},
        spans=tuple(encoding.offsets),
        words=tuple(encoding.word_ids),
        pieces=tuple(encoding.tokens),
        label=row.label,
        pair=row.pair,
        role=row.role,
    )


def read_file(path: Path) -> list[Text]:
    """The texts of a ``.txt``, ``.jsonl`` or ``.csv`` file, in UTF-8.

    Raises:
        InputError: the file is missing or holds a bad row; the message starts with ``file:line``.
        UsageError: another kind of file.
    """
    readers: dict[str, Callable[[Path, str], Iterator[Text]]] = {".txt": _lines, ".jsonl": _json_lines, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"data {str(path)!r} is none of {', '.join(readers)}", fix=f"or use docstrings[:PART] with PART of {', '.join(PARTS)}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 ({error.reason})", fix="save the file as UTF-8") from error
    rows = list(reader(path, decoded))
    if not rows:
        raise InputError(f"{path} holds no texts", fix="one text a line, or one row a text")
    return rows


def _lines(path: Path, content: str) -> Iterator[Text]:
    # split on line feeds only: str.splitlines also cuts at form feeds and other marks that belong to a text
    for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], 1):
        yield Text(_filled(line, f"{path}:{number}"), f"{path}:{number}")


def _json_lines(path: Path, content: str) -> Iterator[Text]:
    for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], 1):
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{source}: not JSON: {error}", fix='one object a line, such as {"text": "..."}') from error
        if not isinstance(row, dict):
            raise InputError(f"{source}: not a JSON object", fix='one object a line, such as {"text": "..."}')
        yield from _row(row, source, number)


def _csv_rows(path: Path, content: str) -> Iterator[Text]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}:{reader.line_num}: {error}", fix="quote fields that hold commas, quotes or line breaks"
            ) from error
        if row is None:
            return
        if None in row:
            raise InputError(f"{path}:{reader.line_num}: more fields than the header", fix="quote fields that hold commas")
        yield from _row(row, f"{path}:{reader.line_num}", reader.line_num)


def _row(row: Mapping[str, Any], source: str, number: int) -> Iterator[Text]:
    """One row with ``text``, or with ``query`` and ``target``."""
    if "text" in row:
        yield Text(_filled(row["text"], source), source, label=_label(row.get("label"), source))
    elif "query" in row and "target" in row:
        yield Text(_filled(row["query"], source), source, pair=number, role="query")
        yield Text(_filled(row["target"], source), source, pair=number, role="target")
    else:
        raise InputError(f"{source}: no field 'text'", fix="name the field text, or give query and target")


def _filled(value: object, source: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{source}: the text is {type(value).__name__}, not a string", fix="write texts as strings")
    if not value.strip():
        raise InputError(f"{source}: the text is empty", fix="remove the row")
    return value.removesuffix("\r")


def _label(value: object, source: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        label = int(str(value))
    except ValueError:
        label = -1
    if label < 0:
        raise InputError(f"{source}: the label {value!r} is not a class index", fix="use the model's label numbers: 0, 1, ...")
    return label
