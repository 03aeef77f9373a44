"""The table of methods: method x family x backend, measured through the compiler at each method's shipped recipe; writes docs/methods.md.

    python benchmarks/methods.py                   every method; what is known already is kept
    python benchmarks/methods.py --only evit       one method again
    python benchmarks/methods.py --build DIR       FLOPs and engines at the recipes' own shapes, where they are not known
    python benchmarks/methods.py --time DIR        those engines in turns with the dense ones: minutes, and wants the machine alone
    python benchmarks/methods.py --page            the page alone, from benchmarks/methods.json

A method is held against each family on a small random model of the recipe's depth: lowered, built for every backend, and run on a few
inputs. What the masked model gives (or, for a method that gathers by nature, its eager form) is what engines are compared with. FLOPs are
counted op by op in the compiled graph and in the dense model, both at the shape that the recipe is for, or at the headline shape of a
family that it is not for. Weights are random there too: where counts follow content, the ratio is that of these weights.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tpcompile
from tpcompile import build, models
from tpcompile.backends import backends
from tpcompile.backends.base import Session
from tpcompile.errors import TpcompileError, first_line
from tpcompile.kept import compose
from tpcompile.models import METHODS
from tpcompile.models.library import timm, transformers
from tpcompile.models.methods import predictor, svit, transkimmer
from tpcompile.onnx.emit import OnnxModel, emit
from tpcompile.recipe import Recipe, shipped
from tpcompile.subject import subject_of

ROOT = Path(__file__).resolve().parents[1]
FOUND, PAGE = ROOT / "benchmarks" / "methods.json", ROOT / "docs" / "methods.md"
SAMPLES, ROUNDS = 3, 12
TARGETS = ("onnx", "openvino")
WRITES = ("output.dense.weight", "attn.proj.weight", "mlp.fc2.weight")
"""What adds to the hidden states: with as much weight as the rest, the tokens of a random model are one vector after a few blocks."""
TOKENS = 256
"""Of a text: the longest that the recipes are for."""


@dataclass(frozen=True)
class Shape:
    """The size of a random model."""

    width: int
    heads: int
    inner: int
    image: int
    patch: int
    depth: int = 12


SMALL, DEIT_S, BERT_BASE = Shape(48, 3, 96, 64, 8), Shape(384, 6, 1536, 224, 16), Shape(768, 12, 3072, 0, 0)
HEADLINE: dict[str, tuple[str, Shape]] = {
    "deit_small_patch16_224": ("vit", DEIT_S),
    "bert-base-uncased": ("bert", BERT_BASE),
    "roberta-base": ("bert", BERT_BASE),
    "tpcompile/digits-vit": ("vit", Shape(64, 4, 256, 32, 4, 6)),
}
"""A recipe's model -> family and shape."""
LARGE = {"vit": DEIT_S, "bert": BERT_BASE}
"""Family -> the shape that recipes of another family are measured at."""


def vit(shape: Shape) -> nn.Module:
    """A random vision transformer with predictors for three stages and selectors for ten blocks, as a checkpoint would bring them."""
    timm()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads, "mlp_ratio": shape.inner / shape.width}
    model: nn.Module = VisionTransformer(img_size=shape.image, patch_size=shape.patch, num_classes=10, **sizes)
    found = nn.ModuleList(predictor.Predictor(shape.width) for _ in range(3)).state_dict()
    predictor.attach(model, {f"{predictor.ATTRIBUTE}.{name}": weight for name, weight in found.items()})
    svit.attach(model, nn.ModuleList(svit.Selector(shape.width) for _ in range(10)))
    return uneven(model)


def bert(shape: Shape, vocabulary: int = 1000) -> nn.Module:
    """A random text classifier with a predictor for every layer."""
    library = transformers()
    config = library.BertConfig(
        vocab_size=vocabulary, hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
        intermediate_size=shape.inner, attn_implementation="eager",
    )  # fmt: skip
    model = library.BertForSequenceClassification(config)
    transkimmer.attach(model.bert.encoder, shape.depth, shape.width)
    return uneven(model)


def uneven(model: nn.Module) -> nn.Module:
    """The model in eval mode, with weights that make attention tell tokens apart, and that keep tokens apart from block to block."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            gain = 0.25 if name.endswith(WRITES) else 1.5
            nn.init.normal_(weight, std=gain * weight.shape[-1] ** -0.5 if "embed" not in name else 0.5)
    return model.eval()


FAMILIES: dict[str, Callable[[Shape], nn.Module]] = {"bert": bert, "vit": vit}


def samples(family: str, shape: Shape) -> list[dict[str, Tensor]]:
    """A few random inputs of one length."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return [{"pixel_values": torch.randn(1, 3, shape.image, shape.image, generator=generator)} for _ in range(SAMPLES)]
    mask = torch.ones(1, TOKENS, dtype=torch.int64)
    draws = [torch.randint(5, 1000, (1, TOKENS), generator=generator) for _ in range(SAMPLES)]
    return [{"input_ids": ids, "attention_mask": mask} for ids in draws]


def flops(run: Callable[[], object]) -> int:
    """What a run multiplies and adds, in products of matrices."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def headline(recipe: Recipe, family: str) -> Shape:
    """The shape that a recipe is measured at on a family: its own model's, else that family's, of as many blocks."""
    own, shape = HEADLINE[recipe.model or ""]
    return shape if family == own else replace(LARGE[family], depth=shape.depth)


def prepare(method: str, family: str, recipe: Recipe, folder: Path) -> float:
    """Build the engines of a method, and of the dense model where they are missing; dense FLOPs over those of the compiled graph."""
    shape = headline(recipe, family)
    pruned = models.prune(FAMILIES[family](shape), method, **recipe.parameters)
    given = samples(family, shape)[0]
    twin = folder / dense(family, shape)
    if not twin.is_dir():
        write(build.compile_subject(subject_of(pruned, given, None, None, None)).twin, twin)
    program = tpcompile.lower(pruned, given)
    write(emit(program), folder / f"{method}-{family}")
    return flops(lambda: pruned.dense(**given)) / flops(lambda: program(**given))


def dense(family: str, shape: Shape) -> str:
    """The name of the folder of a family's dense engines."""
    return f"dense-{family}-{shape.width}-{shape.depth}"


def write(model: OnnxModel, folder: Path) -> None:
    """Build a graph for every backend, each into a folder of its own; whole, or not at all."""
    with tempfile.TemporaryDirectory(dir=made(folder.parent)) as scratch:
        model.save(Path(scratch) / "model.onnx")
        for target in TARGETS:
            backends()[target].build(Path(scratch) / "model.onnx", made(Path(scratch) / "new" / target), "fp32")
        (Path(scratch) / "new").replace(folder)


def made(folder: Path) -> Path:
    """The folder, with its parents."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def speedups(method: str, family: str, recipe: Recipe, folder: Path) -> dict[str, float]:
    """Backend -> time of the dense engine over that of the pruned one, medians of runs in turns, one thread."""
    shape = headline(recipe, family)
    feeds = [{name: value.numpy() for name, value in inputs.items()} for inputs in samples(family, shape)]
    found = {}
    for target in TARGETS:
        twin, own = (folder / name / target for name in (dense(family, shape), f"{method}-{family}"))
        with backends()[target].open(twin, threads=1) as whole, backends()[target].open(own, threads=1) as pruned:
            times = turns((whole, pruned), feeds)
        found[target] = statistics.median(times[0]) / statistics.median(times[1])
    return found


def turns(engines: Sequence[Session], feeds: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Seconds of every run of every engine: A B B A, the first round left out."""
    times: list[list[float]] = [[] for _ in engines]
    for feed in [feeds[i % len(feeds)] for i in range(ROUNDS + 1)]:
        for i in (*range(len(engines)), *reversed(range(len(engines)))):
            begin = time.perf_counter()
            engines[i].run(feed)
            times[i].append(time.perf_counter() - begin)
    return [one[2:] for one in times]


def measured(method: str, family: str, recipe: Recipe) -> dict[str, Any]:
    """One method on one family, through every backend; ``refused`` where that is not possible, and why."""
    shape = Shape(SMALL.width, SMALL.heads, SMALL.inner, SMALL.image, SMALL.patch, depth(recipe))
    given = samples(family, shape)
    try:
        pruned = models.prune(FAMILIES[family](shape), method, **recipe.parameters)
        program = tpcompile.lower(pruned, given[0])
    except TpcompileError as error:
        return {"refused": first_line(error)}
    written = emit(program)
    runs = [pruned(**inputs) for inputs in given]
    name = next(iter(runs[0]))
    counts = []
    for inputs in given:
        trace = program.trace(**inputs)
        taps = {key: tap.numpy() for key, tap in trace.taps.items()}
        counts.append(compose(taps, len(program.sites), taps["site0.keep"].shape[1]).counts)
    free = any(node.op_type == "NonZero" for node in written.model.graph)
    engines = {}
    for target in backends():
        if target in TARGETS and backends()[target].probe().ok:
            gaps = [far(got, want[name]) for got, want in zip(engine(target, written, given, name), runs, strict=True)]
            engines[target] = max(gaps)
    return {
        "gathered": program.gathered,
        "counts": "fixed" if not free else "by length" if len(set(counts)) == 1 else "by content",
        "sites": len(program.sites),
        "eager": max(far(program(**inputs)[name], want[name]) for inputs, want in zip(given, runs, strict=True)),
        "engines": engines,
    }


def depth(recipe: Recipe) -> int:
    """Blocks of the recipe's model."""
    return HEADLINE[recipe.model or ""][1].depth


def far(got: Any, want: Tensor) -> float:
    """The largest difference, by the law's measure: 1e-5 is the bound."""
    value = torch.as_tensor(got)
    return float((value - want).abs().max() / max(1.0, float(want.abs().max())))


def engine(target: str, written: Any, given: Sequence[Mapping[str, Tensor]], name: str) -> list[Any]:
    """An output of every sample from a runtime."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        written.save(Path(folder) / "model.onnx")
        backends()[target].build(Path(folder) / "model.onnx", out, "fp32")
        with backends()[target].open(out, threads=1) as session:
            return [session.run({key: value.numpy() for key, value in inputs.items()})[name] for inputs in given]


def recipes() -> dict[str, tuple[str, Recipe]]:
    """Method -> the shipped recipe that is measured: the first whose model is known here."""
    found: dict[str, tuple[str, Recipe]] = {}
    for name, path in sorted(shipped().items()):
        recipe = Recipe.read(path)
        if recipe.model in HEADLINE:
            found.setdefault(recipe.method, (name, recipe))
    return found


def page(document: Mapping[str, Any]) -> str:
    """docs/methods.md."""
    head = [
        "# Methods",
        "",
        "Written by `make tables` (`benchmarks/methods.py`) from runs of the compiler: do not edit. Every method of",
        "`tpcompile.models.METHODS` at its shipped recipe (`tpcompile recipe show NAME`), on a small random model of the recipe's",
        "depth, through every backend.",
        "",
        "- *form*: **masked**: the method masks, and gathering is proved to equal it; **gathered**: the method gathers or merges by",
        "  nature, and passes through.",
        "- *count*: **fixed**: a number in the graph, no NonZero; **by length**: the same for every input of a length; **by content**:",
        "  each input has its own.",
        "- *eager*, *ONNX Runtime*, *OpenVINO*: the largest difference of an output from the model's own, over its largest value;",
        f"  {SAMPLES} inputs, float32. The law is 1e-5.",
        "- *recipe*: of the method; a family that it is not for runs it unchanged. Where it names a FLOPs ratio (`ltp`, `as_vit`, `ltmp`),",
        "  its values are what a fit on data starts from, and are measured as they stand.",
        "- *FLOPs*: dense over compiled, counted in the graph at the recipe's own shape (DeiT-S at 224 pixels, BERT-base at 256",
        "  tokens; of `digits-30` the digits model). `~`: the count follows content, and this is a random model: trained weights",
        "  have another. Scores and merges count as work, so below 1 nothing was pruned.",
        "- *realised*: how much of that is time, ONNX Runtime and OpenVINO: dense over pruned engine in turns, batch 1, one thread,",
        "  shapes seen before, over the FLOPs ratio.",
        "",
        "`atome` merges frames of sound and refuses both families here; `tests/models/methods/test_atome.py` holds it to its",
        "definition on AST and Whisper's encoder, and it is not timed.",
        "",
        "| method | family | form | sites | count | eager | ONNX Runtime | OpenVINO | recipe | FLOPs | realised |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    every = [(method, family, found) for method, entry in document.items() for family, found in entry["families"].items()]
    refusals = [f"| `{method}` | {family} | {found['refused']} |" for method, family, found in every if "refused" in found]
    measured = [
        row(method, family, document[method]["recipe"], found) for method, family, found in every if "refused" not in found
    ]
    left = {
        "measured": missing(document),
        "timed": [(m, f) for m, f, found in every if "refused" not in found and not found.get("speedups")],
    }
    later = [f"Not {what} yet: {', '.join(f'`{m}` on {f}' for m, f in which)}." for what, which in left.items() if which]
    text = [*head, *measured, *(line for one in later for line in ("", one))]
    return "\n".join([*text, "", "## Refused", "", "| method | family | why |", "|---|---|---|", *refusals, ""])


def row(method: str, family: str, recipe: str, found: Mapping[str, Any]) -> str:
    """A line of the table."""
    gaps = [f"{found['eager']:.0e}", *(f"{found['engines'][t]:.0e}" if t in found["engines"] else "-" for t in TARGETS)]
    saved, free = found.get("ratio"), found["counts"] == "by content"
    realised = [f"{speedup / saved:.2f}" for speedup in found.get("speedups", {}).values()] if saved else []
    cells = [
        f"`{method}`", family, "gathered" if found["gathered"] else "masked", str(found["sites"]), found["counts"], *gaps, f"`{recipe}`",
        f"{'~' if free else ''}/{saved:.2f}" if saved else "", ", ".join(realised),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def main(arguments: Sequence[str]) -> int:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=list(METHODS), action="append", help="this method alone; measured again")
    parser.add_argument("--build", type=Path, metavar="DIR", help="count FLOPs and build engines at the recipes' own shapes")
    parser.add_argument("--time", type=Path, metavar="DIR", help="time the engines that are in DIR")
    parser.add_argument("--page", action="store_true", help="write the page from what is known")
    options = parser.parse_args(arguments)
    known: dict[str, Any] = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.is_file() else {}
    if options.build or options.time:
        for method, family, found in wanted(known, options.only or list(METHODS)):
            folder, recipe = options.build or options.time, recipes()[method][1]
            if options.build and not (folder / f"{method}-{family}").is_dir():
                say(f"{method} on {family}: build")
                found["ratio"] = prepare(method, family, recipe, folder)
            elif options.time and (folder / f"{method}-{family}").is_dir() and (options.only or not found.get("speedups")):
                say(f"{method} on {family}: time")
                found["speedups"] = speedups(method, family, recipe, folder)
            keep(known)
    elif not options.page:
        for method in options.only or ():
            known.pop(method, None)
        for method, family in missing(known):
            name, recipe = recipes()[method]
            say(f"{method}: {name} on {family}")
            entry = known.setdefault(method, {"recipe": name, "families": {}})
            entry["families"][family] = measured(method, family, recipe)
            keep(known)
    PAGE.write_text(page(known), encoding="utf-8")
    return 0


def say(what: str) -> None:
    """What is being done, on stderr."""
    print(what, file=sys.stderr, flush=True)


def keep(known: Mapping[str, Any]) -> None:
    """Write what is known, methods in their own order."""
    FOUND.write_text(json.dumps({m: known[m] for m in METHODS if m in known}, indent=1) + "\n", encoding="utf-8")


def wanted(known: Mapping[str, Any], methods: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, family and row of what compiles, each method's own family first."""
    own = {method: HEADLINE[recipe.model or ""][0] for method, (_, recipe) in recipes().items()}
    rows = [(m, f, found) for m in methods if m in known for f, found in known[m]["families"].items() if "refused" not in found]
    return sorted(rows, key=lambda one: one[1] != own[one[0]])


def missing(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Methods and families without a row, each method's own family first."""
    own = {method: HEADLINE[recipe.model or ""][0] for method, (_, recipe) in recipes().items()}
    every = [(method, own[method]) for method in own] + [(m, f) for m in METHODS if m in own for f in FAMILIES if f != own[m]]
    return [(m, f) for m, f in every if f not in known.get(m, {}).get("families", {})]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
