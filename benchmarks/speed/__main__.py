"""How much of the FLOPs ratio becomes time, on streams of real inputs, beside every engine that a user could take instead.

    python benchmarks/speed --list                    the cells, and which are measured
    python benchmarks/speed --only minilm-100_2.6     measures those whose name holds this, a JSON each in benchmarks/results/speed
    python benchmarks/speed                           measures what is missing of the default cells
    python benchmarks/speed --full                    of all cells
    python benchmarks/speed --page                    writes docs/performance.md of the JSON

A cell is a model, a FLOPs ratio, an engine, a batch size and a number of threads (``cells.py``). Its rows, our engines, the naive export,
static engines and the peers, are processes that run the same samples in turns (``measure.py``). ``--prepare`` only builds what cells open.
Peers want an environment of their own, ``--peers`` its interpreter: ``benchmarks/peers/requirements.txt``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # streams.py, which the choice of thresholds shares

from cells import Cell, default, matrix
from measure import measure, rehearse
from page import MARKS, page, readme
from plot import plot
from prepare import ready

from tpcompile.errors import TpcompileError

ROOT = Path(__file__).resolve().parents[2]


def chosen(only: Sequence[str], full: bool) -> list[Cell]:
    """The cells whose names hold one of these; all of them where nothing is asked for."""
    cells = matrix() if full or only else default()
    return [cell for cell in cells if not only or any(part in cell.name for part in only)]


def missing(cells: Sequence[Cell], results: Path, again: bool) -> list[Cell]:
    """Those without a document."""
    return [cell for cell in cells if again or not (results / f"{cell.name}.json").is_file()]


def main(arguments: Sequence[str] | None = None) -> int:
    """List, prepare, measure, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of cell names")
    parser.add_argument("--full", action="store_true", help="the whole matrix")
    parser.add_argument("--list", action="store_true", help="print the cells")
    parser.add_argument("--prepare", action="store_true", help="build what the cells open, measure nothing")
    parser.add_argument("--again", action="store_true", help="measure cells that have a document as well")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md and README's table")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "speed", help="folder of engines (default: out/speed)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "speed", help="folder of documents")
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "bin" / "python"), help="interpreter of the peers' environment")
    options = parser.parse_args(arguments)
    cells = chosen(options.only, options.full)
    if options.list:
        print("\n".join(f"{cell.name}{'' if missing([cell], options.results, False) else '  measured'}" for cell in cells))
        return 0
    if options.page:
        return write_pages(options.results)
    try:
        todo = missing(cells, options.results, options.again)
        for number, cell in enumerate(todo, 1):
            say(f"{number} of {len(todo)}: {cell.name}")
            room = ready(cell, options.work, say)
            if options.prepare:
                say(f"{cell.name}: left out: {rehearse(cell, room, options.peers) or 'nothing'}")
            else:
                document = measure(cell, room, options.peers)
                options.results.mkdir(parents=True, exist_ok=True)
                path = options.results / f"{cell.name}.json"
                path.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
                say(f"{cell.name}: {document['seconds']} s; left out: {document['left_out'] or 'nothing'}")
    except TpcompileError as error:
        say(str(error))
        return error.exit_code
    return 0


def write_pages(results: Path) -> int:
    """docs/performance.md with its picture, and the table between the marks in README."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    (ROOT / "docs" / "performance.md").write_text(page(documents), encoding="utf-8")
    (ROOT / "docs" / "performance.svg").write_text(plot(documents), encoding="utf-8")
    path = ROOT / "README.md"
    before, _, after = path.read_text(encoding="utf-8").split(MARKS)
    path.write_text(f"{before}{MARKS}\n{readme(documents)}\n{MARKS}{after}", encoding="utf-8")
    return 0


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
