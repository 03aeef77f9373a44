"""The verbs that compare: ``diff`` and ``bisect``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tpcompile.cli.export import method_of, parameter, say_shape
from tpcompile.cli.gates import DATA
from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings
from tpcompile.errors import UsageError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
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
        from tpcompile.compare import differ

        found = differ.diff(a, b)
    settings.emit(found.to_json(), found.text())
    click.get_current_context().exit(DIFFERS if fail and found.differs else 0)


EXAMPLES = """\b
Examples:
  tpcompile bisect out                                  layer by layer: engine against masked reference
  tpcompile bisect out --data texts.txt -o part         and cut the part at fault out, with a script
  tpcompile bisect out --against older                  against the engine of another bundle of the same model
  tpcompile bisect -m minilm/ --recipe minilm-ltp       pass by pass: every program against the captured one
"""


def _model_options(command: Decorated) -> Decorated:
    """What says which model; as ``export`` takes it."""
    options = (
        click.option("-m", "--model", metavar="MODEL", help="A model directory, or timm/NAME: bisect the passes."),
        click.option("--checkpoint", metavar="F", type=PATH, help="Weights for timm/NAME: a .safetensors file."),
        click.option("--method", metavar="M", help="The pruning method, such as ltp."),
        click.option("--param", "params", multiple=True, type=parameter, metavar="NAME=JSON", help="A parameter of the method."),
        click.option("--recipe", metavar="FILE", type=PATH, help="YAML, or a shipped name."),
        click.option("--pooling", default="auto", show_default=True, metavar="P", help="Of a bare encoder: auto, mean, cls."),
        click.option("--batch", type=click.Choice(["one", "ragged"]), default="one", show_default=True, help="Of a model."),
        click.option("--assume-masked", multiple=True, metavar="SITE", help="As `export` takes it."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=Verb, epilog=EXAMPLES)
@click.argument("bundle", metavar="[DIR]", required=False, type=PATH)
@_model_options
@click.option("--mode", type=click.Choice(["auto", "layer", "stage", "pass"]), default="auto", show_default=True, help="What is searched.")
@click.option(
    "--against", default="masked", show_default=True, metavar="masked|DIR2", help="What a bundle's engine is compared with."
)
@click.option("--data", metavar="F", help=f"{DATA} Default: what is at hand, of several lengths.")
@click.option("--samples", type=click.IntRange(min=1), default=8, show_default=True, help="At most this many samples.")
@click.option("--truncate", is_flag=True, help="Cut texts that are too long instead of refusing them.")
@click.option(
    "--atol", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Tolerance. Default: the bundle's, or 1e-5."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Samples an inference. Default: 1, or 4 where the batch is ragged."
)
@click.option(
    "-o", "--output", "out", metavar="OUT", type=PATH, help="Write the part of a bundle's graph at fault, with a script."
)
@click.pass_obj
def bisect(settings: Settings, /, bundle: Path | None, model: str | None, **options: Any) -> None:
    """Find the first layer at which a bundle's engine leaves its reference, or the first pass that changes a model.

    Several samples of several lengths are compared; the first inner value that differs though all it was computed from agrees is named,
    with its module, the user's line and the weights that differ.

    Exit code 5 where it is found, 0 where nothing differs, 7 where only the outputs differ.
    """
    if (bundle is None) == (model is None):
        raise UsageError(
            "give a bundle or --model, one of the two", fix="tpcompile bisect DIR, or tpcompile bisect -m MODEL --method M"
        )
    chosen = method_of(options.pop("method"), dict(options.pop("params")), options.pop("recipe"))
    with settings.work() as progress:
        from tpcompile import bundle as store
        from tpcompile.compare import bisection

        subject = store.read(bundle).path if bundle is not None else str(model)
        found = bisection.bisect(subject, method=chosen.method, parameters=chosen.parameters, progress=progress, **options)
    settings.emit(found.to_json(), found.text())
    say_shape(settings, chosen)
    settings.verdict(found.verdict, f"{found.subject}: {found.reason}")
    click.get_current_context().exit(found.exit_code)
