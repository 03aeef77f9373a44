"""Families of library models. A family names the parts of the library's own modules; it re-implements none of them."""

from collections.abc import Callable

from torch import nn

from tpcompile.errors import ModelError
from tpcompile.models.families import bert, speech, vit
from tpcompile.models.families.base import Block, Parts, bind
from tpcompile.models.families.dense import Dense, Pooling, SentenceEncoder, TokenEncoder

FAMILIES: dict[str, Callable[[nn.Module], Parts | None]] = {"bert": bert.parts, "vit": vit.parts, "speech": speech.parts}
"""Name -> function that names a model's parts, or returns None for a model of another family."""


def architectures() -> tuple[str, ...]:
    """Every model type of transformers that a family knows, such as ``bert`` and ``distilbert``."""
    return tuple(row.name for row in bert.ARCHITECTURES)


def find(model: nn.Module) -> Parts:
    """The parts of a library model, found by the types of its modules.

    Raises:
        ModelError: no family knows it.
    """
    for family in FAMILIES.values():
        parts = family(model)
        if parts is not None:
            return parts
    raise ModelError(
        f"no family names the parts of {type(model).__module__}.{type(model).__qualname__}",
        fix=f"pass one of {', '.join(architectures())} as transformers builds it, or a VisionTransformer as timm builds it; "
        "docs/add-a-method.md says how to add a family, and tpcompile.impose(model, inputs) needs none",
    )


__all__ = ["FAMILIES", "Block", "Dense", "Parts", "Pooling", "SentenceEncoder", "TokenEncoder", "architectures", "bind", "find"]
