"""Imports go down: every edge between modules is in one short table, or the test prints it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tpcompile": "tpcompile", "passes": "tpcompile.passes", "models": "tpcompile.models"}

# From the ground up; a unit may import any unit of a lower row, none of its own row or above.
# A unit is a module, or a whole sub-package; the sub-packages in SPLIT are looked into.
# fmt: off
ROWS = (
    (
        "compare", "compat", "data", "environment", "errors", "files", "frozen", "onnx", "onnx.fuse", "proof",
        "proof.keptsets", "report", "report.spectrogram", "rows", "spec", "timing", "timing.stats", "timing.turns",
    ),
    (
        "axes", "data.corpus", "data.images", "data.samples", "flops", "frames", "inputs", "kept", "manifest", "ops",
        "passes.schedule", "proof.scores", "recipe", "report.patchview", "timing.pipe", "timing.roofline", "timing.targets",
    ),
    (
        "bundle", "compare.graphview", "data.textfiles", "lengths", "models", "passes.counts", "passes.rules", "program",
        "proof.answers", "timing.breakeven", "timing.workers", "untraceable",
    ),
    (
        "capture", "compare.fxview", "compare.graphdiff", "data.tasks", "data.tensors", "onnx.names", "onnx.ops",
        "passes.axesmap", "prime", "proof.agreement", "text",
    ),
    (
        "data.pictures", "onnx.emit", "onnx.flat", "onnx.lower", "passes.cost", "passes.levels", "passes.masks",
        "passes.prefix", "passes.values", "passes.verify", "proof.difference", "subject",
    ),
    (
        "compare.differ", "data.load", "onnx.stages", "onnx.types", "passes.base", "passes.candidates", "passes.fact",
        "passes.policy", "proof.float64", "proof.judgement",
    ),
    ("passes.facts",),
    ("passes.neutral",),
    (
        "backends", "data.probes", "onnx.quant", "passes.canonicalize", "passes.cleanup", "passes.compact", "passes.dense",
        "passes.insert", "passes.lower", "passes.mark", "passes.optimize",
    ),
    ("chain", "data.feeds", "passes.assumptions", "passes.impose", "plan", "proof.coverage", "timing.folding"),
    ("calibration", "compare.staged", "engine", "onnx.quantised", "passes.place", "proof.parity", "record", "timing.attribution"),
    ("compare.watch", "passes.recognise", "proof.proving", "proof.verification", "timing.alone", "timing.latency"),
    ("compare.layers", "passes", "passes.padding", "report.waterfall", "tune"),
    ("build", "compare.cutout", "compare.findings", "explanation", "operating", "report.page"),
    ("compare.passwise", "report.overview"),
    ("api", "compare.bisection"),
    ("demo",),
    ("cli",),
)
# fmt: on
SPLIT = {"passes", "compare", "data", "onnx", "proof", "report", "timing"}
ONLY_FROM = {"models": {"subject", "api", "demo", "cli"}}
LEAF = {"models": {"errors", "axes", "ops", "compat", "data.images", "spec"}, "data.images": {"errors", "spec"}}
"""Units that may import no more than these."""

SAME_THING = {("program", "text")}
"""Two modules that are one value and its printed form: ``str(program)`` is written in text.py."""

RANK = {unit: row for row, units in enumerate(ROWS) for unit in units}


def files() -> Iterator[tuple[str, Path]]:
    """Every source file with the module it installs as."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def unit(module: str) -> str:
    """``tpcompile.passes.rules.views`` -> ``passes.rules``; the package itself is ''."""
    _, *parts = module.split(".")
    return ".".join(parts[: 2 if parts and parts[0] in SPLIT else 1])


def imports(tree: ast.AST, modules: set[str]) -> Iterator[tuple[str, int]]:
    """Every module of ours that runs when the code runs, with its line. Imports for types only are no dependency."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                name = below if below in modules else node.module
                if name in modules:
                    yield name, node.lineno
        else:
            yield from imports(node, modules)


def forbidden(here: str, there: str) -> str:
    """Why a unit may not import another; empty when it may."""
    if here == there or not here or not there:  # tpcompile/__init__.py only re-exports
        return ""
    if here in LEAF and there not in LEAF[here]:
        return f"{here} imports only {', '.join(sorted(LEAF[here]))}"
    if there in ONLY_FROM and here not in ONLY_FROM[there]:
        return f"only {', '.join(sorted(ONLY_FROM[there]))} may import {there}"
    if RANK[there] >= RANK[here] and (here, there) not in SAME_THING:
        return f"{there} is not below {here}"
    return ""


def test_every_module_has_its_place_in_the_table() -> None:
    found = {unit(module) for module, _ in files()} - {""}
    assert sorted(found - RANK.keys()) == []


def test_imports_go_down() -> None:
    modules = {module for module, _ in files()}
    edges = []
    for module, path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for target, line in imports(tree, modules):
            reason = forbidden(unit(module), unit(target))
            if reason:
                edges.append(f"{path.relative_to(ROOT)}:{line}: {module} -> {target}: {reason}")
    assert not edges, "\n" + "\n".join(edges)


def test_an_upward_import_is_seen() -> None:
    tree = ast.parse("def f():\n    from tpcompile import engine\nif TYPE_CHECKING:\n    from tpcompile.api import load\n")
    assert list(imports(tree, {"tpcompile.engine", "tpcompile.api"})) == [("tpcompile.engine", 2)]
    assert forbidden("timing.latency", "timing.turns") == ""
    assert forbidden("timing.turns", "timing.latency") == "timing.latency is not below timing.turns"
    assert forbidden("models", "program") == "models imports only axes, compat, data.images, errors, ops, spec"
    assert forbidden("capture", "models") == "only api, cli, demo, subject may import models"
