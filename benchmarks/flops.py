"""What the passes save, pass by pass: FLOPs and bytes of the compiled graph against the paper's count at the same kept tokens.

    python benchmarks/flops.py                     DeiT-S, BERT-base (random weights) and MiniLM, 0.7 of the tokens kept at every site
    python benchmarks/flops.py --models minilm --keep 0.5 --onnx

Nothing is run: both sides are polynomials over token counts, evaluated at the same counts. The paper's count takes every product of the
masked program at the tokens alive where it stands; the graph's is counted op by op in the gathered program, at the rows it stores. Bytes
are what the ops read and write, without weights. ``--onnx`` writes the models too, and counts the nodes of the ONNX graphs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tpcompile import models
from tpcompile.capture import capture
from tpcompile.demo import model_folder
from tpcompile.errors import TpcompileError
from tpcompile.flops import evaluate
from tpcompile.onnx.emit import emit
from tpcompile.passes import PLACED, Cleanup, Compact, Pipeline, pipeline
from tpcompile.passes.cost import polynomial, traffic
from tpcompile.program import Program
from tpcompile.subject import Subject, subject_of

DEIT_SITES = (3, 6, 9)
SEQUENCE = 128
"""Tokens of a text."""


@dataclass(frozen=True)
class Case:
    """A model, a method, and the number of tokens that it is counted at."""

    subject: Callable[[], Subject]
    tokens: int


def _deit(method: str, sites: Sequence[int]) -> Subject:
    thresholds = [0.005 if layer in sites else 0.0 for layer in range(12)]
    more = {"protect": "prefix"} if method == "ltp" else {}
    return subject_of("timm/deit_small_patch16_224", None, None, method, {"thresholds": thresholds, **more})


def _bert(sites: Sequence[int]) -> Subject:
    """BERT-base with random weights; nothing but its shape counts here."""
    body = transformers.BertModel(transformers.BertConfig(attn_implementation="eager")).eval()
    pruned = models.prune(body, "ltp", thresholds=[0.002 if layer in sites else 0.0 for layer in range(12)])
    given = {"input_ids": torch.randint(0, 1000, (1, 16)), "attention_mask": torch.ones(1, 16, dtype=torch.int64)}
    return subject_of(pruned, given, {name: {1: "seq"} for name in given}, None, None)


def _minilm() -> Subject:
    return subject_of(model_folder(), None, None, "ltp", {"thresholds": [0.0016 * (layer + 1) for layer in range(6)]})


CASES: Mapping[str, Case] = {
    "deit-s": Case(lambda: _deit("cls-attention", DEIT_SITES), 197),
    "deit-s-ltp": Case(lambda: _deit("ltp", DEIT_SITES), 197),
    "bert-base": Case(lambda: _bert(range(12)), SEQUENCE),
    "minilm": Case(_minilm, SEQUENCE),
}


def steps(placed: Program) -> Iterator[tuple[str, Program]]:
    """The gathered program with none of the passes that save work, with the first, with the first two, ..."""
    for count in range(len(PLACED) + 1):
        passes = Pipeline((*PLACED[:count], Compact(), Cleanup()))
        yield PLACED[count - 1].name if count else "gather", passes(placed)


def sizes(sites: int, tokens: int, keep: float) -> dict[str, int]:
    """Tokens of every set, where each site keeps the same share; never less than two."""
    return {f"t{level}": max(2, round(tokens * keep**level)) for level in range(sites + 1)}


def row(name: str, program: Program, counts: Mapping[str, int], onnx: bool) -> dict[str, Any]:
    """What one program costs at these counts."""
    calls = sum(node.op == "call_function" for node in program.graph.nodes)
    found = {
        "pass": name,
        "flops": evaluate(polynomial(program), counts),
        "bytes": evaluate(traffic(program), counts),
        "nodes": calls,
    }
    return found | ({"onnx_nodes": len(list(emit(program).model.graph))} if onnx else {})


def measure(name: str, keep: float, onnx: bool) -> dict[str, Any]:
    """One model: the paper's count, and the graph's pass by pass."""
    case = CASES[name]
    subject = case.subject()
    captured = capture(subject.model, subject.inputs, subject.dynamic, subject.ranges)
    placed = Pipeline(pipeline(subject.batch).passes[:4])(captured)
    counts = sizes(len(placed.sites), case.tokens, keep)
    paper = evaluate(polynomial(placed), counts)
    rows = [row(step, program, counts, onnx) for step, program in steps(placed)]
    dense = evaluate(polynomial(placed), dict.fromkeys(counts, case.tokens))
    below = 1 - rows[-1]["flops"] / paper
    return {"model": name, "tokens": list(counts.values()), "dense": dense, "paper": paper, "below_paper": below, "passes": rows}


def lines(result: Mapping[str, Any]) -> list[str]:
    """A Markdown table of one model."""
    paper, first = result["paper"], result["passes"][0]
    head = f"{result['model']}: tokens {', '.join(map(str, result['tokens']))}; dense {result['dense'] / 1e9:.3f} GFLOPs"
    found = [
        head,
        "",
        "| after | GFLOPs | of the paper's | MB moved | of the plain gather's | nodes | ONNX nodes |",
        "|---|---|---|---|---|---|---|",
    ]
    found.append(f"| the paper's count | {paper / 1e9:.3f} | 1.000 | | | | |")
    found += [
        f"| {one['pass']} | {one['flops'] / 1e9:.3f} | {one['flops'] / paper:.3f} | {one['bytes'] / 1e6:.1f} | "
        f"{one['bytes'] / first['bytes']:.3f} | {one['nodes']} | {one.get('onnx_nodes', '')} |"
        for one in result["passes"]
    ]
    return [*found, ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, write JSON; 0 when every graph lies below its paper's count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/flops.json"), help="JSON to write (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--keep", type=float, default=0.7, help="share of the tokens that every site keeps (default: %(default)s)"
    )
    parser.add_argument("--onnx", action="store_true", help="write ONNX models too, and count their nodes")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    try:
        for name in options.models:
            results.append(measure(name, options.keep, options.onnx))
            print("\n".join(lines(results[-1])), flush=True)
    except TpcompileError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    document = {"keep": options.keep, "models": results}
    options.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(result["below_paper"] > 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
