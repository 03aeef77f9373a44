"""What a user installs: the declared packages, and the built wheel's content."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tpcompile": "tpcompile", "passes": "tpcompile/passes", "models": "tpcompile/models"}


def installed(path: Path) -> str:
    """Where a source file lies once installed: ``passes/mark.py`` -> ``tpcompile/passes/mark.py``."""
    folder, *rest = path.relative_to(ROOT).parts
    return "/".join([FOLDERS[folder], *rest])


def sources(pattern: str) -> set[str]:
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob(pattern))
    return {installed(path) for path in found if "__pycache__" not in path.parts}


def test_packages_are_the_folders_with_an_init() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(name.removesuffix("/__init__.py").replace("/", ".") for name in sources("__init__.py"))


def test_constraints_pin_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["demo"], *extras["hf"], *extras["openvino"], *extras["timm"], *extras["test"]}
    names = {line.split(">")[0].split("[")[0].lower().replace("_", "-") for line in wanted} - {"tpcompile"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert sorted(names - pinned) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names inside a wheel built from a copy of the sources, so that no build folder is left in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = tree / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=tree, check=True)
    (built,) = out.glob("tpcompile-*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_nothing_else(wheel: set[str]) -> None:
    modules = {name for name in wheel if name.endswith(".py")}
    assert modules == sources("*.py")


def test_the_wheel_holds_types_templates_and_recipes(wheel: set[str]) -> None:
    assert "tpcompile/py.typed" in wheel
    assert sources("*.j2") | sources("*.yaml") <= wheel
