"""The user's line in a stack trace that torch kept as text."""

import os

from tpcompile.errors import Where


def user_frame(trace: str, module: str = "") -> Where:
    """The innermost frame outside torch; the innermost of all where torch is everywhere.

    Args:
        trace: text, as ``traceback`` prints it, innermost last; may be empty.
        module: dotted path of the module that ran.
    """
    frames = _frames(trace)
    user = [frame for frame in frames if not _is_library(frame[0])] or frames
    if not user:
        return Where(module=module)
    file, line, function, source = user[-1]
    return Where(file=file, line=line, source=source, module=module, function=function)


def _frames(trace: str) -> list[tuple[str, int, str, str]]:
    """(file, line, function, source) of each frame in a stack trace's text."""
    frames = []
    lines = trace.splitlines()
    for i, text in enumerate(lines):
        head = text.strip()
        if not head.startswith('File "'):
            continue
        file, _, rest = head[6:].partition('", line ')
        number, _, function = rest.partition(", in ")
        source = lines[i + 1].strip() if i + 1 < len(lines) and not lines[i + 1].strip().startswith('File "') else ""
        frames.append((file, int(number) if number.isdecimal() else 0, function, source))
    return frames


def _is_library(file: str) -> bool:
    return f"{os.sep}torch{os.sep}" in file
