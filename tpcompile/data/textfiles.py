"""Texts from a user's file: ``.txt``, ``.jsonl``, ``.csv``; and one row of any table, by the names of its columns.

The names are those of the usual data sets, so that a table of GLUE or SQuAD needs no translation.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcompile.data.corpus import PARTS
from tpcompile.data.samples import Role
from tpcompile.errors import InputError, UsageError


@dataclass(frozen=True, slots=True)
class Text:
    """One text before tokenising.

    Attributes:
        text: the text, not empty.
        source: where it came from, for error messages: ``data.csv:12``.
        label: class index, where the data has labels.
        pair: number of the retrieval pair it belongs to.
        role: its side of the pair.
        second: a second text that goes with it into one input; answers are looked for in this one.
        number: the right number, of a regression.
        answers: the right answers' texts; empty: there is none in the text.
        metric: of ``tpcompile.proof.scores``; empty: accuracy.
    """

    text: str
    source: str
    label: int | None = None
    pair: int | None = None
    role: Role = ""
    second: str = ""
    number: float | None = None
    answers: tuple[str, ...] | None = None
    metric: str = ""


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
    rows = list(reader(path, read_text(path)))
    if not rows:
        raise InputError(f"{path} holds no texts", fix="one text a line, or one row a text")
    return rows


def read_text(path: Path) -> str:
    """A file's text, in UTF-8.

    Raises:
        InputError: it is missing, or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 ({error.reason})", fix="save the file as UTF-8") from error


def _lines(path: Path, content: str) -> Iterator[Text]:
    # split on line feeds only: str.splitlines also cuts at form feeds and other marks that belong to a text
    for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], 1):
        yield Text(_filled(line, f"{path}:{number}"), f"{path}:{number}")


def _json_lines(path: Path, content: str) -> Iterator[Text]:
    for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], 1):
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not JSON: {error}", fix='one object a line, such as {"text": "..."}') from error
        if not isinstance(row, dict):
            raise InputError(f"{source}: not a JSON object", fix='one object a line, such as {"text": "..."}')
        yield from row_texts(row, source, number)


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
        yield from row_texts(row, f"{path}:{reader.line_num}", reader.line_num)


PAIRS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"), ("text", "second"),
)  # fmt: skip
"""Columns of two texts that make one input."""
SINGLE = ("text", "sentence")


def row_texts(
    row: Mapping[str, Any], source: str, number: int, metric: str = "", order: Mapping[str, int] | None = None
) -> Iterator[Text]:
    """The texts of one row of a table: one, or a query and its target.

    Args:
        row: column -> value.
        source: where it stands, for messages.
        number: of the pair that a query and its target make.
        metric: of the labels; ``pearson`` means that they are numbers.
        order: name of a label in lower case -> its number.

    Raises:
        InputError: no column that is known, an empty text, a label or an answer that is none.
    """
    if "query" in row and "target" in row:
        yield Text(_filled(row["query"], source), source, pair=number, role="query")
        yield Text(_filled(row["target"], source), source, pair=number, role="target")
        return
    if "question" in row and "context" in row:
        known = _answers(row.get("answers"), source)
        yield Text(_filled(row["question"], source), source, second=_filled(row["context"], source), answers=known)
        return
    columns = next((pair for pair in PAIRS if all(row.get(one) is not None for one in pair)), ())
    columns = columns or next(((one,) for one in SINGLE if one in row), ())
    if not columns:
        raise InputError(f"{source}: no field 'text'", fix="name the field text, or give query and target")
    first, second = (*(_filled(row[one], source) for one in columns), "")[:2]
    given = row.get("label")
    if metric == "pearson":
        yield Text(first, source, second=second, number=_number(given, source))
    else:
        yield Text(first, source, _label(given, source, order or {}), second=second, metric=metric)


def _answers(value: object, source: str) -> tuple[str, ...] | None:
    """The right answers, each once: a list, SQuAD's ``{"text": [...]}``, or one text; None where they are not known."""
    if value is None:
        return None
    found = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(found, str):
        return (found,) if found else ()
    if not isinstance(found, Sequence) or not all(isinstance(one, str) for one in found):
        raise InputError(f"{source}: the answers are no list of texts", fix='such as ["Paris"], or [] where there is none')
    return tuple(dict.fromkeys(found))


def _filled(value: object, source: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{source}: the text is {type(value).__name__}, not a string", fix="write texts as strings")
    if not value.strip():
        raise InputError(f"{source}: the text is empty", fix="remove the row")
    return value.removesuffix("\r")


def _label(value: object, source: str, order: Mapping[str, int]) -> int | None:
    if value is None or value == "":
        return None
    if str(value).lower() in order:
        return order[str(value).lower()]
    try:
        label = int(str(value))
    except ValueError:
        label = -1
    if label < 0:
        known = f"; the names known here are {', '.join(order)}" if order else ""
        raise InputError(f"{source}: the label {value!r} is not a class index", fix=f"use the model's label numbers: 0, 1, ...{known}")
    return label


def _number(value: object, source: str) -> float:
    try:
        found = float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{source}: the label {value!r} is no number", fix="this task's labels are numbers")
    return found
