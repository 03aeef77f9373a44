"""Recipes: the shipped ones fit their methods, the schema knows every method, and what is no recipe is refused by text."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tpcompile.cli import main
from tpcompile.errors import UsageError
from tpcompile.models import METHODS
from tpcompile.models.methods import validate
from tpcompile.recipe import Recipe, schema_of, shipped

SCHEMA = schema_of({name: method.Parameters for name, method in METHODS.items()})


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_fits_its_method(name: str) -> None:
    found = Recipe.read(Path(name))
    assert validate(METHODS[found.method], found.parameters)
    assert found.model
    assert found.note


def test_every_method_has_a_recipe() -> None:
    assert {Recipe.read(path).method for path in shipped().values()} == METHODS.keys()


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*map(_references, value.values()))
    return set().union(*map(_references, value)) if isinstance(value, list) else set()


def test_the_schema_names_every_method_and_parameter() -> None:
    kinds = {kind["properties"]["method"]["const"]: kind for kind in SCHEMA["oneOf"]}
    assert kinds.keys() == METHODS.keys()
    for name, kind in kinds.items():
        assert kind["additionalProperties"] is False
        assert set(kind["properties"]) == set(Recipe.model_fields)
        own = SCHEMA["$defs"][name]
        assert own["additionalProperties"] is False
        assert set(own["properties"]) == set(METHODS[name].Parameters.model_fields)
        assert ("parameters" in kind["required"]) == bool(own.get("required"))
    assert _references(SCHEMA) <= {f"#/$defs/{name}" for name in SCHEMA["$defs"]}
    printed = CliRunner().invoke(main, ["recipe", "schema"]).stdout
    assert json.loads(printed) == SCHEMA


FIX = "a recipe looks like this:\nmethod: ltp\nparameters:\n  thresholds: [0.001, 0.002]"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("method: ltp\nparams: {}\n", "is no recipe: params: extra inputs are not permitted"),
        ("parameters: {}\n", "is no recipe: method: field required"),
        ("method: 3\n", "is no recipe: method: input should be a valid string"),
        ("- ltp\n", "holds no mapping"),
        ("method: !!python/object/apply:os.system [ls]\n", "is not YAML: could not determine a constructor for the tag"),
    ],
    ids=["key", "missing", "type", "list", "code"],
)
def test_what_is_no_recipe_is_refused(content: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        Recipe.read(path)
    assert str(caught.value).startswith(f"{path} {text}")
    assert caught.value.fix == FIX


def test_a_recipe_with_unknown_parameters_exits_2(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: evit\nparameters: {base_keep_rate: 1.7, drop_locs: [3]}\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["recipe", "show", str(path)])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == (
        "UsageError: method evit: parameter base_keep_rate = 1.7: input should be less than or equal to 1; "
        "unknown parameter 'drop_locs' (did you mean 'drop_loc'?)"
    )
