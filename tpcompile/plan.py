"""Which lowering and form an engine gets, and why: what the caller asked for, else a rule for the target.

A lowering says how many rows a site stores (``rows.py``), a form whether the engine is one graph or a chain of stages. ``static`` needs a
constant count for each site: the largest, or a quantile, of those that samples of real data keep.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.manifest import MOST_COPIES
from tpcompile.passes.lower import Lower
from tpcompile.program import Program
from tpcompile.rows import MIN_COUNT, Rows

LOWERINGS, FORMS = ("dynamic", "bucketed", "static"), ("single", "staged")
MEDIAN = 0.5
LADDER = (4, 8, 12, 16)
"""Where none is given: multiples of 4 up to 16, of 16 beyond. Where few rows are left, rounding up adds most (decision 0028)."""
LADDERS = ((4,), (4, 8), LADDER)
"""Those that are tried where an input may be padded."""

Data = str | Path | Sequence[Mapping[str, Any]]
"""A data specification (``tpcompile.data.load.load_data``), or inputs by name, a mapping a sample."""


@dataclass(frozen=True)
class Wish:
    """What the caller asks for; checked before any work.

    Attributes:
        lowering: ``auto``, ``dynamic``, ``bucketed`` or ``static``.
        form: ``auto``, ``single`` or ``staged``.
        buckets: the ladder of ``bucketed``, rising; given without a lowering, it means ``bucketed``.
        calibrate: data for the counts of ``static``, or to fit; default: the calibration part of what comes with the model.
        quantile: the share of the samples whose count must fit, for ``static``.
        tune: measure what is left open, on the same data.
        lengths: a ladder that the length of an input is rounded up to, where padding is proved to change nothing.
        prime: carry inputs along that show the shapes to come, and run them when the engine is loaded.
        copies: of the engine, opened by ``load``, each for inputs of other lengths.
        dims: dim name -> least, usual and largest size that the engine must take; within what the model takes.
        fits: a FLOPs ratio is fitted on that data.
        profiled: the target is built for ranges of sizes, so that data can say which counts are usual.
    """

    lowering: str = "auto"
    form: str = "auto"
    buckets: tuple[int, ...] = ()
    calibrate: Data | None = None
    quantile: float = 1.0
    tune: bool = False
    lengths: tuple[int, ...] = ()
    prime: bool = False
    copies: int = 1
    dims: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    profiled: bool = False
    fits: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not belong together.

        Raises:
            UsageError: an unknown name, or an option of another lowering.
        """
        for name, value, known in (("lowering", self.lowering, LOWERINGS), ("form", self.form, FORMS)):
            if value not in ("auto", *known):
                raise UsageError(f"unknown {name} {value!r}", fix=f"use one of: auto, {', '.join(known)}")
        self._ladders()
        self._copies()
        if self.tune and self.form != "auto" and (self.lowering != "auto" or self.buckets):
            raise UsageError("lowering and form are given: nothing is left to tune", fix="leave one of them out, or tune")
        for name, (least, usual, most) in self.dims.items():
            if not 1 <= least <= usual <= most:
                raise UsageError(f"{name} = {least}:{usual}:{most} does not rise", fix="give MIN:OPT:MAX, such as 4:64:128")
        if self.lowering != "static" and not (self.tune or self.prime or self.profiled or self.fits) and self.calibrate is not None:
            raise UsageError(
                f"lowering {self.lowering} calibrates nothing", fix="ask for lowering static, or leave calibrate out"
            )
        if self.lowering != "static" and self.quantile != 1.0:
            raise UsageError(
                f"lowering {self.lowering} has no quantile", fix="ask for lowering static, or leave the quantile out"
            )
        if not 0 < self.quantile <= 1:
            raise UsageError(f"the static quantile is {self.quantile}", fix="give a share above 0 and up to 1, such as 0.99")

    def _copies(self) -> None:
        if not 1 <= self.copies <= MOST_COPIES:
            raise UsageError(f"{self.copies} copies", fix=f"ask for 1 to {MOST_COPIES}")
        if self.copies > 1 and self.form == "staged":
            raise UsageError("stages have no copies", fix="ask for form single, or leave the copies out")

    def _ladders(self) -> None:
        if self.buckets and self.lowering not in ("auto", "bucketed"):
            raise UsageError(
                f"lowering {self.lowering} has no buckets", fix="ask for lowering bucketed, or leave the buckets out"
            )
        for what, sizes in (("buckets", self.buckets), ("lengths", self.lengths)):
            try:
                Rows(sizes)
            except ValueError as error:
                raise UsageError(f"{what}: {error}", fix="give sizes such as 16, or 32,64,128") from error


AUTO = Wish()
"""Nothing asked for."""


@dataclass(frozen=True)
class Plan:
    """What is built.

    Attributes:
        lowering: ``dynamic``, ``bucketed`` or ``static``.
        form: ``single`` or ``staged``.
        buckets: the ladder of ``bucketed``.
        counts: the constant counts of ``static``, one a site.
        lengths: the ladder of the input's length; empty: inputs run as they come.
        square: no op runs over two counts, where that can be: fewer shapes for more rows (docs/decisions/0029).
        usual: the count of each site that data shows to be usual; empty where none was asked. What is exact does not depend on it.
        reason: why, in a sentence.
    """

    lowering: str = "dynamic"
    form: str = "single"
    buckets: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    square: bool = False
    usual: tuple[int, ...] = field(default=(), compare=False)
    reason: str = field(default="", compare=False)

    @property
    def step(self) -> Lower:
        """The pass that writes the policy at the sites."""
        exact = (self.lowering, self.form) == ("dynamic", "single")  # a stage is built for counts of two and more
        return Lower("+".join(map(str, self.buckets)), "+".join(map(str, self.counts)), exact)


STAGES = Plan(
    "bucketed", "staged", reason="rule: a stage has no size that follows from data, and buckets leave few shapes to compile"
)
RULES: Mapping[str, Plan] = {
    "onnx": Plan(reason="rule: ONNX Runtime pays nothing for a new shape, and every row that is stored costs"),
    "openvino": Plan(
        square=True,
        reason="rule: one graph is faster than stages, and new shapes cost; whether buckets pay depends on how often they recur (--tune)",
    ),
    "tensorrt": STAGES,
    "tensorrt-rtx": STAGES,
}
"""Target -> what ``auto`` takes there."""
OTHERWISE = Plan(reason="rule: nothing was measured for this target")


def settle(wish: Wish, target: str, program: Program, samples: Callable[[], tuple[str, Sequence[Sample]]]) -> Plan:
    """Turn a wish into a plan.

    Args:
        wish: what was asked for.
        target: of the engine.
        program: compact.
        samples: gives data to calibrate on, with its name; called only where it is needed.

    Raises:
        UsageError: the program cannot have this lowering or form, or there is no data.
    """
    if program.gathered and wish.form == "staged":
        raise UsageError("a model that gathers by itself is one graph: it is not cut at its sites", fix="leave the form at auto")
    if program.gathered and not program.rows:
        return _own(wish)
    rule = RULES.get(target, OTHERWISE)
    own = "dynamic" if program.gathered else rule.lowering  # one graph: its counts are its own
    lowering = wish.lowering if wish.lowering != "auto" else "bucketed" if wish.buckets else own
    reason = rule.reason if lowering == rule.lowering and wish.lowering == "auto" and not wish.buckets else "asked for"
    form = "single" if program.gathered else rule.form if wish.form == "auto" else wish.form
    if lowering == "static":
        name, rows = samples()
        counts = calibrate(program, rows, wish.quantile)
        share = "the largest count" if wish.quantile == 1 else f"the {wish.quantile:g} quantile of the counts"
        return Plan(lowering, form, (), counts, wish.lengths, reason=f"{reason}; {share} of {len(rows)} samples of {name}")
    ladder, square = wish.buckets or rule.buckets or LADDER, rule.square and not program.gathered
    usual: tuple[int, ...] = ()
    if wish.profiled and wish.calibrate is not None:
        name, rows = samples()
        usual, reason = calibrate(program, rows, MEDIAN), f"{reason}; usual counts of {len(rows)} samples of {name}"
    return Plan(lowering, form, ladder if lowering == "bucketed" else (), (), wish.lengths, square, usual, reason)


def narrow(
    dims: Mapping[str, tuple[int, int]], wanted: Mapping[str, tuple[int, int, int]], example: Mapping[str, int]
) -> dict[str, tuple[int, int, int]]:
    """Least, usual and largest size of every dim of a model: what is wanted, else what the model takes, the example's being usual.

    Raises:
        UsageError: a dim that the model does not have, or a size that it does not take.
    """
    for name, (least, _, most) in wanted.items():
        if name not in dims:
            known = ", ".join(dims) or "none: every size is fixed"
            raise UsageError(f"the model has no dynamic size {name!r}", fix=f"its dynamic sizes: {known}")
        if least < dims[name][0] or most > dims[name][1]:
            low, high = dims[name]
            raise UsageError(f"{name} = {least} to {most}: the model takes {low} to {high}", fix="give a range within that")
    return {name: wanted.get(name, (low, example.get(name, low), high)) for name, (low, high) in dims.items()}


def behind_sites(length: tuple[int, int], plan: Plan, sites: int) -> dict[str, tuple[int, int, int]]:
    """Least, usual and largest count behind each site of a chain, ``t1``, ``t2``, ...

    Args:
        length: fewest and most tokens of an input.
        plan: with the usual counts, where data showed them; else the middle is taken for usual.
        sites: how many there are.
    """
    least = min(MIN_COUNT, length[0])
    rows = Rows(plan.buckets)
    usual = plan.usual or ((least + length[1]) // 2,) * sites
    return {f"t{i + 1}": (least, max(least, min(rows.rung(count), length[1])), length[1]) for i, count in enumerate(usual)}


def _own(wish: Wish) -> Plan:
    """The plan of a model that gathers constant counts by itself."""
    if wish.buckets or wish.lowering not in ("auto", "static"):
        raise UsageError(
            f"lowering {'bucketed' if wish.buckets else wish.lowering} has no place: the model gathers constant counts by itself",
            fix="leave the lowering at auto",
        )
    return Plan("static", lengths=wish.lengths, reason="the model gathers constant counts by itself")


def candidates(
    wish: Wish,
    target: str,
    program: Program,
    samples: Callable[[], tuple[str, Sequence[Sample]]],
    padded: Callable[[], bool] = lambda: False,
) -> list[Plan]:
    """Every plan that a wish leaves open, the rule's own first. ``static`` is one only where it is asked for: it may not be exact.

    Where an input may be padded, its length and the counts behind the sites are rounded up to one ladder, too. Where the rule has every op
    on one count, because new shapes cost, finer ladders of the counts are weighed in any case, and once what that rule costs in rows.

    Args:
        wish: what was asked for.
        target: of the engine.
        program: compact.
        samples: as ``settle`` takes them.
        padded: whether an input may be padded; asked only where it matters.
    """
    first = settle(wish, target, program, samples)
    if program.gathered:
        return [first]
    lowerings = LOWERINGS[:2] if wish.lowering == "auto" and not wish.buckets else (first.lowering,)
    forms = FORMS if wish.form == "auto" and wish.copies == 1 else (first.form,)
    found = [
        replace(first, lowering=lowering, form=form, buckets=(first.buckets or LADDER) if lowering == "bucketed" else ())
        for lowering in lowerings
        for form in forms
    ]
    if "bucketed" in lowerings and "single" in forms:
        both = not wish.lengths and padded()
        ladders = (wish.buckets,) if wish.buckets else LADDERS if both or first.square else ()
        for one in ladders:
            plan = replace(first, lowering="bucketed", form="single", buckets=one, lengths=one if both else first.lengths)
            if plan not in found:
                found.append(plan)
    if first.square:
        found.append(replace(first, square=False))
    return sorted(found, key=lambda plan: plan != first)


def calibrate(program: Program, samples: Sequence[Sample], quantile: float = 1.0) -> tuple[int, ...]:
    """A constant count for each site: what the samples store there, one by one.

    Args:
        program: compact, with the exact lowering.
        samples: one or more.
        quantile: the share of the samples that must fit.
    """
    found = []
    for sample in samples:
        trace = program.trace(**sample.inputs)
        found.append([0 if index is None else index.shape[1] for index in trace.index])
    most = np.quantile(np.array(found), quantile, axis=0, method="higher")
    least = max(MIN_COUNT, *(site.pinned for site in program.sites))
    return tuple(max(least, int(count)) for count in most)
