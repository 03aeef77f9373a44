"""The verbs that judge: ``validate``, ``bench``, ``verify``. Each ends with a verdict line, and fails the process on failure."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings
from tpcompile.errors import ParityError

if TYPE_CHECKING:
    from tpcompile.bundle import Bundle

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
DIR = click.Path(path_type=Path)
BATCH = "Samples an inference, padded to the longest. Default: 1, or 8 where the bundle takes batches and validates."
DATA = "Texts: a .txt, .jsonl or .csv file, or docstrings[:PART]. Images: a file, a folder, or digits[:PART]."


class Judgement(Protocol):
    """What a gate returns: Parity and Latency. ``verdict`` is PASSED, FAILED or INCONCLUSIVE, ``reason`` one sentence."""

    @property
    def verdict(self) -> str: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def exit_code(self) -> int: ...  # noqa: D102
    def to_json(self) -> dict[str, Any]: ...  # noqa: D102
    def text(self) -> str: ...  # noqa: D102


def share(text: str) -> float:
    """A share from 0 to 1, given in percentage points (``0.5pp``) or as a fraction (``0.005``)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(pp)?\s*", text)
    if found is None:
        raise click.BadParameter(f"'{text}' is neither points (0.5pp) nor a fraction (0.005)")
    value = float(found[1]) / (100 if found[2] else 1)
    if value > 1:
        raise click.BadParameter(f"'{text}' is more than everything; did you mean {text}pp?")
    return value


def _data_options(command: Decorated) -> Decorated:
    command = click.option("--truncate", is_flag=True, help="Cut texts that are too long instead of refusing them.")(command)
    command = click.option("--samples", type=click.IntRange(min=1), help="At most this many samples.")(command)
    return click.option("--data", metavar="F", help=DATA)(command)


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=DIR)
@_data_options
@click.option(
    "--atol",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Absolute tolerance of engine against masked reference.",
)
@click.option(
    "--rtol",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Relative tolerance of engine against masked reference.",
)
@click.option("--batch-size", "batch", type=click.IntRange(min=1), help=BATCH)
@click.option("--min-agreement", type=click.FloatRange(0, 1), help="Share of samples on which pruned and dense must agree.")
@click.option("--max-drop", type=share, metavar="0.5pp", help="Most the task score may fall from dense to pruned, such as 0.5pp.")
@click.pass_obj
def validate(settings: Settings, /, bundle: Path, **options: Any) -> None:
    """Compare the engine with the masked reference, and the pruned model with the dense one.

    Exit code 5 where engine and reference differ, 6 where pruned is further from dense than allowed.
    """
    with settings.work() as progress:
        from tpcompile import api

        parity = api.validate(bundle, progress=progress, **options)
    _judge(settings, parity, bundle)


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=DIR)
@click.option("--against", default="dense", show_default=True, metavar="dense|DIR2", help="The engine to compare with.")
@_data_options
@click.option("--batch-size", "batch", type=click.IntRange(min=1), help=BATCH)
@click.option(
    "--group", type=click.Choice(["stream", "length"]), default="stream", show_default=True, help="How samples make batches."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=2),
    default=4,
    show_default=True,
    help="Fresh sessions; each runs the data cold and warm.",
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
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure each engine's peak memory.")
@click.pass_obj
def bench(settings: Settings, /, bundle: Path, **options: Any) -> None:
    """Measure the engine against the dense one: real inputs in order, interleaved, cold and warm apart.

    Exit code 8 where a target is missed, 10 where the measurement cannot tell.
    """
    with settings.work() as progress:
        from tpcompile import api

        latency = api.bench(bundle, progress=progress, **options)
    _judge(settings, latency, bundle)


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=DIR)
@_data_options
@click.option("--batch-size", "batch", type=click.IntRange(min=1), help=BATCH)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each engine, for the timing."
)
@click.option("-o", "--output", "out", metavar="F.html", type=DIR, help="Default: reports/report.html in the bundle.")
@click.pass_obj
def report(settings: Settings, /, bundle: Path, **options: Any) -> None:
    """Validate and time a bundle, and show both in one HTML file with the kept words or patches drawn over the input."""
    with settings.work() as progress:
        from tpcompile import api

        page = api.report(bundle, progress=progress, **options)
    settings.emit({"bundle": str(bundle), "report": str(page)}, str(page))


def _judge(settings: Settings, result: Judgement, bundle: Path) -> None:
    """Print the result, then the verdict, and leave with its exit code."""
    settings.emit({"bundle": str(bundle), **result.to_json()}, result.text())
    settings.verdict(result.verdict, f"{bundle}: {result.reason}")
    click.get_current_context().exit(result.exit_code)


@click.command(cls=Verb)
@click.argument("path", metavar="DIR", type=DIR)
@click.pass_obj
def verify(settings: Settings, path: Path) -> None:
    """Hash every file of a bundle and replay its test vectors.

    Exit code 9 where a file is not what the manifest says, 5 where the engine no longer gives the recorded outputs.
    """
    with settings.work():
        from tpcompile import bundle as store

        found = store.read(path)
        found.verify()
        vectors = _replay(found)
    files = len(found.manifest.files)
    document = {"bundle": str(path), "identity": found.identity, "files": files, "vectors": vectors, "verdict": "PASSED"}
    settings.emit(document, f"{files} files unchanged, {vectors} test vectors replayed")
    settings.verdict("PASSED", f"{path}: every file and vector is as exported")


def _replay(found: "Bundle") -> int:
    """Run every test vector; the number of them.

    Raises:
        ParityError: an output is off by more than the manifest's tolerance, or other tokens are kept.
    """
    import numpy as np

    from tpcompile import engine, parity

    vectors = found.vectors()
    tolerance = found.manifest.tolerance.get("parity", parity.TOLERANCE)
    fix = "compare the versions in tpcompile.json with `tpcompile doctor`; export again on this machine"
    with engine.load(found.path) as runner:
        for number, vector in enumerate(vectors):
            outputs, kept = runner.kept_each(**vector.inputs)
            for name, difference in parity.compare_outputs(outputs, vector.outputs).items():
                if not difference.required <= tolerance:
                    message = f"vector {number}: {name} is off by {difference.required:.2e}, allowed is {tolerance:.2e}"
                    raise ParityError(message, fix=fix)
            masks = [np.stack(rows) for rows in zip(*(one.masks for one in kept), strict=True)]
            if vector.kept and not all(map(np.array_equal, masks, vector.kept)):
                raise ParityError(f"vector {number}: other tokens are kept", fix=fix)
    return len(vectors)
