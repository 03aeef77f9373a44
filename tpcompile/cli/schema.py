"""``tpcompile schema``: the JSON schema of every ``--json`` document, made from the types the verbs hand over."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import SCHEMA_VERSION, Settings
from tpcompile.errors import UsageError

MANIFEST = "manifest"
"""The one schema that is no verb's: that of ``tpcompile.json``."""
PLAIN: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"}, Path: {"type": "string"}, bool: {"type": "boolean"}, int: {"type": "integer"},
    float: {"type": ["number", "null"]}, NoneType: {"type": "null"}, Any: {}, object: {},
}  # fmt: skip
"""A number that is not finite is written as null."""


@click.command(cls=Verb)
@click.argument("words", metavar="[NAME]", nargs=-1)
@click.pass_obj
def schema(settings: Settings, words: tuple[str, ...]) -> None:
    """Print the JSON schema of a verb's --json document, such as `validate` or `passes list`, or of a bundle's `manifest`.

    Without a name: list them.
    """
    from tpcompile.cli.documents import documents

    names = [*documents(), MANIFEST]
    name = " ".join(words)
    if not name:
        settings.emit({"names": names}, "\n".join(names))
        return
    if name not in names:
        raise UsageError(f"no document is called '{name}'", fix=f"choose one of {', '.join(names)}")
    settings.verb = "schema NAME"
    found = schema_for(name)
    settings.emit({"name": name, "schema": found}, json.dumps(found, indent=2))


def schema_for(name: str) -> dict[str, Any]:
    """The schema of a verb's document, or of the manifest."""
    from tpcompile.cli.documents import Failed, documents

    if name == MANIFEST:
        from tpcompile.manifest import Manifest

        return Manifest.model_json_schema(mode="serialization")
    shared: dict[str, Any] = {}
    parts = [[shape(kind, shared) for kind in kinds] for kinds in (documents()[name], (Failed,))]
    verb = name.partition(" ")[0] if name.startswith("explain") else name
    head = {"schema_version": {"const": SCHEMA_VERSION}, "verb": {"const": verb}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"tpcompile {name} --json",
        "type": "object",
        "properties": head,
        "required": list(head),
        "anyOf": [{"allOf": kinds} for kinds in parts],
        "$defs": shared,
    }


def shape(hint: Any, shared: dict[str, Any]) -> dict[str, Any]:
    """The schema of one type.

    Args:
        hint: a plain type, a dataclass, a TypedDict, or a list, tuple, mapping, Literal or union of such.
        shared: name -> schema of every dataclass and TypedDict met on the way; added to.

    Raises:
        TypeError: another kind of type: a document must not hold it.
    """
    if hint in PLAIN:
        return dict(PLAIN[hint])
    if dataclasses.is_dataclass(hint) or is_typeddict(hint):
        return _record(hint, shared)
    origin, inner = get_origin(hint), get_args(hint)
    if getattr(origin, "__name__", "") == "ndarray":
        return {"type": "array"}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, UnionType):
        return {"anyOf": [shape(one, shared) for one in inner]}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": shape(inner[1], shared)}
    if origin is tuple and Ellipsis not in inner:
        return {"type": "array", "prefixItems": [shape(one, shared) for one in inner], "items": False}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": shape(inner[0], shared)}
    raise TypeError(f"{hint} has no schema")


def _record(hint: Any, shared: dict[str, Any]) -> dict[str, Any]:
    name = hint.__name__
    if name not in shared:
        shared[name] = {}  # before its fields: one of them may be of the same type
        hints = get_type_hints(hint)
        fields = [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else list(hints)
        required = fields if dataclasses.is_dataclass(hint) else sorted(hint.__required_keys__)
        properties = {field: shape(hints[field], shared) for field in fields}
        shared[name] = {"type": "object", "properties": properties, "required": required}
    return {"$ref": f"#/$defs/{name}"}
