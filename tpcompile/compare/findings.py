"""What ``bisect`` found, as a value, a document and a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpcompile.compare.layers import Root
from tpcompile.compare.watch import Judged
from tpcompile.data.samples import Sample
from tpcompile.errors import Inconclusive, ParityError
from tpcompile.timing.stats import as_json

UNCLEAR = 7
"""Exit code where the outputs differ and no inner value explains it; the number of a failed build, as `bisect` of other tools has it."""


@dataclass(frozen=True, slots=True)
class SampleNote:
    """One sample: its number, its tokens, where it came from, and how it was judged: ``equal``, ``noise`` or ``differs``."""

    number: int
    tokens: int
    text: str
    verdict: str
    what: str
    max_abs: float


@dataclass(frozen=True, slots=True)
class Step:
    """One pass, ``capture`` or ``emit``, and how its program was judged; ``error`` where it does not run."""

    name: str
    verdict: str
    sample: int = -1
    what: str = ""
    max_abs: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Culprit:
    """Where the fault lies.

    Attributes:
        step: the pass, or ``emit``; of a staged engine the stage; empty where only layers were compared.
        value: the first inner value that differs; empty where none does.
        module: dotted path of the module that computes it.
        where: the user's line, ``file.py:12``.
        source: the text of that line.
        ops: types of the ops between the last values that agree and this one.
        inputs: those last values.
        sample: number of the sample where it differs most.
        max_abs: by how much there.
        required: the tolerance it would need.
        weights: those that these ops read and that differ: name, and by how much.
    """

    step: str = ""
    value: str = ""
    module: str = ""
    where: str = ""
    source: str = ""
    ops: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    sample: int = -1
    max_abs: float = 0.0
    required: float = 0.0
    weights: tuple[str, ...] = ()

    @classmethod
    def of(cls, root: Root, step: str = "") -> "Culprit":
        """A value at fault, perhaps behind a pass."""
        place = root.where
        gap = root.gap
        weights = tuple(str(change).removeprefix("~ ") for change in root.weights)
        short = place.short if place.file else ""
        return cls(
            step,
            root.name,
            place.module,
            short,
            place.source,
            root.ops,
            root.inputs,
            gap.sample,
            gap.max_abs,
            gap.required,
            weights,
        )

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module, self.where) if part)
        return f"{self.value}{f' ({place})' if place else ''}"


@dataclass(frozen=True)
class Bisection:
    """The result of ``bisect``.

    Attributes:
        subject: what was bisected.
        mode: ``pass``, ``layer``, or ``stage``: layers of a staged engine.
        against: what it was compared with.
        verdict: ``PASSED`` (nothing differs), ``FAILED`` (the fault is found) or ``INCONCLUSIVE``.
        reason: one sentence.
        exit_code: 0; 5 found; 7 outputs differ, and no inner value explains it; 10 no sample could be judged.
        tolerance: of the law.
        samples: one record each; by pass, against the last step that ran.
        steps: by pass, in order, up to the first that differs; by stage, all of them.
        culprit: where the fault lies.
        others: further values that differ though all they were computed from agrees.
        compared: inner values that were compared.
        skipped: inner values of one name that could not be.
        written: the folder with the part cut out; empty where none was asked for.
    """

    subject: str
    mode: str
    against: str
    verdict: str
    reason: str
    exit_code: int
    tolerance: float
    samples: tuple[SampleNote, ...]
    steps: tuple[Step, ...] = ()
    culprit: Culprit | None = None
    others: tuple[Culprit, ...] = ()
    compared: int = 0
    skipped: int = 0
    written: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON document; values that are not finite are written as None."""
        return dict(as_json(self))

    def text(self) -> str:
        """The result as lines."""
        width = max([12, *(len(step.name) for step in self.steps)]) + 2
        rows = [
            f"{step.name:<{width}}{_judged(step.verdict, step.sample, step.what, step.max_abs, step.error)}"
            for step in self.steps
        ]
        if not self.steps:
            rows = [
                f"sample {note.number:<3}{note.tokens:>5} tokens  {_judged(note.verdict, -1, note.what, note.max_abs)}"
                for note in self.samples
            ]
        if self.culprit is not None:
            rows += _block(self.culprit, self.mode)
        rows += [f"also      {other}" for other in self.others]
        if self.compared:
            rows.append(f"values    {self.compared} compared, {self.skipped} not comparable")
        return "\n".join([*rows, *([f"written   {self.written}"] if self.written else [])])


def _judged(verdict: str, sample: int, what: str, max_abs: float, error: str = "") -> str:
    if error:
        return f"does not run: {error}"
    if verdict != "differs":
        return {"noise": "not judged: a token lies within float noise of its threshold"}.get(verdict, verdict)
    where = f" in sample {sample}" if sample >= 0 else ""
    return f"differs: {what} by {'other tokens' if what.endswith('.keep') else f'{max_abs:.2e}'}{where}"


def _block(culprit: Culprit, mode: str) -> list[str]:
    rows = [("stage" if mode == "stage" else "pass", culprit.step), ("value", culprit.value), ("module", culprit.module)]
    rows += [("line", f"{culprit.where}  {culprit.source}".strip()), ("ops", ", ".join(culprit.ops))]
    rows += [("from", ", ".join(culprit.inputs)), *(("weight", weight) for weight in culprit.weights)]
    if culprit.value:
        rows.append(("off by", f"{culprit.max_abs:.2e} in sample {culprit.sample}"))
    return [f"{name:<10}{text}" for name, text in rows if text]


def notes(samples: Sequence[Sample], judged: Sequence[Judged]) -> tuple[SampleNote, ...]:
    """One record per sample, in order."""
    by_number = sorted(judged, key=lambda one: one.number)
    return tuple(
        SampleNote(
            one.number, samples[one.number].length, samples[one.number].text[:80], one.verdict, one.what, one.difference.max_abs
        )
        for one in by_number
    )


def worst(judged: Sequence[Judged]) -> Judged | None:
    """The sample that differs most; None where none does."""
    bad = [one for one in judged if one.verdict == "differs"]
    return max(bad, key=lambda one: (one.difference.required, one.difference.max_abs)) if bad else None


def off(one: Judged) -> str:
    """``logits is off by 1.0e-02``, or which kept set differs."""
    if one.what.endswith(".keep") and math.isinf(one.difference.required):
        return f"{one.what.removesuffix('.keep')} keeps other tokens"
    return f"{one.what} is off by {one.difference.max_abs:.2e}"


def nothing(
    subject: str, mode: str, against: str, tolerance: float, samples: tuple[SampleNote, ...], steps: tuple[Step, ...] = ()
) -> Bisection:
    """Nothing differs, or nothing could be judged."""
    equal = [note for note in samples if note.verdict == "equal"]
    if not equal:
        reason = "every sample has a token within float noise of its threshold"
        return Bisection(subject, mode, against, "INCONCLUSIVE", reason, Inconclusive.exit_code, tolerance, samples, steps)
    lengths = [note.tokens for note in equal]
    reason = f"{len(equal)} of {len(samples)} samples, {min(lengths)} to {max(lengths)} tokens, agree with {against} within {tolerance:.0e}"
    return Bisection(subject, mode, against, "PASSED", reason, 0, tolerance, samples, steps)


FOUND = ParityError.exit_code
"""Exit code where the fault is found."""
