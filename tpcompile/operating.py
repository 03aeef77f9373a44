"""The operating point: a method's dial turned until samples of real data cost a given FLOPs ratio, without learning.

What counts is the ratio that a manifest calls ``paper``, of all samples together: dense FLOPs over pruned, unpadded. Of a masked method
its formula is taken once from the placed program, and evaluated at the tokens that the eager model keeps; of a method that gathers by
itself the eager model's own products are counted, which is the same.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tpcompile.capture import capture
from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.flops import Counts, saving
from tpcompile.manifest import FittedInfo, Flops
from tpcompile.passes import GraphPass, Pipeline, Place, Skip, pipeline
from tpcompile.passes.cost import polynomial
from tpcompile.program import Program
from tpcompile.subject import Subject

if TYPE_CHECKING:
    from tpcompile.models import Pruned

SAMPLES = 48
"""The most samples that a factor is found on."""
WIDEN, FURTHEST = 4.0, 12
"""The bracket's steps, and how many of them: a factor between ``4 ** -12`` and ``4 ** 12``."""
HALVINGS = 16
"""Of the bracket: far finer than what one more kept token changes."""

Ratio = Callable[["Pruned"], float]
Progress = Callable[[str, int, int], None]


def check_target(target: float) -> None:
    """Refuse what is no saving.

    Raises:
        UsageError: a ratio of 1 or below, or none at all.
    """
    if not target > 1 or not math.isfinite(target):
        raise UsageError(f"the FLOPs ratio asked for is {target:g}", fix="give dense over pruned, above 1: 2 for half the FLOPs")


def fit(subject: Subject, target: float, samples: Sequence[Sample], data: str, progress: Progress | None = None) -> Subject:
    """Find the factor of a method's dial at which samples cost a FLOPs ratio: the least one that reaches it.

    Args:
        subject: pruned by one of our methods; the values of its dial are a shape, whose proportions stay.
        target: dense over pruned, above 1.
        samples: real inputs, one or more; the first `SAMPLES` are run, one by one.
        data: what they are called.
        progress: called before every run of the samples.

    Returns:
        The subject with the fitted parameters, and how they were found in ``fitted``.

    Raises:
        UsageError: the method has no dial, or no factor reaches the target.
    """
    check_target(target)
    moves, rows = subject.pruned.moves, samples[:SAMPLES]
    ratio = _watched(ratio_on(subject, rows), f"fit FLOPs /{target:g} on {len(rows)} samples", progress)
    factor, reached = search(lambda factor: ratio(subject.pruned.turned(factor)), target, subject.pruned.method)
    found = subject.turned(factor)
    facts = FittedInfo(target=target, reached=reached, factor=factor, moves=moves, samples=len(rows), data=data)
    return replace(found, fitted=facts)


def search(ratio: Callable[[float], float], target: float, method: str) -> tuple[float, float]:
    """The least factor at which a ratio reaches a target, and what it is there.

    A token that a stronger decision drops can let a later one keep another: the ratio need not rise everywhere, and what comes back is
    measured, not interpolated.

    Args:
        ratio: of a factor.
        target: of it.
        method: its name, for the refusal.

    Raises:
        UsageError: no factor reaches the target, or none stays below it; with the end of what can be reached.
    """
    known = {1.0: ratio(1.0)}
    step = WIDEN if known[1.0] < target else 1 / WIDEN
    for power in range(1, FURTHEST + 1):
        known[step**power] = ratio(step**power)
        if (known[step**power] < target) == (step < 1):
            break
    else:
        end, word = (max, "most") if step > 1 else (min, "least")
        raise UsageError(
            f"method {method} cannot cost FLOPs /{target:g} on this data: the {word} that its dial gives is /{end(known.values()):.4g}",
            fix="ask for a ratio within that, or give other values to start from",
        )
    low, high = sorted(list(known)[-2:])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        known[middle] = ratio(middle)
        low, high = (middle, high) if known[middle] < target else (low, middle)
    return high, known[high]


def ratio_on(subject: Subject, samples: Sequence[Sample]) -> Ratio:
    """What tells the FLOPs ratio, over all samples, of a subject's model with its dial turned."""
    given = [{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in row.inputs.items()} for row in samples]
    lengths = [subject.pruned.tokens(**inputs) for inputs in given]
    first = subject.pruned.trace(**given[0])
    sites = [block for block, base in enumerate(first.bases) if base is not None]
    if not sites:
        return _eager(subject.pruned, given)
    placed, left = _placed(subject)
    sites, paper = [sites[number] for number in left], polynomial(placed)
    names = ("t0", *(f"t{number + 1}" for number in range(len(sites))))
    flops = Flops(tokens=names, paper=paper, dense=tuple((work, ("t0",) * len(sizes)) for work, sizes in paper))

    def masked(pruned: "Pruned") -> float:
        counts = []
        for length, inputs in zip(lengths, given, strict=True):
            kept = pruned.trace(**inputs).kept
            alive = tuple(int(kept[block].sum()) for block in sites)
            counts.append(Counts(length, alive, alive))
        work = saving(flops, counts)
        return work.paper_dense / work.paper_pruned

    return masked


def _placed(subject: Subject) -> tuple[Program, tuple[int, ...]]:
    """The masked program as its method has it, before a pass saves what papers count, and which of the method's sites it has."""
    steps = pipeline(subject.batch, subject.assume_masked, skip_below=subject.skip_below).passes
    upto = next(number for number, step in enumerate(steps) if isinstance(step, Place))
    skipped: set[int] = set()

    def watch(step: GraphPass, before: Program, after: Program, seconds: float) -> None:
        if isinstance(step, Skip):
            keeps = {site.keep for site in after.sites}
            skipped.update(number for number, site in enumerate(before.sites) if site.keep not in keeps)

    placed = Pipeline(steps[: upto + 1])(capture(subject.model, subject.inputs, subject.dynamic, subject.ranges), watch)
    return placed, tuple(number for number in range(len(placed.sites) + len(skipped)) if number not in skipped)


def _eager(shape: "Pruned", given: Sequence[Mapping[str, Tensor]]) -> Ratio:
    """The ratio of a model that gathers by itself: products of eager runs."""
    dense = sum(_products(shape.dense, inputs) for inputs in given)
    return lambda pruned: dense / sum(_products(pruned, inputs) for inputs in given)


def _products(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> int:
    with _counting() as counter:
        model(**inputs)
    return int(counter.get_total_flops())


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Attention in plain products: a fused one is counted by another formula."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _watched(ratio: Ratio, what: str, progress: Progress | None) -> Ratio:
    """The same, each set of parameters measured once, and told."""
    known: dict[str, float] = {}
    steps = count()

    def watched(pruned: "Pruned") -> float:
        key = str(pruned.method_parameters)
        if progress is not None:
            progress(what, next(steps), 1 + FURTHEST + HALVINGS)
        if key not in known:
            known[key] = ratio(pruned)
        return known[key]

    return watched
