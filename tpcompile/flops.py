"""Work as a polynomial over token set sizes: what pruning should save, before anything is timed.

A manifest carries three polynomials (2 x multiply-accumulates): ``paper``, every matmul at the tokens alive where the method's own
program has it, ``graph``, the same counted from the compiled graph, and ``dense``, ``paper`` with every token kept. They are evaluated
at the counts that real inputs kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tpcompile.errors import IntegrityError, UsageError

Polynomial = Sequence[tuple[float, Sequence[str]]]
"""``[(coefficient, ("t0", "t1")), ...]``: the sum of coefficient x product of sizes."""


class Formulas(Protocol):
    """A manifest's ``flops``; see ``tpcompile.bundle.Flops``. A formula that is not known is empty."""

    @property
    def tokens(self) -> Sequence[str]:
        """Names of the token sets: ``t0``, then one per site."""
        ...

    @property
    def paper(self) -> Polynomial:
        """Every matmul at the tokens alive where the masked program has it: the papers' accounting."""
        ...

    @property
    def graph(self) -> Polynomial:
        """The compact graph's work."""
        ...

    @property
    def dense(self) -> Polynomial:
        """The same with every token kept."""
        ...


@dataclass(frozen=True, slots=True)
class Counts:
    """How many tokens one input had, and how many each site left.

    Attributes:
        tokens: at the input, without padding.
        alive: after each site, tokens that still count.
        stored: after each site, rows that the engine holds (a pinned or spare row is stored though dead).
        held: rows that the engine holds at the input: with the padding of a batch; None where there is none.
    """

    tokens: int
    alive: tuple[int, ...]
    stored: tuple[int, ...]
    held: int | None = None


@dataclass(frozen=True, slots=True)
class Saving:
    """Work of one sample or of many, in FLOPs.

    Attributes:
        paper_dense: the paper's formula with no token dropped, unpadded.
        paper_pruned: the same at the counts alive.
        graph_dense: the same matmuls with no token dropped.
        graph_pruned: the compact graph's own count at the rows stored.
    """

    paper_dense: float
    paper_pruned: float
    graph_dense: float
    graph_pruned: float

    @property
    def paper(self) -> float | None:
        """How many times less work, by the paper's formula; None where it is not known."""
        return self.paper_dense / self.paper_pruned if self.paper_pruned else None

    @property
    def graph(self) -> float | None:
        """How many times less work, by the compiled graphs; None where it is not known."""
        return self.graph_dense / self.graph_pruned if self.graph_pruned else None


def evaluate(polynomial: Polynomial, sizes: Mapping[str, int]) -> float:
    """The polynomial's value.

    Args:
        polynomial: pairs of a coefficient and the token sets it is multiplied by.
        sizes: size of each token set, in tokens.

    Raises:
        IntegrityError: the polynomial names a token set that ``sizes`` lacks.
    """
    unknown = {name for _, names in polynomial for name in names} - set(sizes)
    if unknown:
        raise IntegrityError(
            f"the FLOPs polynomial names unknown token sets: {', '.join(sorted(unknown))}", fix="export the bundle again"
        )
    return sum(coefficient * math.prod(sizes[name] for name in names) for coefficient, names in polynomial)


def saving(flops: Formulas, samples: Sequence[Counts]) -> Saving:
    """Work of all samples together.

    Args:
        flops: the manifest's formulas.
        samples: one entry per input, at least one.

    Raises:
        UsageError: there are no samples.
        IntegrityError: the polynomials do not fit the number of sites.
    """
    if not samples:
        raise UsageError("no samples to count FLOPs on", fix="pass data with at least one text")
    each = [_one(flops, counts) for counts in samples]
    return Saving(
        paper_dense=sum(work.paper_dense for work in each),
        paper_pruned=sum(work.paper_pruned for work in each),
        graph_dense=sum(work.graph_dense for work in each),
        graph_pruned=sum(work.graph_pruned for work in each),
    )


def _one(flops: Formulas, counts: Counts) -> Saving:
    names = list(flops.tokens)
    if len(names) != len(counts.alive) + 1:
        raise IntegrityError(
            f"the manifest has {len(names)} token sets, the engine {len(counts.alive)} sites", fix="export the bundle again"
        )
    full, held = dict.fromkeys(names, counts.tokens), counts.held or counts.tokens
    alive = dict(zip(names, (counts.tokens, *counts.alive), strict=True))
    stored = dict(zip(names, (held, *counts.stored), strict=True))
    return Saving(
        paper_dense=evaluate(flops.dense or flops.paper, full),
        paper_pruned=evaluate(flops.paper, alive),
        graph_dense=evaluate(flops.dense, dict.fromkeys(names, held)),
        graph_pruned=evaluate(flops.graph, stored),
    )
