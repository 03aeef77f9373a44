"""The standard library's docstrings: real prose of uneven length that needs no network (design.md 11).

They are read with ``ast`` from the sources: no module is imported. Their order is that of their sha256, so that any first part is a fair
sample, and so is each half.
"""

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from tpcompile.errors import EnvironmentFault

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
BODY_CHARACTERS = (240, 1600)
PARTS = ("all", "calibration", "report", "stream", "pairs", "calibration-pairs")


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
