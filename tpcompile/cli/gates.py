"""The verbs that time, ``bench`` and ``report``, and what every gate shares: it ends with a verdict line, and fails the process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
DIR = click.Path(path_type=Path)
BATCH = "Samples an inference, padded to the longest. Default: 1, or 8 where the bundle takes batches and validates."
DATA = "Texts: a .txt, .jsonl or .csv file, or docstrings[:PART]. Images: a file, a folder, or digits[:PART]."


class Judgement(Protocol):
    """What a gate returns: Parity, Latency, Verification. ``verdict`` is PASSED, FAILED or INCONCLUSIVE, ``reason`` one sentence."""

    @property
    def verdict(self) -> str: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def exit_code(self) -> int: ...  # noqa: D102
    def to_json(self) -> dict[str, Any]: ...  # noqa: D102
    def text(self) -> str: ...  # noqa: D102


def data_options(command: Decorated) -> Decorated:
    """The options that say what a bundle is run on."""
    command = click.option("--truncate", is_flag=True, help="Cut texts that are too long instead of refusing them.")(command)
    command = click.option("--samples", type=click.IntRange(min=1), help="At most this many samples.")(command)
    return click.option("--data", metavar="F", help=DATA)(command)


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=DIR)
@click.option("--against", default="dense", show_default=True, metavar="dense|DIR2", help="The engine to compare with.")
@data_options
@click.option("--batch-size", "batch", type=click.IntRange(min=1), help=BATCH)
@click.option(
    "--group", type=click.Choice(["stream", "length"]), default="stream", show_default=True, help="How samples make batches."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=2),
    default=4,
    show_default=True,
    help="Fresh engines; each runs the data cold and warm.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each engine.")
@click.option("--slo", metavar="EXPR", help="A latency to keep, such as 'p95<=8ms' or p99=20ms.")
@click.option("--min-speedup", type=click.FloatRange(min=0, min_open=True), help="The speed-up to reach, such as 1.3.")
@click.option(
    "--min-effect",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="The smallest difference, as a share, that is called faster or slower.",
)
@click.option("--confidence", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.95, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Callers at once on one engine: more than 1 measures throughput under load too.",
)
@click.option(
    "--attribute", is_flag=True, help="Profile both engines: where the time goes, and from where on pruning should pay."
)
@click.pass_obj
def bench(settings: Settings, /, bundle: Path, **options: Any) -> None:
    """Measure the engine against the dense one: real inputs in order, interleaved, cold and warm apart.

    Exit code 8 where a target is missed, 10 where the measurement cannot tell.
    """
    with settings.work() as progress:
        from tpcompile import api

        latency = api.bench(bundle, progress=progress, **options)
    leave(settings, latency, bundle)


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=DIR)
@data_options
@click.option("--batch-size", "batch", type=click.IntRange(min=1), help=BATCH)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each engine, for the timing."
)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="F.html",
    type=DIR,
    help="Default: reports/report.html in a bundle, overview.html in a folder.",
)
@click.pass_obj
def report(settings: Settings, /, bundle: Path, **options: Any) -> None:
    """Validate and time a bundle, and show both in one HTML file with the kept words or patches drawn over the input.

    Of a folder with bundles in it, one page compares all by latency and quality; those that have reports are not measured again.
    """
    with settings.work() as progress:
        from tpcompile import api

        page = api.report(bundle, progress=progress, **options)
    settings.emit({"bundle": str(bundle), "report": str(page)}, str(page))


def leave(settings: Settings, result: Judgement, bundle: Path) -> None:
    """Print the result, then the verdict, and leave with its exit code."""
    settings.emit({"bundle": str(bundle), **result.to_json()}, result.text())
    settings.verdict(result.verdict, f"{bundle}: {result.reason}")
    click.get_current_context().exit(result.exit_code)
