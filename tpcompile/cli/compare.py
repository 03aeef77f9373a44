"""The verbs that compare: ``diff`` and ``bisect``."""

from pathlib import Path

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings

PATH = click.Path(path_type=Path)
DIFFERS = 11
"""Exit code of ``diff --exit-code``. An answer, not an error: no class of `tpcompile.errors` has it."""


@click.command(cls=Verb)
@click.argument("a", metavar="A", type=PATH)
@click.argument("b", metavar="B", type=PATH)
@click.option("--exit-code", "fail", is_flag=True, help=f"Leave with {DIFFERS} where the two differ.")
@click.pass_obj
def diff(settings: Settings, a: Path, b: Path, fail: bool) -> None:
    """Say what differs between two bundles, two .onnx files or two .pt2 files: manifest, files, ops, weights by name.

    Versions and hardware are shown, but are no difference: the same model gives the same bundle anywhere.
    """
    with settings.work():
        from tpcompile import differ

        found = differ.diff(a, b)
    settings.emit(found.to_json(), found.text())
    click.get_current_context().exit(DIFFERS if fail and found.differs else 0)
