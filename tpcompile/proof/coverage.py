"""Which lengths, batch mixes and buckets a proof has seen; and the made-up batches that fill the gaps the data leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tpcompile.data.probes import Wants, apart, made
from tpcompile.data.samples import Sample
from tpcompile.manifest import Manifest
from tpcompile.rows import MIN_COUNT, Rows

MOST = 12
"""Lengths that are made up at most: each is a batch more."""


@dataclass(frozen=True)
class Coverage:
    """What was run, data and probes together.

    Attributes:
        lengths: the tokens of every inference's longest sample, each once.
        batches: samples an inference -> how many inferences.
        mixed: inferences whose samples differ in length.
        buckets: for each site of lowering ``bucketed``, the sizes of its ladder that it stored.
        unseen: for each such site, those, up to the longest input, that no sample reached.
    """

    lengths: tuple[int, ...] = ()
    batches: Mapping[str, int] = field(default_factory=dict)
    mixed: int = 0
    buckets: tuple[tuple[int, ...], ...] = ()
    unseen: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        sizes = ", ".join(f"{count} of {size}" for size, count in self.batches.items())
        text = f"lengths {self.lengths[0]} to {self.lengths[-1]} ({len(self.lengths)}), batches {sizes}"
        text += f", {self.mixed} of mixed lengths" if self.mixed else ""
        for number, (seen, gaps) in enumerate(zip(self.buckets, self.unseen, strict=True)):
            text += f"; site {number} stored {_listed(seen)}" + (f", never {_listed(gaps)}" if gaps else "")
        return text


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) or "nothing"


def cover(manifest: Manifest, groups: Sequence[Sequence[Sample]], stored: Sequence[Sequence[int]]) -> Coverage:
    """What these inferences covered.

    Args:
        manifest: of the bundle.
        groups: the samples of each inference.
        stored: for each inference, the rows that each site held.
    """
    if not groups:
        return Coverage()
    longest = [max(sample.length for sample in group) for group in groups]
    sizes = sorted({len(group) for group in groups})
    count = {str(size): sum(len(group) == size for group in groups) for size in sizes}
    mixed = sum(len({sample.length for sample in group}) > 1 for group in groups)
    if manifest.lowering != "bucketed":
        return Coverage(tuple(sorted(set(longest))), count, mixed)
    rung = Rows(manifest.buckets).rung
    steps = sorted({rung(needed) for needed in range(MIN_COUNT, max(longest) + 1)})
    seen = tuple(tuple(sorted(set(map(rung, site)))) for site in zip(*stored, strict=True))
    unseen = tuple(tuple(step for step in steps if step not in site) for site in seen)
    return Coverage(tuple(sorted(set(longest))), count, mixed, seen, unseen)


def probes_for(manifest: Manifest, wants: Wants, rows: Sequence[Sample], batch: int) -> list[list[Sample]]:
    """Made-up inferences, from the shortest to the longest input; where batches are dynamic also one, two and three samples together.

    Args:
        manifest: of the bundle.
        wants: what an input is made like.
        rows: the data: lengths it has need no probe.
        batch: samples an inference of the data.
    """
    most = MOST if manifest.lowering == "bucketed" else 4
    fresh = made(wants, most)
    have = {row.length for row in rows}
    chosen = [row for row in fresh if row.length not in have] or fresh[:1]
    if manifest.batch != "ragged":
        return [[row] for row in chosen]
    if isinstance(manifest.inputs[0].shape[0], int):  # every inference takes as many, and what is made up is one
        return [[replace(fresh[0], inputs=row) for row in apart(fresh[0].inputs, True)]]
    mixes = [fresh[:1], [fresh[0], fresh[-1]], [fresh[-1], fresh[0], fresh[len(fresh) // 2]]]
    return [mix for mix in mixes if len(mix) != batch] + [[row] for row in chosen]
