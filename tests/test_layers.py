"""Imports go down: every edge between modules is in one short table, or the test prints it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tpcompile": "tpcompile", "passes": "tpcompile.passes", "models": "tpcompile.models"}

# From the ground up; a unit may import any unit of a lower row, none of its own row or above.
# A unit is a module, or a whole sub-package; the sub-packages in SPLIT are looked into.
ROWS = (
    ("compat", "environment", "errors", "frozen", "keptsets", "onnxfuse", "roofline", "rows", "spec", "spectrogram", "stats"),
    (
        "axes", "corpus", "flops", "frames", "images", "kept", "manifest", "ops", "passes.schedule", "patchview", "recipe",
        "samples", "scores", "targets",
    ),
    (
        "answers", "breakeven", "bundle", "graphview", "lengths", "models", "passes.counts", "passes.rules", "program",
        "tensors", "textfiles", "timing", "untraceable",
    ),
    (
        "agreement", "capture", "fxview", "graphdiff", "onnxnames", "onnxops", "passes.axesmap", "prime", "tasks", "text",
        "workers",
    ),
    (
        "difference", "emit", "onnxlower", "passes.cost", "passes.levels", "passes.masks", "passes.prefix", "passes.values",
        "passes.verify", "pictures", "subject",
    ),
    (
        "data", "differ", "float64", "judgement", "onnxtypes", "passes.base", "passes.candidates", "passes.fact",
        "passes.policy", "stages",
    ),
    (
        "backends", "onnxquant", "passes.canonicalize", "passes.cleanup", "passes.compact", "passes.dense", "passes.facts",
        "passes.insert", "passes.lower", "passes.mark", "passes.optimize", "probes",
    ),
    ("chain", "coverage", "feeds", "folding", "passes.assumptions", "passes.impose", "plan"),
    ("attribution", "engine", "parity", "passes.place", "quantised", "record", "staged"),
    ("footprint", "latency", "passes.recognise", "proving", "tune", "verification", "watch"),
    ("layers", "passes", "passes.padding", "waterfall"),
    ("build", "cutout", "explanation", "findings", "report"),
    ("overview", "passwise"),
    ("api", "bisection"),
    ("demo",),
    ("cli",),
)
SPLIT = {"passes"}
ONLY_FROM = {"models": {"subject", "api", "demo", "cli"}}
LEAF = {"models": {"errors", "axes", "ops", "compat", "images", "spec"}, "images": {"errors", "spec"}}
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
    assert forbidden("latency", "timing") == ""
    assert forbidden("timing", "latency") == "latency is not below timing"
    assert forbidden("models", "program") == "models imports only axes, compat, errors, images, ops, spec"
    assert forbidden("capture", "models") == "only api, cli, demo, subject may import models"
