"""``verify``: is a bundle what was exported, and does it still compute here what it computed there?

Every file is hashed and every test vector replayed. The vectors are judged as ``validate`` judges: where a token changed sides though its
score lies within float noise of the threshold, the vector is counted, not judged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpcompile import bundle as bundles
from tpcompile import environment
from tpcompile.bundle import Vector
from tpcompile.engine import load
from tpcompile.errors import Inconclusive, ParityError
from tpcompile.kept import Kept
from tpcompile.proof.difference import NOISE, TOLERANCE, Difference, Tolerances, compare_outputs, worst
from tpcompile.proof.judgement import judge
from tpcompile.proof.keptsets import Decided, Flip, compare_kept
from tpcompile.timing.stats import as_json


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not here as it was where the bundle was made: a version, or the processor."""

    name: str
    exported: str
    here: str


@dataclass(frozen=True)
class Verification:
    """The result of ``verify``.

    Attributes:
        identity: of the bundle.
        files: number of files that are as the manifest says.
        vectors: number of test vectors that were replayed.
        verdict: ``PASSED``, ``FAILED`` or ``INCONCLUSIVE``.
        reason: one sentence.
        exit_code: 0, 5 or 10.
        flipped: vectors that were not judged: a token lies within float noise of its threshold.
        outputs: the worst of each output.
        changes: versions and hardware that differ from those of the export; they fail nothing by themselves.
    """

    identity: str
    files: int
    vectors: int
    verdict: str
    reason: str
    exit_code: int
    flipped: int = 0
    outputs: Mapping[str, Difference] | None = None
    changes: tuple[Change, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON document."""
        return dict(as_json(self))

    def text(self) -> str:
        """The result as a few plain lines."""
        rows = [f"{self.files} files unchanged, {self.vectors} test vectors replayed"]
        rows += [f"  {name:<26}off by {d.max_abs:.1e}, needs {d.required:.1e}" for name, d in (self.outputs or {}).items()]
        return "\n".join([*rows, *(f"exported with {c.name} {c.exported}, here {c.here}" for c in self.changes)])


def verify(path: str | Path) -> Verification:
    """Hash a bundle's files, replay its test vectors, and compare versions and hardware.

    Raises:
        UsageError: there is no bundle.
        IntegrityError: a file is not what the manifest says.
        TpcompileError: the engine cannot be opened.
    """
    found = bundles.read(path)
    found.verify()
    law = Tolerances(found.manifest.tolerance.get("parity", TOLERANCE))
    noise = found.manifest.tolerance.get("noise", NOISE)
    vectors, words, outputs = found.vectors(), [], []
    with load(found.path) as engine:
        for vector in vectors:
            given, kept = engine.kept_each(**vector.inputs)
            outputs.append(compare_outputs(given, vector.outputs, law))
            words.append(judge(outputs[-1], tuple(_flips(vector, kept)), law, noise))
    verdict, reason, code = _verdict(words)
    moved = tuple(Change(*change) for change in environment.changes(found.manifest.environment))
    flipped = sum(word == "noise" for word, _ in words)
    count = len(found.manifest.files)
    return Verification(found.identity, count, len(vectors), verdict, reason, code, flipped, worst(outputs), moved)


def _verdict(words: list[tuple[str, str]]) -> tuple[str, str, int]:
    failed = [f"vector {number}: {why}" for number, (word, why) in enumerate(words) if word == "failed"]
    if failed:
        return "FAILED", f"{len(failed)} of {len(words)} vectors differ; {failed[0]}", ParityError.exit_code
    if not words:
        return "INCONCLUSIVE", "every file is as exported; there is no vector to replay", Inconclusive.exit_code
    noisy = sum(word == "noise" for word, _ in words)
    forgiven = f"{noisy} of {len(words)} vectors not judged: a token within float noise of its threshold"
    if 2 * noisy > len(words):
        return "INCONCLUSIVE", f"every file is as exported; {forgiven}", Inconclusive.exit_code
    return "PASSED", f"every file is as exported; {forgiven}" if noisy else "every file and vector is as exported", 0


def _flips(vector: Vector, kept: tuple[Kept, ...]) -> Iterator[Flip]:
    """Where the engine keeps other tokens than were recorded; without recorded scores no flip is forgiven."""
    if not vector.kept:
        return
    for b, now in enumerate(kept):
        masks = tuple(mask[b] for mask in vector.kept)
        scores = tuple(score[b] for score in vector.scores) or tuple(np.full(mask.shape, np.nan, np.float32) for mask in masks)
        yield from compare_kept(now, Decided(masks, scores), len(masks[0]))[0]
