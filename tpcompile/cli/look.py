"""The verbs that only look: ``inspect`` and ``passes``."""

import inspect as python_inspect
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpcompile.cli.program import Verb, VerbGroup
from tpcompile.cli.settings import Settings
from tpcompile.errors import UsageError

if TYPE_CHECKING:
    from tpcompile.manifest import Manifest

CASES = "; the module docstring lists the cases."
"""What a pass's docstring says to a reader of the code; `passes show` prints them."""


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.pass_obj
def inspect(settings: Settings, bundle: Path) -> None:
    """Show what a bundle holds: model, method, sites, inputs, files. Reads the manifest only; see `verify` for the files."""
    from tpcompile import bundle as store

    manifest = store.read(bundle).manifest
    document = {"bundle": str(bundle), "identity": manifest.identity, "manifest": manifest.model_dump(mode="json")}
    settings.emit(document, _page(manifest))


def _page(manifest: "Manifest") -> str:
    method, how = manifest.method, f"lowering {manifest.lowering}, form {manifest.form}, batch {manifest.batch}"
    rows = [
        ("target", f"{manifest.target} ({manifest.role}), {manifest.precision}, {how}"),
        ("model", f"{manifest.model.id} ({manifest.model.family}, {manifest.model.architecture})"),
        ("method", f"{method.name} {method.parameters}" if method is not None else "none"),
        *([("fitted", manifest.fitted.text())] if manifest.fitted is not None else []),
        ("dims", ", ".join(f"{name} {low}..{high}" for name, (low, high) in manifest.dims.items())),
        *([("GPUs", ", ".join(manifest.capabilities))] if manifest.capabilities else []),
        *([] if manifest.verified_on else [("verified", "never run: engines of this target are built, and no test of tpcompile runs one")]),
        *(("input", str(entry.spec)) for entry in manifest.inputs),
        *(("output", str(entry.spec)) for entry in manifest.outputs),
        *(("site", f"{site.name}  {site.module}  keeps {site.keeps}") for site in manifest.sites),
        *(("assumes", text) for text in manifest.assumptions),
        ("pipeline", manifest.pipeline),
        *(("file", f"{entry.size:>12,} B  {name}") for name, entry in manifest.files.items()),
        ("identity", manifest.identity),
    ]
    return "\n".join(f"{name:<9} {text}" for name, text in rows)


@click.group(cls=VerbGroup)
def passes() -> None:
    """The passes between a captured and a compact program."""


@passes.command(name="list")
@click.pass_obj
def list_passes(settings: Settings) -> None:
    """Name every pass in the order it runs, with the stages it takes and gives."""
    from tpcompile.passes import DEFAULT

    rows = [_pass_row(found) for found in DEFAULT.passes]
    text = "\n".join(f"{row['name']:<14}{row['takes']:>9} -> {row['gives']:<9} {row['does']}" for row in rows)
    settings.emit({"pipeline": str(DEFAULT), "passes": rows}, f"{text}\n\n{DEFAULT}")


@passes.command()
@click.argument("name")
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Print what a pass does, case by case, and its options with their defaults."""
    from tpcompile.passes import PASSES

    if name not in PASSES:
        raise UsageError(f"no pass is called '{name}'", fix=f"choose one of {', '.join(PASSES)}")
    found = PASSES[name]
    cases = python_inspect.getdoc(sys.modules[found.__module__]) or ""
    doc = (python_inspect.getdoc(found) or "").replace(CASES, ".")
    document = {**_pass_row(found), "doc": doc, "cases": cases, "options": _options(found)}
    lines = [f"{name}: {document['takes']} -> {document['gives']}", "", doc, "", cases]
    lines += [f"\noption {key} = {value!r}" for key, value in document["options"].items()]
    settings.emit(document, "\n".join(lines))


def _pass_row(found: Any) -> dict[str, Any]:
    doc = python_inspect.getdoc(found) or ""
    stages = {"takes": found.takes.name.lower(), "gives": found.gives.name.lower()}
    return {"name": found.name, **stages, "does": doc.partition("\n")[0].replace(CASES, ".")}


def _options(found: Any) -> dict[str, Any]:
    """A pass's fields are its options; here with their defaults."""
    if not is_dataclass(found):
        return {}
    return {entry.name: None if entry.default is MISSING else entry.default for entry in fields(found)}
