import inspect
import json
import re
from collections.abc import Mapping

import pytest
from click.testing import CliRunner

from tpcompile import errors
from tpcompile.cli import main
from tpcompile.errors import RigidAxis, TpcompileError, Where

CODES = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TpcompileError)]


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_every_class_says_cause_example_and_fix(found: type[TpcompileError]) -> None:
    doc = inspect.cleandoc(found.__doc__ or "")
    assert re.findall(r"^(Cause|Example|Fix): \S", doc, re.MULTILINE) == ["Cause", "Example", "Fix"]
    assert not doc.partition("\n")[0].startswith("Cause")


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_every_class_has_an_exit_code_of_the_table(found: type[TpcompileError]) -> None:
    assert found.exit_code in CODES


def drawn() -> dict[str, tuple[str | None, int]]:
    """The tree in the module's docstring: name -> parent and exit code (inherited where none is drawn)."""
    parents: list[str] = []
    found: dict[str, tuple[str | None, int]] = {}
    for line in (errors.__doc__ or "").splitlines():
        row = re.match(r"    ([│├└─ ]*)([A-Z]\w+) +(\d+)?", line)
        if row is None:
            continue
        depth = len(row[1]) // 4
        parents[depth:] = [row[2]]
        parent = parents[depth - 1] if depth else None
        code = int(row[3]) if row[3] else found[parent][1] if parent else 0
        found[row[2]] = (parent, code)
    return found


def test_the_drawn_tree_is_the_real_tree() -> None:
    real = {
        found.__name__: (None if found is TpcompileError else found.__mro__[1].__name__, found.exit_code) for found in CLASSES
    }
    assert drawn() == real


def test_a_formatted_error_reads_from_what_to_next_step() -> None:
    where = Where("/home/user/vit.py", 88, "pos = keep.cumsum(1)", "blocks.3", "forward")
    error = RigidAxis(
        "aten.cumsum.default reads the position on t1.",
        where=where,
        node="%c4: i64[B, t1] = aten.cumsum.default(%k2, 1)",
        during="place, after canonicalize, recognise, mark",
        fix="compute positions before the first site",
    )
    assert str(error) == (
        "aten.cumsum.default reads the position on t1.\n"
        "  at      vit.py:88 in forward:  pos = keep.cumsum(1)   module blocks.3\n"
        "  node    %c4: i64[B, t1] = aten.cumsum.default(%k2, 1)\n"
        "  during  place, after canonicalize, recognise, mark\n"
        "  fix     compute positions before the first site"
    )


def test_unknown_parts_leave_no_lines() -> None:
    assert str(TpcompileError("impossible")) == "impossible"
    assert str(TpcompileError("no", where=Where(module="blocks.3"))) == "no\n  at      module blocks.3"


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_explain_tells_of_a_class(found: type[TpcompileError]) -> None:
    page = CliRunner().invoke(main, ["explain", found.__name__])
    assert page.exit_code == 0, page.output
    doc = inspect.cleandoc(found.__doc__ or "")
    sections = {
        name.lower(): " ".join(text.split()) for name, text in re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", doc, re.M | re.S)
    }
    summary = doc.partition("\n")[0]
    rows = [f"{found.__name__}: {summary}", *(f"  {name:<8} {text}" for name, text in sections.items())]
    assert page.stdout.splitlines() == [*rows, f"  exit     {found.exit_code}"]
    assert list(sections) == ["cause", "example", "fix"]
    document: Mapping[str, object] = json.loads(CliRunner().invoke(main, ["explain", found.__name__, "--json"]).stdout)
    head = {"schema_version": 1, "verb": "explain", "name": found.__name__, "exit_code": found.exit_code, "summary": summary}
    assert document == head | sections
