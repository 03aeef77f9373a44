"""docs/performance.md and README's table, from the documents of the cells alone."""

from collections.abc import Callable, Mapping, Sequence

from figures import PHASES, Document, Figures, figures, row, spread, times

MARKS = "<!-- speed -->"
DISTURBED = 1.1
"""A first pass that takes every row so many times the later ones was disturbed: dense and static rows meet few shapes or none."""
HEAD = """# Performance

Written by `make performance` from `benchmarks/results/speed/*.json`; nothing here is typed by hand but these sentences. `python
benchmarks/speed --list` names the cells and what is measured; `benchmarks/speed/cells.py` says what they are.

A cell is a stream of inputs through one engine. Its rows are processes that run the same samples in turns, forth and back: the first pass
is *cold*; *warm* is the median of the passes after it. Times are sums over the stream, in ms. *Pruned* and *dense* are our bundles as
`load` opens them: where new shapes cost, the pruned one is exported with `--tune --prime`, and `load` shows it shapes. Whoever it is
compared with is then taken warm in the first pass as well, and what load took is told apart. *Not primed* is the same bundle
without that: every shape is new in its first pass, as in dense's. *Naive* is the same pruned model as `torch.onnx` writes it, *static* an
engine compiled for each of the first samples with exactly its counts: no shape ever changes in it, so it is the bound for shape churn. It
runs once untimed before (not so in cells that do not say what a core did): it has lain idle since the pass before.
Peers are dense: nobody else gathers. Weights are random but for MiniLM; all run on a shared machine, whose noise is a few per cent, and
more where passes differ. A percentile is told where the samples support it: 29 for p90, 299 for p99.
"""
ASIDE = """
*Realised* is the speed-up over dense divided by the FLOPs ratio of the papers' formula; *of the bound*, the static engines' time over ours;
*best dense* is the fastest of our dense engine and the peers at that precision; *start*, load and first pass together, dense over ours,
with nobody taken for warm. Not primed: the first pass against dense's, of the bound, and start.
"""


PICTURE = """![speed-up over FLOPs ratio](performance.svg)

A mark is a cell, warm; the line from it ends where it is cold. Hollow marks run batches of eight, or two threads.
"""

WATERFALL = """Each column is dense over pruned: what the formula counts; what the graph for ONNX Runtime counts (OpenVINO's leaves
maps of attention whole, for 1 or 2 % more work); engines of fixed shapes; our engine when it has met all shapes; when it meets them for
the first time. In brackets what is kept of the column before. Between graph and fixed shapes goes what small products and memory cost,
between fixed shapes and warm what sizes cost that are known at run time only, and their change, between warm and cold the preparing of
new ones, as far as load has not shown them. Fixed shapes are timed on the first few samples only, the columns beside them on all: where
lengths differ, a step into or out of that column also holds what those few differ by from the rest.
"""

WHY = """
Why targets are missed, from the profiles of decisions [0015](decisions/0015-shapes-are-met-at-load.md),
[0016](decisions/0016-what-the-runtimes-are-told.md), [0017](decisions/0017-what-is-left-of-churn.md),
[0026](decisions/0026-what-a-change-of-shape-costs.md) and [0032](decisions/0032-what-masks-nothing-goes.md):

- *Weights* are read once an inference, however few rows are left, and arithmetic hardly runs beside it. On a core that multiplies at 110
  GFLOP/s and reads at 33 GB/s, the products of BERT-base's feed-forward blocks, alone in ONNX Runtime, take 9 ms for one row, 30 for 24, 83
  for 72 and 140 for 128, that is 1.06 ms a row and some 5 ms that no token saves; one row runs at 12 GFLOP/s, eight at 65, 128 at 103. Of
  BERT-base at /8 one to eight tokens are left in most layers. All products of the engine for /2.18 fall by 2.07 in ONNX Runtime.
- *Fixed shapes* fall behind the graph's FLOPs for that reason, and because the attention that a score looks into stays written out: on
  MiniLM a quarter of the pruned engine's time is no product of weights, a sixth of dense's. No choice of shapes brings that back.
- *Warm*, OpenVINO runs a graph of sizes known at run time only slower than one of constant sizes, a shape that repeats too: in bfloat16
  some 2 ms of 12 on MiniLM, in 300 nodes that it looks at and fuses less. Another 1 to 2 ms go to preparing them whenever the shape differs
  from the one before, known or not; `--copies` gets some of that back, for memory. On a ladder it also computes the slots: where those are
  coarse for the texts, *naive* is warm faster by as much, and pays for it whenever a shape is new, which in a stream that does not repeat
  is always.
- *Not primed*, a first pass makes oneDNN's kernels for attention's products, once a size and process, and the pages of that code:
  BERT-base met 84,000 page faults until its weights were laid out once, and meets 35,000 now
  ([0031](decisions/0031-a-product-stands-alone.md)). In bfloat16 the first inference lays out all weights as well, dense or pruned:
  BERT-base's takes 720 ms where later ones take 60. Primers move all that to load: of texts, one input cut to every size shows them all
  ([0029](decisions/0029-shapes-follow-from-one-count.md)); of images, some that came before, and what they did not show is still new.
- The bound is taken on the first few samples, and static engines are timed warm: in the first pass ours also touch weights and work
  areas for the first time, which on streams as short as these weighs as much as shapes.
- MiniLM's thresholds are not learned: in the median text at /5 they leave the first token alone behind the second of six layers, at /2.6
  behind the fourth, and the last site drops that one as well in 72 of the 100 texts: their embedding is zero. These cells measure work, no
  model that anybody should use; `make demo` has one. What remains behind such sites is the cost of a call.
- Where lengths do not vary `--tune` weighs finer ladders of counts as well (*of 5*, *4 others*;
  [0028](decisions/0028-a-ladder-is-fine-where-few-rows-are-left.md)), and of what costs the same within 3 % takes what runs least at
  load: on DeiT-B /1.99 a ladder, for 2 or 6 inferences at load instead of 12, and the naive export is 2 to 4 % faster warm. Cells *of
  3*, and *2 others*, are of before.
- The streams of DeiT are too short for a p90, so the last target says nothing of them.
- Cells are of two machines with two cores each. Those that say what a core did are of the second; the others of the first, 110 GFLOP/s
  and 33 GB/s, but for BERT-base at 128 tokens in OpenVINO on two threads, an hour of 20 GB/s. While one core measured, the other
  prepared the next cell or ran tests, which slows both by some 3 %. The second machine's kernel pages out what lies idle: of BERT-base
  in bfloat16, static engines took 56 to 103 ms warm while they came to a sample from idle, and 57 to 63 since they run once before it;
  first samples of a turn are slower in every row. Other machines keep another share of a FLOPs ratio: one with 196 GFLOP/s and 15 GB/s
  a core gained, warm in ONNX Runtime, 1.41 on DeiT-S /1.52, 1.69 on BERT-base /2.18 and 2.15 on MiniLM /2.82.
"""


def page(documents: Sequence[Document]) -> str:
    """docs/performance.md."""
    parts = [
        HEAD,
        "## At a glance\n",
        PICTURE,
        summary(documents),
        ASIDE,
        "## Where the FLOPs go\n",
        WATERFALL,
        waterfall(documents),
    ]
    parts += ["\n## Targets\n", targets(documents), WHY, "## Cells\n"]
    parts += [cell(document) for document in documents]
    return "\n".join(parts).rstrip() + "\n"


def summary(documents: Sequence[Document]) -> str:
    """A line a cell."""
    lines = [
        "| cell | FLOPs: paper, graph | speed-up | realised | of the bound | naive / ours | best dense / ours | start | not primed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for document in documents:
        found = figures(document)
        flops = document["flops"]
        lines.append(
            f"| {document['cell']['name']} | {flops['paper']:.2f}, {flops['graph']:.2f} | {both(found.speedup)} | {both(found.realised)} | "
            f"{both(found.bound)} | {both(found.naive)} | {_best(found)} | {found.start:.2f} | {_unprimed(found)} |"
        )
    return "\n".join(lines)


def both(values: Mapping[str, float]) -> str:
    """Cold and warm."""
    return " / ".join(f"{values[phase]:.2f}" for phase in PHASES) if values else "-"


def _best(found: Figures) -> str:
    name = found.best["warm"][0]
    return " / ".join(f"{found.best[phase][1]:.2f}" for phase in PHASES) + f" ({name})"


def _unprimed(found: Figures) -> str:
    if found.unprimed is None:
        return "-"
    speedup, bound, start = found.unprimed
    return f"{speedup:.2f}, {f'{bound:.2f}' if bound else '-'}, {start:.2f}"


def waterfall(documents: Sequence[Document]) -> str:
    """From the FLOPs ratio to time: each column a speed-up over dense, with what it keeps of the one before."""
    lines = [
        "| cell | paper | graph | fixed shapes | warm | cold |",
        "|---|---|---|---|---|---|",
    ]
    for document in documents:
        found, flops = figures(document), document["flops"]
        steps = [flops["paper"], flops["graph"], found.ideal, found.speedup["warm"], found.speedup["cold"]]
        told, before = [], None
        for value in steps:
            told.append("-" if value is None else f"{value:.2f}" + (f" ({value / before:.2f})" if before else ""))
            before = value or before
        lines.append(f"| {document['cell']['name']} | {' | '.join(told)} |")
    return "\n".join(lines)


Claim = tuple[str, Callable[[Document], bool], Callable[[Document, Figures], float | None], float]
"""What is claimed, of which cells, the figure, and the least it should be."""


def _of(*parts: str) -> Callable[[Document], bool]:
    return lambda document: document["cell"]["batch"] == 1 and all(part in document["cell"]["name"] for part in parts)


def _calm(document: Document, found: Figures) -> float | None:
    """The dense stream's spread over the pruned one's."""
    pruned, dense = row(document, "pruned"), row(document, "dense")
    assert pruned is not None
    assert dense is not None
    usual, ours = spread(dense), spread(pruned)
    return usual / ours if usual and ours else None


CLAIMS: tuple[Claim, ...] = (
    ("of the static bound, warm", _of(""), lambda d, f: f.bound.get("warm"), 0.95),
    ("of the static bound, cold", _of(""), lambda d, f: f.bound.get("cold"), 0.85),
    (
        "of the static bound, not primed, first pass",
        _of("openvino"),
        lambda d, f: (f.unprimed[1] or None) if f.unprimed else None,
        0.85,
    ),
    ("realised, cold, DeiT-S /1.53", _of("deit-s_1.53"), lambda d, f: f.realised["cold"], 0.97),
    ("realised, cold, BERT-base /2.1", _of("bert", "_2.1"), lambda d, f: f.realised["cold"], 0.97),
    ("realised, cold, BERT-base /8", _of("bert", "_8"), lambda d, f: f.realised["cold"], 0.92),
    ("realised, cold, MiniLM /2.6", _of("minilm-100_2.6"), lambda d, f: f.realised["cold"], 0.90),
    ("realised, cold, MiniLM /5", _of("minilm-100_5"), lambda d, f: f.realised["cold"], 0.75),
    ("best dense / ours, warm, DeiT-S /1.53", _of("deit-s_1.53"), lambda d, f: f.best["warm"][1], 1.45),
    ("best dense / ours, warm, BERT-base /2.1", _of("bert", "_2.1"), lambda d, f: f.best["warm"][1], 1.9),
    ("best dense / ours, warm, MiniLM /2.6", _of("minilm-100_2.6"), lambda d, f: f.best["warm"][1], 2.3),
    ("p90/p50 of dense over that of pruned, warm", _of(""), _calm, 1.0),
)


TOLD = tuple(
    f"{name}_{target}-fp32_b1_t1"
    for name in ("minilm-100_2.6", "minilm-100_5", "bert-128_2.1", "bert-128_8", "deit-s_1.53")
    for target in ("onnx", "openvino")
)
"""Parts of the names of cells in README."""


def targets(documents: Sequence[Document]) -> str:
    """A line a claim: how far the figures reach, and every cell that misses it."""
    lines = ["| target | least | hit | figures | missed by |", "|---|---|---|---|---|"]
    for what, about, figure, least in CLAIMS:
        found = [(value, d["cell"]["name"]) for d in documents if about(d) and (value := figure(d, figures(d))) is not None]
        missed = sorted(one for one in found if one[0] < least)
        reach = f"{min(found)[0]:.2f} to {max(found)[0]:.2f}" if found else "not measured"
        shown = "; ".join(f"{name} {value:.2f}" if round(value, 2) < least else f"{name} {value:.4f}" for value, name in missed)
        lines.append(f"| {what} | {least} | {len(found) - len(missed)} of {len(found)} | {reach} | {shown or '-'} |")
    return "\n".join(lines)


def cell(document: Document) -> str:
    """All rows of a cell."""
    plan = document["plan"]
    ladders = "".join(f", {name} {','.join(map(str, plan[name]))}" for name in ("buckets", "lengths") if plan[name])
    passes = len(document["rows"][0]["warm_ms"])
    when, sizes = document["date"], len(plan["swept"])
    primed = f", a primer of {sizes} sizes" if sizes else f", {plan['primed']} primers" if plan["primed"] else ""
    how = f"lowering {plan['lowering']}{ladders}{primed}"
    lines = [
        f"### {document['cell']['name']}\n",
        f"{document['samples']} inferences, {passes} warm passes, {when}{_core(document)}; {how}: {plan['reason']}.\n",
        "| row | inferences | cold | warm | p90/p50 cold, warm | load, s | peak, MB | files, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in document["rows"]:
        tails = ", ".join(f"{wide:.2f}" for phase in PHASES if (wide := spread(one, phase)) is not None) or "-"
        far = f"; p99/p50 {wide:.2f}" if (wide := spread(one, "warm", 0.99)) is not None else ""
        size = f"{one['size_mb']:.0f}" if one["size_mb"] else "-"
        lines.append(
            f"| {one['name']} | {len(one['cold_ms'])} | {sum(times(one, 'cold')):.0f} | {sum(times(one, 'warm')):.0f} | {tails}{far} | "
            f"{one['load_s']:.1f} | {one['peak_mb']:.0f} | {size} |"
        )
    least = min(sum(times(one, "cold")) / sum(times(one, "warm")) for one in document["rows"])
    if least > DISTURBED:
        lines.append(f"\nDisturbed: the first pass took every row, static ones too, at least {least:.2f} times the later ones.")
    left = "".join(f"\nLeft out: {name}: {why}.\n" for name, why in document["left_out"].items())
    return "\n".join(lines) + "\n" + left


def _core(document: Document) -> str:
    """What one core did when the cell was measured, where the document has it."""
    found = document.get("core")
    return f", a core of {found['gflops']:.0f} GFLOP/s and {found['gbps']:.0f} GB/s" if found else ""


def readme(documents: Sequence[Document]) -> str:
    """README's table: one sample, one thread, float32, and the ratios that targets are about."""
    lines = [
        "| cell | FLOPs | dense, ms | pruned, ms | speed-up | start | realised | best dense / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for document in (one for one in documents if any(name in one["cell"]["name"] for name in TOLD)):
        found, sums = figures(document), {}
        for role in ("dense", "pruned"):
            one = row(document, role)
            assert one is not None
            sums[role] = " / ".join(f"{sum(times(one, phase)):.0f}" for phase in PHASES)
        lines.append(
            f"| {document['cell']['name']} | /{document['flops']['paper']:.2f} | {sums['dense']} | {sums['pruned']} | "
            f"{both(found.speedup)} | {found.start:.2f} | {both(found.realised)} | {_best(found)} |"
        )
    return "\n".join(lines)
