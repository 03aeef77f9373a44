"""``tpcompile explain``: an error's cause, example and fix; which engines can be built; or what was made of a model."""

import difflib
import inspect as python_inspect
import re
from pathlib import Path
from typing import Any

import click

from tpcompile import errors
from tpcompile.cli.export import method_of, model_options, say_shape
from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings
from tpcompile.errors import TpcompileError, UsageError

SECTION = re.compile(r"^(Cause|Example|Fix): (.*?)(?=^\w+: |\Z)", re.MULTILINE | re.DOTALL)

EXAMPLES = """\b
Examples:
  tpcompile explain UnmaskedFold
  tpcompile explain minilm/ --method ltp --param thresholds='[0, 0.002, 0.004]'
  tpcompile explain tpcompile/digits-vit --recipe digits-50 --batch ragged
"""


@click.command(cls=Verb, epilog=EXAMPLES)
@click.argument("name", metavar="MODEL|ERROR-NAME|backends")
@model_options
@click.pass_obj
def explain(settings: Settings, /, name: str, **options: Any) -> None:
    """Explain a model: sites found and masks refused, with reasons; or an error; or `backends`: what can be built here.

    A model is given as for `export`, with its options; it is compiled, and nothing is written.
    """
    known = error_classes()
    if name == "backends":
        _backends(settings)
    elif name in known:
        _error(settings, known[name])
    elif is_model(name):
        _model(settings, name, **options)
    else:
        close = difflib.get_close_matches(name, [*known, "backends"], 1)
        raise UsageError(
            f"no error and no model is called '{name}'" + (f" (did you mean '{close[0]}'?)" if close else ""),
            fix=f"pass a model as for `tpcompile export -m`, or 'backends', or one of {', '.join(sorted(known))}",
        )


def is_model(name: str) -> bool:
    """Whether a word can only mean a model: something on the disk, a path, an id or a traced program."""
    return "/" in name or name.endswith(".pt2") or Path(name).exists()


def _backends(settings: Settings) -> None:
    from tpcompile.cli.machine import backend_rows, backend_text

    rows = backend_rows()
    settings.emit({"backends": rows}, backend_text(rows))


def _error(settings: Settings, found: type[TpcompileError]) -> None:
    doc = python_inspect.getdoc(found) or ""
    sections = {key.lower(): " ".join(text.split()) for key, text in SECTION.findall(doc)}
    name, summary = found.__name__, doc.partition("\n")[0]
    lines = [f"{name}: {summary}", *(f"  {key:<8} {value}" for key, value in sections.items()), f"  exit     {found.exit_code}"]
    settings.emit({"name": name, "exit_code": found.exit_code, "summary": summary, **sections}, "\n".join(lines))


def _model(settings: Settings, model: str, **options: Any) -> None:
    chosen = method_of(options.pop("method"), dict(options.pop("params")), options.pop("recipe"))
    try:
        with settings.work() as progress:
            from tpcompile.explanation import explain as explained

            found = explained(model, method=chosen.method, parameters=chosen.parameters, progress=progress, **options)
    except TpcompileError as error:  # its own text, and the document, are written where every error's are
        for text in error.report:
            settings.say(f"tried     {text}")
        raise
    settings.emit(found.to_json(), found.text())
    say_shape(settings, chosen)


def error_classes() -> dict[str, type[TpcompileError]]:
    """Every deliberate error by name."""
    members = vars(errors).items()
    return {name: value for name, value in members if isinstance(value, type) and issubclass(value, TpcompileError)}
