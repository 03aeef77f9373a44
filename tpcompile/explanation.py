"""What the compiler made of a model: sites, masks it refused and why, what the proof takes for granted, and where the work goes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from tpcompile.capture import Dynamic, capture
from tpcompile.flops import Polynomial, evaluate
from tpcompile.passes import pipeline
from tpcompile.passes.base import GraphPass
from tpcompile.passes.cost import by_module, polynomial
from tpcompile.program import Program, Site, Stage
from tpcompile.subject import Subject, subject_of
from tpcompile.text import line

STEPS = ("load", "capture", "prove and compact", "run the example")
UNITS = ((1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs"))

Sizes = Mapping[str, int]
"""Token set -> how many tokens."""


TRIED = ("recognised: ", "refused: ", "shared: ")
"""How the lines of a report begin that tell of masks; the others are of passes that save work."""


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one sample in a part of the model, at the example's counts.

    Attributes:
        name: of the part: a layer's module path, a product of token sets, or ``all``.
        dense: with every token kept.
        paper: at the tokens alive where the masked program has the op.
        graph: at the rows the compact program holds.
    """

    name: str
    dense: float
    paper: float
    graph: float


@dataclass(frozen=True)
class Explanation:
    """A compiled model, with its example run.

    Attributes:
        subject: what was compiled.
        placed: its masked form.
        compact: its gathered form.
        alive: tokens alive in each set, in the example's first sample.
        stored: rows that the compact program holds of each set: a pinned row is stored though dead, a batch is as wide as its widest.
    """

    subject: Subject
    placed: Program
    compact: Program
    alive: Sizes
    stored: Sizes

    def formulas(self) -> dict[str, Polynomial]:
        """FLOPs of a sample over the sizes of the token sets: ``dense``, ``paper`` and ``graph``, as a manifest has them."""
        paper = polynomial(self.placed)
        return {"dense": _dense(paper), "paper": paper, "graph": polynomial(self.compact)}

    def by_tokens(self) -> list[Work]:
        """The work at each product of token sets; the product of none has sizes that never change."""
        paper, graph = ({tuple(names): c for c, names in polynomial(program)} for program in (self.placed, self.compact))
        terms = dict.fromkeys(sorted([*paper, *graph], key=lambda names: (names[::-1], len(names))))
        return [
            self._work(" x ".join(names) or "fixed", [(paper.get(names, 0), names)], [(graph.get(names, 0), names)])
            for names in terms
        ]

    def by_layer(self) -> list[Work]:
        """The work of each layer in program order, and of ``all``."""
        paper, graph = _by_layer(self.placed), _by_layer(self.compact)
        rows = [self._work(name, paper.get(name, ()), graph.get(name, ())) for name in dict.fromkeys([*paper, *graph])]
        return [*rows, self._work("all", polynomial(self.placed), polynomial(self.compact))]

    def _work(self, name: str, paper: Polynomial, graph: Polynomial) -> Work:
        full = dict.fromkeys(self.alive, self.alive["t0"])
        return Work(name, evaluate(paper, full), evaluate(paper, self.alive), evaluate(graph, self.stored))

    def to_json(self) -> dict[str, Any]:
        """The document of ``tpcompile explain MODEL``."""
        info, method = self.subject.info, self.subject.method
        work: dict[str, Any] = {name: [[c, list(names)] for c, names in terms] for name, terms in self.formulas().items()}
        rows = [{"module": row.name, "dense": row.dense, "paper": row.paper, "graph": row.graph} for row in self.by_layer()]
        return {
            "model": {"id": info.id, "family": info.family, "architecture": info.architecture},
            "method": None if method is None else {"name": method.name, "parameters": dict(method.parameters)},
            "batch": self.subject.batch,
            "dims": {name: list(sizes) for name, sizes in self.compact.dims.items()},
            "sites": [self._site(site) for site in self.compact.sites],
            "tokens": [{"name": name, "alive": count, "stored": self.stored[name]} for name, count in self.alive.items()],
            "report": list(self.compact.report),
            "assumptions": list(self.compact.assumptions),
            "bounds": [{"where": b.where.short, "module": b.where.module, "limit": b.limit} for b in self.placed.bounds],
            "flops": {**work, "modules": rows},
        }

    def _site(self, site: Site) -> dict[str, Any]:
        return {
            "name": site.name,
            "at": str(site.where),
            "module": site.where.module,
            "keep": site.keep,
            "mask": line(self.placed.node(site.keep), self.placed.placements.get(site.keep)),
            "score": site.score or None,
            "keeps": _keeps(site),
            "pinned": site.pinned,
        }

    def text(self) -> str:
        """The same for people; what a site's own row says is not said again."""
        info, method = self.subject.info, self.subject.method
        rows = [
            ("model", f"{info.id} ({', '.join(filter(None, (info.family, info.architecture)))}), batch {self.subject.batch}"),
            ("method", f"{method.name} {method.parameters}" if method is not None else "none: the model's own masks or marks"),
            *(("dims", f"{name} {low}..{high}") for name, (low, high) in self.compact.dims.items()),
            *(row for site in self.compact.sites for row in self._rows(site)),
            *(("tokens", text) for text in self._tokens()),
            *(("tried", text) for text in self.compact.report if text.startswith(TRIED)),
            *(("saves", text) for text in self.compact.report if not text.startswith(("accepted: ", *TRIED))),
            *(("assumes", text) for text in self.compact.assumptions),
            *(
                ("measured", f"{b.where.short} ({b.where.module}): by `validate`, up to {b.limit:.0f}")
                for b in self.placed.bounds
            ),
        ]
        return "\n".join([*(f"{name:<9} {text}".rstrip() for name, text in rows), "", *self._tables()])

    def _rows(self, site: Site) -> Iterator[tuple[str, str]]:
        found = self._site(site)
        yield site.name, found["at"]
        yield "", f"keeps {found['keeps']} by {found['mask']}"
        if site.pinned:
            yield "", f"pins the first {site.pinned}: stored even when dropped, for what reads their position"

    def _tokens(self) -> Iterator[str]:
        yield f"t0: {self.alive['t0']} in the example"
        for site in self.compact.sites:
            name = site.tokens.name
            yield f"{_keeps(site)}, from {site.name}: {self.alive[name]} in the example, {self.stored[name]} stored"

    def _tables(self) -> Iterator[str]:
        layers = self.by_layer()
        unit, name = next((unit for unit in UNITS if layers[-1].dense >= unit[0]), UNITS[-1])
        yield f"{name} of the example: with every token (dense), the tokens alive (paper), the rows of the compact program (graph)"
        for head, rows in (("by tokens", self.by_tokens()), ("by layer", layers)):
            yield f"{head:<44} {'dense':>12} {'paper':>12} {'graph':>12}"
            yield from (f"  {r.name:<42} {r.dense / unit:>12.3f} {r.paper / unit:>12.3f} {r.graph / unit:>12.3f}" for r in rows)


def explain(
    model: nn.Module | ExportedProgram | str | Path, inputs: Mapping[str, Tensor] | None = None, *, dynamic: Dynamic | None = None,
    method: str | None = None, parameters: Mapping[str, Any] | None = None, pooling: str = "auto", batch: str = "one",
    checkpoint: str | Path | None = None, assume_masked: Sequence[str] = (), progress: Callable[[str, int, int], None] | None = None,
) -> Explanation:  # fmt: skip
    """Compile a model as far as the compact program, and say what was found. Arguments are those of ``tpcompile.export``.

    Raises:
        TpcompileError: the model is refused; ``error.report`` holds the masks that were tried.
    """

    def say(step: str) -> None:
        if progress is not None:
            progress(step, STEPS.index(step), len(STEPS))

    say("load")
    weights = None if checkpoint is None else Path(checkpoint)
    subject = subject_of(model, inputs, dynamic, method, parameters, pooling, batch=batch, checkpoint=weights)
    say("capture")
    captured = capture(subject.model, subject.inputs, subject.dynamic, subject.ranges)
    stages: dict[Stage, Program] = {}

    def watch(step: GraphPass, before: Program, after: Program, seconds: float) -> None:
        stages[after.stage] = after

    say("prove and compact")
    compact = pipeline(batch, assume_masked)(captured, watch)
    say("run the example")
    placed = stages[Stage.PLACED]
    return Explanation(subject, placed, compact, *_counts(placed, compact, subject.inputs))


def _counts(placed: Program, compact: Program, inputs: Mapping[str, Tensor]) -> tuple[Sizes, Sizes]:
    """Tokens alive and rows stored of each set, in the first sample."""
    masks, index = placed.trace(**inputs).keep, compact.trace(**inputs).index
    sets, total = [site.tokens.name for site in compact.sites], int(masks[0].shape[1])
    alive = {"t0": total} | {name: int(mask[0].sum()) for name, mask in zip(sets, masks, strict=True)}
    stored = {name: int(found.shape[1]) for name, found in zip(sets, index, strict=True) if found is not None}
    return alive, {"t0": total} | stored


def _keeps(site: Site) -> str:
    return f"{site.tokens.name} < t{site.tokens.level - 1}"


def _dense(paper: Polynomial) -> Polynomial:
    return [(c, ("t0",) * len(names)) for c, names in paper]


def _by_layer(program: Program) -> dict[str, Polynomial]:
    found: dict[str, list[tuple[float, Sequence[str]]]] = {}
    for module, terms in by_module(program).items():
        found.setdefault(_layer(module), []).extend(terms)
    return dict(found)


def _layer(module: str) -> str:
    """``encoder.layer.3`` of ``encoder.layer.3.attention.self.query``; the module itself where no part is a number."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else module or "(the model itself)"
