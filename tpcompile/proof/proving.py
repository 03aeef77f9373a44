"""``validate``: a bundle's engine against its masked reference, and pruned against dense, on data and on made-up inputs."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tpcompile import bundle as bundles
from tpcompile.bundle import Bundle
from tpcompile.data.feeds import batch_of, fixed_batch, samples_of, wants
from tpcompile.data.samples import Sample, batches
from tpcompile.data.tensors import save_worst, vacant
from tpcompile.engine import load, open_reference
from tpcompile.errors import ParityError
from tpcompile.passes.assumptions import UNDERFLOW
from tpcompile.proof.coverage import Coverage, cover, probes_for
from tpcompile.proof.difference import NOISE, TOLERANCE, Bound, Tolerances
from tpcompile.proof.float64 import measure as measure_floor
from tpcompile.proof.judgement import badness
from tpcompile.proof.parity import Parity
from tpcompile.proof.parity import validate as measure_parity
from tpcompile.timing.stats import as_json

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the step and the number of steps."""

MIXED = 8
"""Samples a batch when a ragged bundle is validated: enough for lengths and counts to differ."""
EXACT = 4
"""Samples on which the reference is also run in float64."""
WORST = 5
"""Samples that are saved."""


def validate(path: str | Path, data: str | Path | None = None, samples: int | None = None, atol: Bound | None = None,
             rtol: Bound | None = None, min_agreement: float | None = None, max_drop: float | None = None,
             confidence: float | None = None, truncate: bool = False, batch: int | None = None, probes: bool = True,
             float64: int = EXACT, worst: str | Path | None = None, progress: Progress | None = None) -> Parity:  # fmt: skip
    """Compare a bundle's engine with its masked reference, and pruned with dense, on many samples; no user code is needed.

    Args:
        path: the bundle.
        data: see ``tpcompile.data.load.load_data``; default: docstrings where the bundle has a tokenizer, else its test vectors.
        samples: at most this many; where every inference takes several, what does not fill one is left out.
        atol: absolute tolerance instead of the manifest's 1e-5; or one for each output, by name or pattern.
        rtol: tolerance relative to ``max|masked|``, likewise; default: as ``atol``. The larger of the two allows.
        min_agreement: least agreement with dense.
        max_drop: largest drop of the task's score, as a share.
        confidence: with which the drop must lie on one side of ``max_drop``; default: the measured drop decides.
        truncate: cut texts that are too long instead of refusing them.
        batch: samples an inference, padded to the longest; default 1, or 8 for a ragged bundle.
        probes: also run made-up inputs of the lengths, batch mixes and buckets that the data leaves out.
        float64: samples on which to measure how far the float32 reference is from float64; 0: none. One at a time, so not where every
            inference takes several.
        worst: a folder to save the worst samples to.
        progress: called per batch.

    Raises:
        UsageError: a gate that the data cannot answer, a tolerance for an output that is not there, a folder that exists.
        TpcompileError: see ``tpcompile.errors``.
    """
    found = bundles.read(path)
    manifest, size = found.manifest, batch_of(found, batch, MIXED)
    if worst is not None:
        vacant(Path(worst))
    rows = samples_of(found, data, samples, "docstrings:pairs", truncate)
    together = fixed_batch(manifest)
    rows = rows[: len(rows) - len(rows) % (together or 1)]
    more = probes_for(manifest, wants(found), rows, size) if probes else []
    law = Tolerances.of(manifest.tolerance.get("parity", TOLERANCE), atol, rtol)
    twin = found.dense
    with ExitStack() as stack:
        engine, masked = stack.enter_context(load(path)), stack.enter_context(open_reference(found))
        dense = stack.enter_context(load(twin.path)) if twin is not None else None
        parity = measure_parity(
            engine,
            masked.kept_each,
            dense,
            rows,
            law,
            noise=manifest.tolerance.get("noise", NOISE),
            min_agreement=min_agreement,
            max_drop=max_drop,
            confidence=confidence,
            batch=size,
            along=manifest.along,
            static=manifest.lowering == "static",
            probes=more,
            progress=progress and (lambda done, total: progress("validate", done, total)),
        )
        parity = _bounded(parity, found, masked.margins)
        floor = measure_floor(masked.kept_each, found.reference, manifest, rows, 0 if together > 1 else float64, law)
    parity = replace(parity, floor=floor, coverage=_coverage(found, parity, rows, more, size))
    if worst is not None:
        parity = _saved(parity, rows, [row for group in more for row in group], Path(worst))
    found.report("validate", parity.to_json())
    return parity


def _coverage(found: Bundle, parity: Parity, rows: Sequence[Sample], more: Sequence[Sequence[Sample]], size: int) -> Coverage:
    """What data and probes covered; the samples of one inference hold the same number of rows."""
    groups = [[rows[i] for i in group] for group in batches(rows, size)]
    stored = [parity.samples[sum(map(len, groups[:i]))].stored for i in range(len(groups))]
    stored += [parity.probes[sum(map(len, more[:i]))].stored for i in range(len(more))]
    return cover(found.manifest, [*groups, *more], stored)


def _saved(parity: Parity, rows: Sequence[Sample], more: Sequence[Sample], folder: Path) -> Parity:
    """The parity, its worst samples written to a folder."""
    pairs = [*zip(parity.samples, rows, strict=True), *zip(parity.probes, more, strict=True)]
    chosen = sorted(pairs, key=lambda pair: badness(pair[0]), reverse=True)[:WORST]
    save_worst(folder, [sample for _, sample in chosen], [as_json(record) for record, _ in chosen])
    return replace(parity, saved=str(folder))


def _bounded(parity: Parity, found: Bundle, margins: Mapping[int, float]) -> Parity:
    """The parity, failed where a finite mask did not reach below the logits: then the proof does not hold on this data."""
    for number, bound in enumerate(found.manifest.bounds):
        if (margin := margins.get(number, math.inf)) < UNDERFLOW:
            spread = bound.limit + UNDERFLOW - margin
            reason = (
                f"{bound.module or 'the model'} ({bound.where}): living logits spread by {spread:.0f}, the mask hides keys up to "
                f"{bound.limit:.0f}; dropped tokens still count in the masked model: mask with -inf, or with a lower number"
            )
            return replace(parity, verdict="FAILED", reason=reason, exit_code=ParityError.exit_code)
    return parity
