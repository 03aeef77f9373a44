"""``tpcompile demo``: the main job on a real model and real text."""

from pathlib import Path
from typing import Any

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings


@click.command(cls=Verb)
@click.option("-o", "--output", "out", metavar="DIR", type=click.Path(path_type=Path), default="demo-out", show_default=True)
@click.option("--samples", type=click.IntRange(min=1), help="At most this many texts per step; default: the whole protocol.")
@click.option("--force", is_flag=True, help="Replace an earlier demo's output.")
@click.pass_obj
def demo(settings: Settings, /, **options: Any) -> None:
    """Prune, compile, prove and time a real sentence encoder; ends with a table and an HTML report."""
    with settings.work() as progress:
        from tpcompile.demo import run

        found = run(progress=progress, **options)
    settings.emit(found.to_json(), found.text())
    settings.verdict(found.verdict, f"every engine against the masked model; report: {found.report}")
    click.get_current_context().exit(found.exit_code)
