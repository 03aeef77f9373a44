"""Pruning methods: one file per published method, written once against a family's parts."""

import difflib
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from tpcompile.errors import UsageError
from tpcompile.models.families import find
from tpcompile.models.methods.as_vit import AsVit
from tpcompile.models.methods.atome import Atome
from tpcompile.models.methods.ats import Ats
from tpcompile.models.methods.base import Method, Parameters, Pruned, Step, Trace
from tpcompile.models.methods.cls_attention import ClsAttention
from tpcompile.models.methods.dynamicvit import DynamicVit
from tpcompile.models.methods.evit import Evit
from tpcompile.models.methods.jmp import Jmp
from tpcompile.models.methods.ltmp import Ltmp
from tpcompile.models.methods.ltp import Ltp
from tpcompile.models.methods.power_bert import PowerBert
from tpcompile.models.methods.svit import Svit
from tpcompile.models.methods.tome import Tome
from tpcompile.models.methods.top import Top
from tpcompile.models.methods.tps import Tps
from tpcompile.models.methods.transkimmer import Transkimmer
from tpcompile.models.methods.zero_tprune import ZeroTprune

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Ltp,
        ClsAttention,
        AsVit,
        Top,
        PowerBert,
        Transkimmer,
        Evit,
        Tome,
        DynamicVit,
        Tps,
        Ats,
        Ltmp,
        ZeroTprune,
        Jmp,
        Atome,
        Svit,
    )
}
"""Name -> method."""


def find_method(name: str) -> type[Method]:
    """The method called ``name``.

    Raises:
        UsageError: unknown name; lists what is known.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}{_close(name, METHODS)}", fix=f"use one of: {', '.join(METHODS)}")
    return METHODS[name]


def prune(model: nn.Module, method: str = "ltp", **parameters: Any) -> Pruned:
    """Put a pruning method between the parts of a dense model.

    The model's own modules are used and shared, not copied.

    Args:
        model: a transformers or timm model of a known family, a `SentenceEncoder` or a `TokenEncoder`; float32 and in eval mode.
        method: name in `METHODS`.
        **parameters: the method's own; see its ``Parameters``.

    Returns:
        The pruned model in masked form, ready for ``tpcompile.lower`` and ``tpcompile.export``.

    Raises:
        UsageError: unknown method or parameter, a value that does not fit, a model in training mode or not float32.
        ModelError: no family knows the model.
    """
    chosen = find_method(method)
    checked = validate(chosen, parameters)
    parts = find(model)
    if model.training:
        raise UsageError("the model is in training mode: dropout would be lost", fix="call model.eval() first")
    wrong = next((name for name, weight in model.named_parameters() if weight.dtype != torch.float32), None)
    if wrong is not None:
        raise UsageError(f"{wrong} is {dict(model.named_parameters())[wrong].dtype}, not float32", fix="call model.float() first")
    return Pruned(parts, chosen(parts, checked), checked)


def validate(chosen: type[Method], parameters: dict[str, Any]) -> Parameters:
    """Check a method's parameters.

    Raises:
        UsageError: one line per problem; lists what is accepted.
    """
    try:
        return chosen.Parameters.model_validate(parameters)
    except ValidationError as error:
        accepted = list(chosen.Parameters.model_fields)
        lines = dict.fromkeys(_problem(dict(item), accepted) for item in error.errors())
        raise UsageError(
            f"method {chosen.name}: " + "; ".join(lines), fix=f"{chosen.name} accepts: {', '.join(accepted)}"
        ) from error


def _problem(item: dict[str, Any], accepted: list[str]) -> str:
    """One of pydantic's findings as one readable phrase."""
    if not item["loc"]:  # of several parameters together
        return str(item["msg"]).removeprefix("Value error, ")
    name, *rest = item["loc"]
    if (
        len(rest) > 1 and isinstance(rest[0], int) and str(rest[-1]).isidentifier()
    ):  # inside a parameter that is made of named parts
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
        return f"parameter {name}{path}: {item['msg'][0].lower()}{item['msg'][1:]}"
    if item["type"] == "extra_forbidden":
        return f"unknown parameter {name!r}{_close(str(name), accepted)}"
    if item["type"] == "missing":
        return f"parameter {name!r} is required"
    place = "".join(f"[{part}]" for part in rest if isinstance(part, int))
    return f"parameter {name}{place} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _close(name: str, known: Any) -> str:
    """`` (did you mean 'ltp'?)``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


__all__ = ["METHODS", "Method", "Pruned", "Step", "Trace", "find_method", "prune", "validate"]
