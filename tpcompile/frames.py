"""Which line of the user's code an operation came from.

torch.export keeps, of the Python stack under which it met an operation, only the frames of functions called ``forward``. An operation in
a helper would be reported at the line of the call. Under ``user_frames`` the helpers' frames stay as well, and ``innermost`` picks the one
to show.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import FrameSummary, StackSummary
from typing import Any, NamedTuple

import torch
from torch.fx.proxy import TracerBase

from tpcompile.errors import Where

INSTALLED = ("/site-packages/", "/dist-packages/")
TORCH = Path(torch.__file__).parent.as_posix() + "/"
STANDARD = tuple(Path(path).as_posix() + "/" for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
OURS = {Path(__file__).with_name(name).as_posix() for name in ("capture.py", "ops.py")}
"""What calls a model, and what a model calls to mark a site: nobody's model."""
UNNAMED = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
"""Frames of their own only before Python 3.12, and never a function that the user named."""


class Frame(NamedTuple):
    """One line of a recorded stack: where, in which function, and the line's text."""

    file: str
    line: int
    function: str
    source: str


@contextmanager
def user_frames() -> Iterator[None]:
    """Record the frames of the user's helpers too, while torch traces.

    Torch has a setting for this only on the tracer object, which torch.export makes for itself. What the setting selects stands in a method
    that torch made to be overridden; it is exchanged here on the class, and put back at the end.
    """
    tracers: Any = TracerBase  # typed, it could not be assigned to
    before = tracers._filter_traceback_frames
    tracers._filter_traceback_frames = _filtered
    try:
        yield
    finally:
        tracers._filter_traceback_frames = before


def _filtered(tracer: TracerBase, user_stack_summary: StackSummary) -> StackSummary:
    """The frames from the first ``forward`` on; of torch's own only the modules', for a model that is made of nothing else."""
    begin = next((i for i, frame in enumerate(user_stack_summary) if frame.name == "forward"), len(user_stack_summary))
    return StackSummary.from_list([frame for frame in user_stack_summary[begin:] if _wanted(frame)])


def _wanted(frame: FrameSummary) -> bool:
    module = frame.name == "forward" and frame.filename.replace("\\", "/").startswith(f"{TORCH}nn/")
    return module or not _library(frame.filename)


def innermost(trace: str) -> Frame | None:
    """The frame that shows where an operation stands, from a stack trace's text; None where it has no frame."""
    return shown(parse(trace))


def user_frame(trace: str, module: str = "") -> Where:
    """The place in the user's code of a stack trace's text.

    Args:
        trace: as ``traceback`` prints it, innermost last; may be empty.
        module: dotted path of the module that ran.
    """
    frame = innermost(trace)
    if frame is None:
        return Where(module=module)
    return Where(file=frame.file, line=frame.line, source=frame.source, module=module, function=frame.function)


def called(stack: Sequence[FrameSummary]) -> Frame | None:
    """The frame that shows where a model stands that ``capture`` called; None where no line of the model is on the stack."""
    calls = [i for i, row in enumerate(stack) if row.filename in OURS and row.name == "forward"]
    inside = [row for row in stack[calls[-1] + 1 :] if _wanted(row)] if calls else []
    return shown([Frame(row.filename, row.lineno or 0, row.name, row.line or "") for row in inside])


def shown(frames: Sequence[Frame]) -> Frame | None:
    """The frame to show of a stack, the outermost first.

    It is the innermost one outside torch and the standard library. A function of an installed package counts only where a module of that
    package runs: what transformers' attention calls is a part of the model, what einops does for a line of the user's is that line.
    """
    outside = [frame for frame in frames if not _library(frame.file)]
    running = {_package(frame.file) for frame in outside if frame.function == "forward"}
    own = [frame for frame in outside if _package(frame.file) in {"", *running}]
    rest = own or outside or frames
    return _named(rest) if rest else None


def _named(frames: Sequence[Frame]) -> Frame:
    """The last frame, under the name of the function that holds it."""
    last = frames[-1]
    named = [frame.function for frame in frames if frame.file == last.file and frame.function not in UNNAMED]
    return last._replace(function=named[-1]) if last.function in UNNAMED and named else last


def parse(trace: str) -> list[Frame]:
    """Each frame of a stack trace's text, the outermost first."""
    frames = []
    lines = trace.splitlines()
    for i, text in enumerate(lines):
        head = text.strip()
        if not head.startswith('File "'):
            continue
        file, _, rest = head[6:].partition('", line ')
        number, _, function = rest.partition(", in ")
        source = lines[i + 1].strip() if i + 1 < len(lines) and not lines[i + 1].strip().startswith('File "') else ""
        frames.append(Frame(file, int(number) if number.isdecimal() else 0, function, source))
    return frames


def _library(file: str) -> bool:
    """Whether a file is torch's, the standard library's, generated by torch, or of this compiler's own making."""
    path = file.replace("\\", "/")
    installed = any(folder in path for folder in INSTALLED)
    if path.startswith((TORCH, "<eval_with_key>", "<frozen ")) or any(f"{folder}torch/" in path for folder in INSTALLED):
        return True
    return path in OURS or (not installed and path.startswith(STANDARD))


def _package(file: str) -> str:
    """The installed package that a file belongs to; empty for any other file."""
    path = file.replace("\\", "/")
    return next((path.rpartition(folder)[2].partition("/")[0] for folder in INSTALLED if folder in path), "")
