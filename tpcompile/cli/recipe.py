"""The verbs about recipes: which are shipped, what one holds, and the JSON schema of a recipe's file."""

import json
from pathlib import Path

import click

from tpcompile.cli.program import VerbGroup
from tpcompile.cli.settings import Settings


@click.group(cls=VerbGroup)
def recipe() -> None:
    """The recipes that come with tpcompile, and what a recipe's file may hold."""


@recipe.command(name="list")
@click.pass_obj
def list_recipes(settings: Settings) -> None:
    """Name every shipped recipe with its method and the model it is for."""
    from tpcompile.recipe import Recipe, shipped

    found = {name: Recipe.read(path) for name, path in sorted(shipped().items())}
    rows = [{"name": name, "method": one.method, "model": one.model} for name, one in found.items()]
    settings.emit({"recipes": rows}, "\n".join(f"{row['name']:<24}{row['method']:<16}{row['model'] or ''}" for row in rows))


@recipe.command()
@click.argument("name", type=click.Path(path_type=Path))
@click.pass_obj
def show(settings: Settings, name: Path) -> None:
    """Print a recipe: a shipped name, or a YAML file, which is checked."""
    from tpcompile.models.methods import find_method, validate
    from tpcompile.recipe import Recipe

    found = Recipe.read(name)
    validate(find_method(found.method), found.parameters)
    lines = [f"method {found.method}", f"model  {found.model or 'any'}", *([found.note] if found.note else [])]
    lines += [f"  {key} = {json.dumps(value)}" for key, value in found.parameters.items()]
    settings.emit(found.model_dump(mode="json"), "\n".join(lines))


@recipe.command()
@click.pass_obj
def schema(settings: Settings) -> None:
    """Print the JSON schema of a recipe's file: every method with its parameters, ranges and defaults."""
    from tpcompile.models import METHODS
    from tpcompile.recipe import schema_of

    found = schema_of({name: method.Parameters for name, method in METHODS.items()})
    settings.emit({"schema": found}, json.dumps(found, indent=2))
