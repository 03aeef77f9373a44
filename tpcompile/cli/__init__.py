"""The command line: parsing and printing only; the work is done by `tpcompile.api` and the modules behind it.

One file per group of verbs. Nothing heavy is imported before a verb runs, so that ``tpcompile --help`` answers at once.
"""

import click

from tpcompile.cli.compare import bisect, diff
from tpcompile.cli.demo import demo
from tpcompile.cli.explain import explain
from tpcompile.cli.export import export
from tpcompile.cli.gates import bench, report
from tpcompile.cli.look import inspect, passes
from tpcompile.cli.machine import doctor
from tpcompile.cli.program import Program
from tpcompile.cli.prove import validate, verify
from tpcompile.cli.recipe import recipe
from tpcompile.cli.run import run
from tpcompile.cli.schema import schema

__all__ = ["main"]


@click.group(
    "tpcompile",
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Exit codes: 0 ok, 1 internal, 2 usage, 3 environment, 4 model unsupported, 5 parity, 6 accuracy, 7 backend build, "
    "8 target missed, 9 integrity, 10 inconclusive, 11 differs, 130 interrupted.",
)
@click.version_option(None, "--version", package_name="tpcompile", message="%(package)s %(version)s")
def main() -> None:
    """Compile token-pruned transformers to engines that are really faster, with the proof beside them."""


for _verb in (demo, export, validate, bench, report, inspect, run, verify, diff, bisect, passes, recipe, schema, explain, doctor):
    main.add_command(_verb)
