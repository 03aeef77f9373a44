"""The table of architectures: what of the libraries' own encoders compiles, on which backend, and how exactly; writes docs/coverage.md.

    python benchmarks/coverage.py                  what is not known yet; about half a minute an architecture
    python benchmarks/coverage.py --only bert      one architecture again
    python benchmarks/coverage.py --add tensorrt-rtx
                                                   a backend's column, for rows that are known without it
    python benchmarks/coverage.py --time BERT      builds dense and pruned engines at a width of 384; once more, times them in turns
    python benchmarks/coverage.py --page           the page alone, from benchmarks/results/coverage.json

An architecture is a row of `architectures.ROWS`. Sites come in through `tpcompile.impose`, with no name of a model's part: in each block
a token falls that receives less than a share of the mean attention. What engines compute is compared with the masked model in eager torch.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import LARGE, ROWS, SMALL, Feed, Row, Scale
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tpcompile
from tpcompile.backends import ANY, Extent, backends
from tpcompile.capture import capture
from tpcompile.errors import TpcompileError, first_line
from tpcompile.onnx.emit import emit
from tpcompile.passes import Canonicalize, Lower
from tpcompile.passes.axesmap import AxesMap
from tpcompile.plan import RULES
from tpcompile.program import Program
from tpcompile.rows import MIN_COUNT

ROOT = Path(__file__).resolve().parents[1]
FOUND, PAGE = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md"
ROUNDS = 8
TIMED = ("onnx", "openvino")
LAW = 1e-5


def imposed(row: Row, scale: Scale = SMALL) -> Program:
    """The masked program of an architecture."""
    return tpcompile.impose(
        row.model(scale), row.inputs(scale)[0], dynamic=row.dynamic, threshold=row.threshold, prefix=row.prefix
    )


def far(got: Mapping[str, Any], want: Mapping[str, Tensor]) -> float:
    """The largest difference of any output, by the law's measure: 1e-5 is the bound."""
    gaps = [(torch.as_tensor(got[name]) - value).abs().max() / max(1.0, float(value.abs().max())) for name, value in want.items()]
    return float(max(gaps))


def flops(run: Callable[[], object]) -> int:
    """What a run multiplies and adds, in products of matrices."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def unruled(row: Row) -> list[str]:
    """Ops of the captured model that have no axis rule."""
    calls = AxesMap(Canonicalize()(capture(row.model(), row.inputs(SMALL)[0], row.dynamic)).graph).calls
    return sorted({str(call.node.target).removesuffix(".default") for call in calls.values() if call.factors is None})


def measured(name: str) -> dict[str, Any]:
    """One architecture through the compiler and every backend; ``refused`` where that is not possible, and the user's message."""
    row = ROWS[name]
    feeds = row.inputs(SMALL)
    try:
        masked = imposed(row)
        compact = tpcompile.lower(masked)
    except TpcompileError as error:
        return {"refused": row.refused, "message": f"{type(error).__name__}: {str(error).strip()}"}
    wants = [masked(**feed) for feed in feeds]
    traces = [compact.trace(**feed) for feed in feeds]
    dense = sum(flops(lambda feed=feed: row.model()(**feed)) for feed in feeds)
    return {
        "sites": len(compact.sites),
        "unruled": unruled(row),
        "kept": [[int(keep.sum()) for keep in trace.keep] for trace in traces],
        "gap": max(far(trace.outputs, want) for trace, want in zip(traces, wants, strict=True)),
        "engines": {target: held(target, compact, feeds, wants) for target in targets()},
        "ratio": dense / sum(flops(lambda feed=feed: compact(**feed)) for feed in feeds),
    }


def targets() -> list[str]:
    """The backends that this machine has."""
    return [name for name, one in backends().items() if one.probe().ok]


def added(name: str, target: str) -> float | str:
    """A backend's figure for an architecture that is known already."""
    row, feeds = ROWS[name], ROWS[name].inputs(SMALL)
    masked = imposed(row)
    return held(target, tpcompile.lower(masked), feeds, [masked(**feed) for feed in feeds])


def held(target: str, compact: Program, feeds: Sequence[Feed], wants: Sequence[Mapping[str, Tensor]]) -> float | str:
    """The largest difference of an engine; ``built`` where it cannot run here, and the reason where it cannot be built.

    A target whose own lowering is not dynamic gets constant counts that fit every sample.
    """
    if RULES[target].lowering == "dynamic":
        written, extent = emit(compact), ANY
    else:
        kept = [[keep.sum().item() for keep in compact.trace(**feed).keep] for feed in feeds]
        counts = [str(max(MIN_COUNT, int(max(column)))) for column in zip(*kept, strict=True)]
        written = emit(Lower(counts="+".join(counts))(compact))
        extent = Extent({name: (2, 16, high) for name, (_, high) in compact.dims.items()})
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        written.save(Path(scratch) / "model.onnx")
        try:
            backends()[target].build(Path(scratch) / "model.onnx", out, "fp32", extent=extent)
        except TpcompileError as error:
            return first_line(error)
        try:
            session = backends()[target].open(out, threads=1)
        except TpcompileError:
            return "built"
        with session:
            gaps = [far(session.run({k: v.numpy() for k, v in f.items()}), want) for f, want in zip(feeds, wants, strict=True)]
    return max(gaps)


def prepared(name: str, folder: Path) -> None:
    """Build the dense and the pruned engine of an architecture at the large scale."""
    row = ROWS[name]
    feeds, model = row.inputs(LARGE), row.model(LARGE)
    compact = tpcompile.lower(imposed(row, LARGE))
    runs = (lambda feed: model(**feed), lambda feed: compact(**feed))
    works = [sum(flops(lambda feed=feed, run=run: run(feed)) for feed in feeds) for run in runs]
    dense = Canonicalize("whole")(capture(model, feeds[0], row.dynamic))
    folder.mkdir(parents=True)
    for kind, program in (("dense", dense), ("pruned", compact)):
        emit(program).save(folder / f"{kind}.onnx")
        for target in TIMED:
            (out := folder / target / kind).mkdir(parents=True)
            backends()[target].build(folder / f"{kind}.onnx", out, "fp32")
    (folder / "flops.json").write_text(json.dumps(works[0] / works[1]), encoding="utf-8")


def realised(name: str, folder: Path) -> dict[str, float]:
    """The FLOPs ratio at the large scale, and backend -> time of the dense engine over that of the pruned one over that ratio."""
    found = {"flops": float(json.loads((folder / "flops.json").read_text(encoding="utf-8")))}
    feeds = [{key: value.numpy() for key, value in feed.items()} for feed in ROWS[name].inputs(LARGE)]
    for target in TIMED:
        sessions = {kind: backends()[target].open(folder / target / kind, threads=1) for kind in ("dense", "pruned")}
        times: dict[str, list[float]] = {"dense": [], "pruned": []}
        for feed in [feeds[i % len(feeds)] for i in range(ROUNDS)]:
            for kind in ("dense", "pruned", "pruned", "dense"):
                begin = time.perf_counter()
                sessions[kind].run(feed)
                times[kind].append(time.perf_counter() - begin)
        found[target] = statistics.median(times["dense"][4:]) / statistics.median(times["pruned"][4:]) / found["flops"]
    return found


HEAD = """\
# Coverage

Written by `make tables` (`benchmarks/coverage.py`) from runs of the compiler: do not edit. The encoders people use, as transformers
and timm build them, small and with random weights; their sites come in through `tpcompile.impose`, which finds the blocks of a model in
its graph. BERT, RoBERTa, DistilBERT, ELECTRA and timm's vision transformers also have families, for the methods of
[methods.md](methods.md).

- *sites*: places where tokens are dropped, one a block. *kept*: tokens behind the last of them, in each of three inputs.
- *no rule*: ops of the captured model without an axis rule. They stand where no token has been dropped, or the model is refused.
- *gathered*, *ONNX Runtime*, *OpenVINO*, ...: the largest difference of an output from the masked model, over its largest value, float32.
  The law is 1e-5; a row is green where all hold. *built*: an engine that this machine cannot run.
- *FLOPs*: dense over compiled, counted in products of matrices for these inputs. It says how much is dropped at this threshold with
  random weights, not how much a trained model can lose.
- *realised*: how much of that is time, ONNX Runtime and OpenVINO, at a width of 384, 6 blocks, about 200 tokens, batch 1, one thread.
"""
TITLES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


def green(found: Mapping[str, Any]) -> bool:
    """Whether a row holds the law everywhere."""
    figures = [found.get("gap"), *(found["engines"].get(t) for t in ("onnx", "openvino"))] if "gap" in found else [None]
    return all(isinstance(figure, float) and figure <= LAW for figure in figures)


def page(document: Mapping[str, Any]) -> str:
    """docs/coverage.md."""
    known = {name: found for name, found in document.items() if "gap" in found}
    columns = list(dict.fromkeys(target for found in known.values() for target in found["engines"]))
    titles = ["architecture", "sites", "kept", "no rule", "gathered", *(TITLES.get(c, c) for c in columns), "FLOPs", "realised"]
    count = f"{sum(map(green, known.values()))} of {len(document)} rows are green."
    lines = [HEAD, count, "", row_of(titles), row_of(["---"] * len(titles))]
    for name, found in known.items():
        shown = [f"{v:.0e}" if isinstance(v := found["engines"].get(c, ""), float) else str(v) for c in columns]
        timed = found.get("realised", {})
        realised_ = ", ".join(f"{timed[t]:.2f}" for t in ("onnx", "openvino") if t in timed)
        kept = ", ".join(str(counts[-1]) for counts in found["kept"])
        rules = ", ".join(f"`{op}`" for op in found["unruled"])
        cells = [name, str(found["sites"]), kept, rules, f"{found['gap']:.0e}", *shown, f"/{found['ratio']:.2f}"]
        lines.append(row_of([*cells, f"{realised_} at /{timed['flops']:.2f}" if timed else ""]))
    lines += ["", "## Refused", ""]
    for name, found in document.items():
        if "message" in found:
            lines += [f"**{name}**: {found['refused']}.", "", "```", found["message"], "```", ""]
    return "\n".join(lines)


def row_of(cells: Sequence[str]) -> str:
    """A line of the table."""
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def main(arguments: Sequence[str]) -> int:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=list(ROWS), action="append", help="measure this architecture again")
    parser.add_argument("--time", choices=list(ROWS), action="append", help="time the engines of this architecture")
    parser.add_argument("--add", choices=list(backends()), action="append", help="a backend's column where it is not known")
    parser.add_argument(
        "--engines", type=Path, default=Path("out/coverage"), help="where --time builds engines first, and finds them then"
    )
    parser.add_argument("--page", action="store_true", help="write the page from what is known")
    options = parser.parse_args(arguments)
    known: dict[str, Any] = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.is_file() else {}
    for name in wanted(options, known):
        begin = time.perf_counter()
        known[name] = measured(name)
        print(
            f"{name}: {time.perf_counter() - begin:.0f} s, {'green' if green(known[name]) else known[name]}",
            file=sys.stderr,
            flush=True,
        )
        write(known)
    for name, target in [(name, target) for name in known for target in options.add or () if "gap" in known[name]]:
        if target not in known[name]["engines"]:
            known[name]["engines"][target] = added(name, target)
            print(f"{name}: {target} {known[name]['engines'][target]}", file=sys.stderr, flush=True)
            write(known)
    for name in options.time or ():
        folder = options.engines / name.replace(" ", "-")
        if not folder.exists():
            prepared(name, folder)
            continue
        known[name]["realised"] = realised(name, folder)
        print(f"{name}: {known[name]['realised']}", file=sys.stderr, flush=True)
        write(known)
    if options.page:
        write(known)
    return 0


def wanted(options: argparse.Namespace, known: Mapping[str, Any]) -> list[str]:
    """The rows to measure."""
    missing = [name for name in ROWS if name not in known]
    return options.only or ([] if options.page or options.time or options.add else missing)


def write(known: Mapping[str, Any]) -> None:
    """The figures and the page, in the order of the rows."""
    ordered = {name: known[name] for name in ROWS if name in known}
    FOUND.parent.mkdir(exist_ok=True)
    FOUND.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(ordered), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
