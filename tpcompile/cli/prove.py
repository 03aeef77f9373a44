"""The verbs that prove: ``validate`` and ``verify``."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tpcompile.cli.gates import BATCH, DIR, data_options, leave
from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings


def share(text: str) -> float:
    """A share from 0 to 1, given in percentage points (``0.5pp``) or as a fraction (``0.005``)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(pp)?\s*", text)
    if found is None:
        raise click.BadParameter(f"'{text}' is neither points (0.5pp) nor a fraction (0.005)")
    value = float(found[1]) / (100 if found[2] else 1)
    if value > 1:
        raise click.BadParameter(f"'{text}' is more than everything; did you mean {text}pp?")
    return value


class Tolerance(click.ParamType[tuple[str, float]]):
    """``1e-4``, or ``logits:1e-4`` for the outputs whose name fits a pattern."""

    name = "[OUTPUT:]X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Pattern and number.

        Raises:
            BadParameter: no positive number.
        """
        pattern, _, number = str(value).rpartition(":")
        try:
            found = float(number)
        except ValueError:
            found = 0.0
        if not 0 < found < float("inf"):
            self.fail(f"'{value}' is neither a positive number nor OUTPUT:NUMBER, such as logits:1e-4", param, ctx)
        return pattern or "*", found


def tolerances(_: click.Context, __: click.Parameter, given: Sequence[tuple[str, float]]) -> dict[str, float] | None:
    """What was given, by pattern; None where nothing was. The last that fits counts: a pattern given again moves to the end."""
    found: dict[str, float] = {}
    for pattern, value in given:
        found.pop(pattern, None)
        found[pattern] = value
    return found or None


EXAMPLES = """\b
Examples:
  tpcompile validate out                                          the law on real texts, and on made-up inputs
  tpcompile validate out --atol 1e-4 --atol 'logits:1e-3'         a tolerance of its own for one output
  tpcompile validate out --data glue:sst2:SST-2 --max-drop 0.5pp --confidence 0.95
  tpcompile validate out --data imagenet/ --save-worst worst      the worst inputs, as files --data takes
"""


@click.command(cls=Verb, epilog=EXAMPLES)
@click.argument("bundle", metavar="DIR", type=DIR)
@data_options
@click.option("--atol", multiple=True, type=Tolerance(), callback=tolerances, help="Absolute tolerance, of all outputs or of one.")
@click.option("--rtol", multiple=True, type=Tolerance(), callback=tolerances, help="Relative tolerance, likewise. Default: as --atol.")
@click.option("--batch-size", "batch", type=click.IntRange(min=1), help=BATCH)
@click.option("--min-agreement", type=click.FloatRange(0, 1), help="Share of samples on which pruned and dense must agree.")
@click.option("--max-drop", type=share, metavar="0.5pp", help="Most the task score may fall from dense to pruned, such as 0.5pp.")
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="With which the drop must lie on one side of --max-drop. Default: the measured drop decides.",
)
@click.option("--probes/--no-probes", default=True, show_default=True, help="Also run made-up lengths, batches and buckets.")
@click.option("--float64", metavar="N", type=click.IntRange(min=0), default=4, show_default=True, help="Samples to run in float64.")
@click.option("--save-worst", "worst", metavar="OUT", type=DIR, help="A folder for the worst inputs.")
@click.pass_obj
def validate(settings: Settings, /, bundle: Path, **options: Any) -> None:
    """Compare the engine with the masked reference, and the pruned model with the dense one.

    Exit code 5 where engine and reference differ, 6 where pruned is further from dense than allowed.
    """
    with settings.work() as progress:
        from tpcompile import api

        parity = api.validate(bundle, progress=progress, **options)
    leave(settings, parity, bundle)


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=DIR)
@click.pass_obj
def verify(settings: Settings, bundle: Path) -> None:
    """Hash every file of a bundle, replay its test vectors, and say which versions and hardware are not those of the export.

    A vector with a token inside float noise of its threshold is not judged, as in `validate`. Exit code 9 where a file is not what the
    manifest says, 5 where the engine no longer gives the recorded outputs.
    """
    with settings.work():
        from tpcompile.proof import verification

        found = verification.verify(bundle)
    leave(settings, found, bundle)
