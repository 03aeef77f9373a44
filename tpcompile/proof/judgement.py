"""From differences to verdicts: one sample, then all of them. Parity and the replay of test vectors judge alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpcompile.errors import AccuracyError, Inconclusive, ParityError
from tpcompile.proof.agreement import Task
from tpcompile.proof.difference import Difference, Tolerances
from tpcompile.proof.keptsets import Flip


@dataclass(frozen=True, slots=True)
class SampleParity:
    """One sample's comparison.

    Attributes:
        index: its number in the data.
        tokens: its length.
        alive: tokens the engine kept, per site.
        stored: rows the engine held, per site.
        verdict: ``equal``, ``noise`` (flips inside noise, not judged by the law), ``overflow`` (more tokens than a constant count
            holds: approximate, not judged either) or ``failed``.
        reason: why it failed; empty otherwise.
        flips: where the kept sets first differ.
        outputs: per output, against the reference.
        dense: cosine to the dense model, per output; empty without a dense model.
        margins: per site, how far apart the reference's nearest kept and dropped scores lie, see ``keptsets.margins``.
    """

    index: int
    tokens: int
    alive: tuple[int, ...]
    stored: tuple[int, ...]
    verdict: str
    reason: str
    flips: tuple[Flip, ...]
    outputs: Mapping[str, Difference]
    dense: Mapping[str, float]
    margins: tuple[float, ...] = ()

    @property
    def required(self) -> float:
        """The smallest tolerance under which every output passes."""
        return max((difference.required for difference in self.outputs.values()), default=0.0)


class Demands(NamedTuple):
    """What is asked of pruned against dense; see ``validate``."""

    min_agreement: float | None = None
    max_drop: float | None = None
    confidence: float | None = None


def judge(
    outputs: Mapping[str, Difference], flips: Sequence[Flip], law: Tolerances, noise: float, lost: Sequence[int] = ()
) -> tuple[str, str]:
    """One sample's verdict and reason; see ``SampleParity``.

    Args:
        outputs: against the reference.
        flips: where the kept sets first differ.
        law: what an output may be off by.
        noise: how close to its threshold a flipped token must be.
        lost: per site with a constant count, tokens that found no room.
    """
    for name, difference in outputs.items():
        if math.isinf(difference.required):
            return "failed", f"{name} is missing, has another shape, or holds NaN or infinity"
    full = next((site for site, count in enumerate(lost) if count), -1)
    odd = [flip for flip in flips if flip.site != full or flip.kept_by == "engine"]
    if any(flip.margin > noise for flip in odd):
        far = max(odd, key=lambda flip: flip.margin)
        side = "kept" if far.kept_by == "engine" else "dropped"
        return (
            "failed",
            f"site {far.site}: the engine {side} token {far.position}, its score up to {far.margin:.1e} from the threshold",
        )
    if flips:
        return "noise" if len(odd) == len(flips) else "overflow", ""
    for name, difference in outputs.items():
        allowed = law.allowed(name).atol
        if difference.required > allowed:
            return "failed", f"{name} needs a tolerance of {difference.required:.1e}, allowed is {allowed:.1e}"
    return "equal", ""


Verdict = tuple[str, str, int]
"""Word, reason, exit code."""


def judge_all(
    data: Sequence[SampleParity], probes: Sequence[SampleParity], task: Task | None, law: Tolerances, demands: Demands
) -> Verdict:
    """The verdict on all samples.

    Args:
        data: one record per sample of the data.
        probes: one per made-up sample; they can fail, and vouch for nothing.
        task: dense against pruned.
        law: what an output may be off by.
        demands: what is asked of pruned against dense.
    """
    for records, what in ((data, "sample"), (probes, "probe")):
        failed = [record for record in records if record.verdict == "failed"]
        if failed:
            first = f"{what} {failed[0].index}: {failed[0].reason}"
            return "FAILED", f"{len(failed)} of {len(records)} {what}s differ; {first}", ParityError.exit_code
    judged, others = sum(record.verdict == "equal" for record in data), _others(data)
    if not judged:
        return "INCONCLUSIVE", f"the law judged no sample: {others}", Inconclusive.exit_code
    if 2 * judged < len(data):
        return "INCONCLUSIVE", f"only {judged} of {len(data)} samples could be judged: {others}", Inconclusive.exit_code
    if (refusal := _accuracy(task, demands)) is not None:
        return refusal
    inside = f"; left out: {others}" if others else ""
    bound = max(law.allowed(name).atol for name in data[0].outputs)
    return "PASSED", f"{judged} of {len(data)} samples within {bound:.0e} of the masked reference{inside}", 0


def _accuracy(task: Task | None, demands: Demands) -> Verdict | None:
    """Why pruned is too far from dense, or why that cannot be told; None where it is near enough, or nothing is asked."""
    least, most = demands.min_agreement, demands.max_drop
    if task is None:
        asked = least is not None or most is not None
        return ("INCONCLUSIVE", "the dense model gives NaN or infinity", Inconclusive.exit_code) if asked else None
    if least is not None and not task.agreement >= least:
        return "FAILED", f"agreement with dense ({task.name}) is {task.agreement:.4f}, asked for {least}", AccuracyError.exit_code
    if most is None:
        return None
    if task.drop is None:
        return "INCONCLUSIVE", f"the outputs give no right answers to compare ({task.name})", Inconclusive.exit_code
    fall = f"{task.name} falls from {task.dense:.4f} to {task.pruned:.4f}"
    if demands.confidence is None:
        return None if task.drop <= most else ("FAILED", f"{fall}, allowed is {most:.4f}", AccuracyError.exit_code)
    if task.interval is None:
        return "INCONCLUSIVE", f"{fall}: {task.count} cases are too few for an interval", Inconclusive.exit_code
    low, high = task.interval.low, task.interval.high
    known = f"{fall}: with {demands.confidence:.0%} confidence by {low:.4f} to {high:.4f}, allowed is {most:.4f}"
    if low > most:
        return "FAILED", known, AccuracyError.exit_code
    return None if high <= most else ("INCONCLUSIVE", known, Inconclusive.exit_code)


def _others(records: Sequence[SampleParity]) -> str:
    """Why samples were not judged; empty where all were."""
    reasons = {"noise": "a token within float noise of its threshold", "overflow": "more tokens than the constant counts hold"}
    counts = {verdict: sum(record.verdict == verdict for record in records) for verdict in reasons}
    return ", ".join(f"{count} with {reasons[verdict]}" for verdict, count in counts.items() if count)


def badness(record: SampleParity) -> tuple[bool, float]:
    """Orders samples from sound to worst."""
    return record.verdict == "failed", record.required
