"""Why torch.export could not trace a model, at the line of the model that stands in the way."""

import inspect
import logging
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tpcompile.errors import CaptureError, Where, first_line
from tpcompile.frames import Frame, called

LOGS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
"""What torch writes here comes as an exception as well."""
FIXES = "Specializing %s to %s"
"""Torch's words for a dynamic size that it takes for a constant from now on."""
SOURCE = re.compile(r"L\['inputs'\]\['(\w+)'\]\.size\(\)\[(\d+)\]")
TORCHS = "-v shows torch's own error"

Stack = Iterable[tuple[FrameType, int | None]]
"""Frames with their lines, the outermost first."""


class ValueAsked(Exception):
    """Python asked for a tensor's value; torch's own error for it, the cause, makes torch.export print the graph so far."""


class Ear(logging.Filter):
    """Hears, from torch's log, where a dynamic size becomes a constant, and keeps what is an exception as well out of it.

    Attributes:
        fixed: by torch's name of a size, its value and where the model made it a constant.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.fixed = model, dict[str, tuple[Any, Where | None]]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let only what a developer of torch asked for pass."""
        if record.msg == FIXES and isinstance(record.args, tuple):
            source, value = record.args
            self.fixed.setdefault(str(source), (value, _place(reversed(list(traceback.walk_stack(None))), self.model)))
        return record.levelno < logging.WARNING


@contextmanager
def listening(model: nn.Module) -> Iterator[Ear]:
    """Hear what torch says while it traces."""
    ear, logs = Ear(model), [logging.getLogger(name) for name in LOGS]
    settings: Any = torch.fx.experimental._config
    try:
        for log in logs:
            log.addFilter(ear)
        with settings.patch(print_specializations=True):
            yield ear
    finally:
        for log in logs:
            log.removeFilter(ear)


def check_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Compare the names of the example inputs with the forward's parameters.

    Raises:
        CaptureError: they do not fit.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**inputs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit the forward of {type(model).__name__}: {error}",
            fix=f"give each of its parameters by name: {', '.join(signature.parameters)}",
        ) from error


def refusal(model: nn.Module, error: BaseException, fixed: Mapping[str, tuple[Any, Where | None]],
            dynamic: Mapping[str, Mapping[int, str]]) -> CaptureError:  # fmt: skip
    """What torch said, at the line of the model that it was said of.

    Args:
        model: what was traced.
        error: torch's.
        fixed: the dynamic sizes that became constants, see ``Ear``.
        dynamic: input -> dim -> name.
    """
    for source, (value, where) in fixed.items():
        match = SOURCE.fullmatch(source)
        if match is not None and source in str(error):
            name = dynamic.get(match[1], {}).get(int(match[2]), source)
            return CaptureError(
                f"dim {name} of {match[1]} is dynamic, but {type(model).__name__} can only be traced with the size {value}", where=where,
                during="capture", fix="write that line for any size (x.shape[1], or -1 in a view), or leave the dim out of dynamic",
            )  # fmt: skip
    asked = isinstance(error, GuardOnDataDependentSymNode)
    return CaptureError(
        f"torch.export could not trace {type(model).__name__}: {_said(error)}",
        where=_place(traceback.walk_tb(error.__traceback__), model),
        during="capture",
        fix=f"write it without a tensor's value in Python: torch.where for a branch, a mask for boolean indexing; {TORCHS}"
        if asked
        else f"run the model on the example inputs first; where that works, {TORCHS}",
    )


def _said(error: BaseException) -> str:
    """The line of torch's message that says what is wrong: that of the first constraint, where it lists them."""
    listed = [text.strip().removeprefix("- ") for text in str(error).splitlines() if text.startswith("  - ")]
    return listed[0] if listed else first_line(error)


def _place(stack: Stack, model: nn.Module) -> Where | None:
    """The model's line on a stack, and the deepest module on it; None where no frame is the model's."""
    paths = {id(module): path for path, module in model.named_modules()}
    rows = [(traceback.FrameSummary(f.f_code.co_filename, line, f.f_code.co_name), f.f_locals.get("self")) for f, line in stack]
    frame: Frame | None = called([row for row, _ in rows])
    module = next(filter(None, (paths.get(id(owner), "") for _, owner in reversed(rows))), "")
    return None if frame is None else Where(frame.file, frame.line, frame.source, module, frame.function)
