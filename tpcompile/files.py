"""Files that are written whole or not at all: beside, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and vanishes when it does not. Missing parents are made.

    The name is hidden and of this call alone; the mode is what the user's files have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> Path:
    """Write a text, and return its path; see ``replacing``."""
    with replacing(path) as file:
        file.write(text.encode())
    return path
