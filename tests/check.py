"""The gate before the tests: lint and strict types, each reported with its time. ``python tests/check.py [--format]``.

Type checkers run no import hooks, so they cannot see that ``passes/`` installs as ``tpcompile.passes``: mypy gets a tree of links
(``.typecheck/``, ignored by git) that looks like the installed package.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ROOT / ".typecheck"


def link_tree() -> Path:
    """Build ``.typecheck/tpcompile``: a link per entry of ``tpcompile/``, plus ``passes`` and ``models``."""
    package = LINKS / "tpcompile"
    if package.is_dir():
        shutil.rmtree(package)  # removes links, not what they point to
    package.mkdir(parents=True)
    for entry in [*(ROOT / "tpcompile").iterdir(), ROOT / "passes", ROOT / "models"]:
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    return LINKS


def run(name: str, command: list[str], folder: Path = ROOT) -> bool:
    """Run one step and report it; True when it passed."""
    begin = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *command], cwd=folder, check=False).returncode
    print(f"{'ok  ' if code == 0 else 'FAIL'} {name:<7} {time.perf_counter() - begin:5.1f} s", flush=True)
    return code == 0


def main(arguments: list[str]) -> int:
    """Run every step, even after a failure; 0 when all passed."""
    config = str(ROOT / "pyproject.toml")
    steps = [run("lint", ["ruff", "check", "."])]
    if "--format" in arguments:
        steps.append(run("format", ["ruff", "format", "--check", "."]))
    # mypy is started inside the link tree, so that it does not meet ./tpcompile a second time.
    steps.append(run("types", ["mypy", "--config-file", config, "--strict", "-p", "tpcompile"], link_tree()))
    return 0 if all(steps) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
