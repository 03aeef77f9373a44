"""A recipe: a method and its parameters, kept in a YAML file beside a model."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tpcompile.errors import UsageError
from tpcompile.files import replace_file

EXAMPLE = "method: ltp\nparameters:\n  thresholds: [0.001, 0.002]"


class Recipe(BaseModel):
    """What to do to a model.

    Attributes:
        method: the pruning method's name.
        parameters: as the method takes them; the method checks names and values.
        flops: the ratio, dense over pruned, that the parameters are to be fitted to on data: they are a shape then, of which one factor
            is found (``tpcompile.fit``). None: they are what they are.
        model: the model the parameters were chosen on; for people, not read.
        note: how they were chosen; for people, not read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Annotated[str, StringConstraints(min_length=1)]
    parameters: dict[str, Any] = {}
    flops: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    model: str | None = None
    note: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a YAML file; a name without a file of that name is a shipped recipe's, such as ``digits-50``.

        Raises:
            UsageError: the file is missing, is no YAML, or holds something else than a recipe.
        """
        fix = f"a recipe looks like this:\n{EXAMPLE}"
        if not path.exists() and str(path) in shipped():
            path = shipped()[str(path)]
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            known = ", ".join(sorted(shipped()))
            raise UsageError(
                f"cannot read the recipe {path}: {error.strerror}", fix=f"give the path of a YAML file, or one of {known}"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}", fix=fix) from error
        if not isinstance(found, dict):
            raise UsageError(f"{path} holds no mapping", fix=fix)
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, row['loc']))}: {row['msg'].lower()}" for row in error.errors())
            raise UsageError(f"{path} is no recipe: {wrong}", fix=fix) from error

    def write(self, path: Path) -> None:
        """Write a YAML file, whole or not at all; one that is there is replaced, a folder that is not there made."""
        text = yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=120, allow_unicode=True)
        replace_file(path, text)


def schema_of(methods: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The JSON schema of a recipe's file.

    Args:
        methods: name -> its parameters.
    """
    shared = {
        name: value for name, value in Recipe.model_json_schema()["properties"].items() if name not in ("method", "parameters")
    }
    definitions: dict[str, Any] = {}
    kinds = []
    for name, parameters in methods.items():
        own = parameters.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        definitions[name] = own
        needed = ["method", "parameters"] if own.get("required") else ["method"]
        properties = {"method": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}, **shared}
        kinds.append({"type": "object", "properties": properties, "required": needed, "additionalProperties": False})
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": "A recipe of tpcompile", "oneOf": kinds, "$defs": definitions}


def shipped() -> dict[str, Path]:
    """The recipes that come with tpcompile, by name."""
    found = find_spec("tpcompile.models")
    folders = found.submodule_search_locations if found is not None else None
    return {path.stem: path for folder in folders or () for path in Path(folder).glob("recipes/*.yaml")}
