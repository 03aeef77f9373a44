"""The verbs about recipes: which are shipped, what one holds, the JSON schema of a recipe's file, and one fitted to a FLOPs ratio."""

import json
import os
from pathlib import Path
from typing import Any

import click

from tpcompile.cli.export import FLOPS, method_of, model_options
from tpcompile.cli.program import VerbGroup
from tpcompile.cli.settings import Settings

FILE = click.Path(path_type=Path, dir_okay=False)


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
    lines += [f"fitted on data to FLOPs /{found.flops:g}: these values are where it starts"] if found.flops else []
    settings.emit(found.model_dump(mode="json"), "\n".join(lines))


@recipe.command()
@click.pass_obj
def schema(settings: Settings) -> None:
    """Print the JSON schema of a recipe's file: every method with its parameters, ranges and defaults."""
    from tpcompile.models import METHODS
    from tpcompile.recipe import schema_of

    found = schema_of({name: method.Parameters for name, method in METHODS.items()})
    settings.emit({"schema": found}, json.dumps(found, indent=2))


@recipe.command()
@click.option("-m", "--model", required=True, metavar="MODEL", help="A model directory, or timm/NAME.")
@model_options
@click.option("--flops", type=float, metavar="R", help=f"{FLOPS} Default: the recipe's.")
@click.option("--data", metavar="F", help="As --data of validate. Default: the calibration part of what comes with the model.")
@click.option("-o", "--output", "out", required=True, metavar="F.yaml", type=FILE, help="The recipe to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.pass_obj
def fit(settings: Settings, /, model: str, flops: float | None, out: Path, force: bool, **options: Any) -> None:
    """Fit a method to a FLOPs ratio on real data, without learning, and write the recipe for any number of exports."""
    from tpcompile.errors import UsageError

    chosen = method_of(options.pop("method"), dict(options.pop("params")), options.pop("recipe"))
    target = chosen.flops if flops is None else flops
    if target is None:
        raise UsageError("no FLOPs ratio is given", fix="add --flops 2 for half the FLOPs, or give a recipe that names one")
    _check(out, force)
    with settings.work() as progress:
        from tpcompile import api

        found = api.fit(model, target, method=chosen.method, parameters=chosen.parameters, progress=progress, **options)
    found.write(out)
    settings.emit({"path": str(out), **found.model_dump(mode="json")}, f"{out}: {found.method}\n{found.note}")
    settings.say(f"next: tpcompile export onnx -m {model} --recipe {out} -o out")


def _check(out: Path, force: bool) -> None:
    """Refuse, before the fit, a file that could not be written after it.

    Raises:
        UsageError: it exists.
        EnvironmentFault: its folder cannot be written, or made.
    """
    from tpcompile.errors import EnvironmentFault, UsageError

    if out.exists() and not force:
        raise UsageError(f"{out} exists", fix="pass --force to replace it, or another -o")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EnvironmentFault(f"{out} cannot be written: {folder} takes no files", fix="choose another -o")
