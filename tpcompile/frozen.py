"""0-d parameters and buffers as plain numbers, so that Python may branch on them while a model is traced.

``if self.threshold == 0: return mask`` asks for a value that a traced tensor has not. A scalar that a model was trained to is a
constant once it is compiled, so its value at capture stands for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """While it lasts, reading a 0-d parameter or buffer of any submodule gives a constant tensor of its present value.

    Yields:
        ``name = value`` of each, by its path in the model.
    """
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    names: list[str] = []
    try:
        for path, module in model.named_modules():
            scalars = {name: value for name, value in _own(module) if value.dim() == 0}
            if scalars:
                classes.append((module, type(module)))
                module.__class__ = _with_constants(type(module), scalars)
                names += [f"{path}.{name}".lstrip(".") + f" = {value.item():g}" for name, value in scalars.items()]
        yield tuple(names)
    finally:
        for module, kind in classes:
            module.__class__ = kind


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _with_constants(kind: type[nn.Module], scalars: dict[str, Tensor]) -> type[nn.Module]:
    """A class like ``kind`` on which these attributes are properties: they come before a module's own parameters."""
    members: dict[str, Any] = {name: _constant(value) for name, value in scalars.items()}
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _constant(value: Tensor) -> property:
    number, dtype = value.item(), value.dtype
    return property(lambda _: torch.tensor(number, dtype=dtype))
