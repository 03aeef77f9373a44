"""Every ``--json`` document against its published schema, and the schema against the table in docs/cli.md."""

import io
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tpcompile
from tpcompile import bundle as bundles
from tpcompile.cli import main
from tpcompile.cli.documents import documents
from tpcompile.cli.schema import schema_for, shape
from tpcompile.cli.settings import Settings
from tpcompile.demo import Demo
from tpcompile.recipe import Recipe
from tpcompile.report.page import EngineRun

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
THRESHOLDS = "thresholds=[0.0, 0.04, 0.06]"
TYPES = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict, "null": type(None), "number": (int, float)}


def faults(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str = "$") -> Iterator[str]:
    """Where a document breaks a schema of the kind that ``tpcompile schema`` prints."""
    if "$ref" in schema:
        yield from faults(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds):
        yield f"{at}: {value!r:.60} is no {' or '.join(kinds)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{at}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    for one in schema.get("allOf", []):
        yield from faults(value, one, root, at)
    choices = [list(faults(value, one, root, at)) for one in schema.get("anyOf", [])]
    if choices and all(choices):
        yield min(choices, key=len)[0]
    yield from _inside(value, schema, root, at)


def _inside(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{at}: no {name}" for name in schema.get("required", []) if name not in value)
        rest = schema.get("additionalProperties", {})
        for name, inner in value.items():
            yield from faults(inner, schema.get("properties", {}).get(name, rest), root, f"{at}.{name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, inner in enumerate(value):
            yield from faults(inner, schema["items"], root, f"{at}[{i}]")


def check(name: str, result: Result) -> dict[str, Any]:
    """A run's document, after it was held against the schema of that name."""
    found: dict[str, Any] = json.loads(result.stdout)
    schema = schema_for(name)
    assert list(faults(found, schema, schema)) == []
    assert "error" in found or set(found) == {"schema_version", "verb"} | keys(name)
    return found


def keys(name: str) -> set[str]:
    """The keys of a document besides its head."""
    shared: dict[str, Any] = {}
    for kind in documents()[name]:
        shape(kind, shared)
    return {key for kind in documents()[name] for key in shared[kind.__name__]["properties"]}


def published() -> dict[str, set[str]]:
    """The table of documents in docs/cli.md: verb -> keys."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## JSON documents\n")[2]
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines()
        if line.startswith("| `") and line.count(" | ") == 1
    ]  # fmt: skip
    return {verb.strip("`"): {key.strip("` ") for key in row.split(",")} for verb, row in rows}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(text_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own: the gates write their reports into it."""
    return Path(copytree(text_bundles["onnx"], tmp_path_factory.mktemp("mine") / "out"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("tokens come and go\none\nthe rest is silence, he said\n", encoding="utf-8")
    return path


def test_the_table_names_the_keys_of_every_document() -> None:
    assert {name: sorted(names) for name, names in published().items()} == {name: sorted(keys(name)) for name in documents()}


def test_the_documents_of_verbs_on_a_bundle(bundle: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ["--data", texts, "--json"]
    check("validate", call("validate", bundle, *data))
    check("bench", call("bench", bundle, "--repeats", "2", *data))
    check("report", call("report", bundle, "-o", tmp_path / "r.html", *data))
    check("bisect", call("bisect", bundle, "--samples", "3", *data))
    check("inspect", call("inspect", bundle, "--json"))
    check("run", call("run", bundle, "--text", "words", "--json"))
    check("verify", call("verify", bundle, "--json"))
    check("diff", call("diff", bundle, bundle / "dense", "--json"))
    recipe = Recipe.read(Path("minilm-ltp"))
    run = EngineRun(bundles.read(bundle).manifest, tpcompile.validate(bundle, texts), tpcompile.bench(bundle, data=texts, repeats=2))
    monkeypatch.setattr("tpcompile.demo.run", lambda **_: Demo((run,), recipe, tmp_path / "report.html", ("another is left out",)))
    check("demo", call("demo", "--json"))
    manifest = json.loads((bundle / "tpcompile.json").read_text(encoding="utf-8"))
    assert set(manifest) == set(schema_for("manifest")["properties"])


@pytest.mark.parametrize(
    "line",
    [
        "passes list", "passes show mark", "recipe list", "recipe show digits-50", "recipe schema", "explain UsageError",
        "explain backends", "doctor", "schema", "schema passes list",
    ],
)  # fmt: skip
def test_the_documents_of_verbs_without_one(line: str) -> None:
    names = {"passes show mark": "passes show", "recipe show digits-50": "recipe show", "explain UsageError": "explain"}
    check(names.get(line, "schema NAME" if line.startswith("schema ") else line), call(*line.split(), "--json"))


def test_the_documents_of_a_model(bert_folder: Path, tmp_path: Path) -> None:
    model = ["--method", "ltp", "--param", THRESHOLDS, "--json"]
    check("export", call("export", "onnx", "-m", bert_folder, *model, "-o", tmp_path / "out"))
    check("explain MODEL", call("explain", bert_folder, *model))


@pytest.mark.parametrize("name", sorted(documents().keys() - {"explain MODEL", "explain backends", "schema NAME"}))
def test_an_error_has_its_document(name: str) -> None:
    result = call(*name.split(), "--frob", "--json")
    assert check(name, result)["error"]["class"] == "UsageError"


def test_schema_lists_and_prints() -> None:
    names = call("schema").stdout.split("\n")
    assert {"validate", "passes list", "manifest"} <= set(names)
    assert json.loads(call("schema", "passes", "list").stdout) == schema_for("passes list")
    assert "no document is called 'frob'" in call("schema", "frob").stderr



def test_a_type_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="has no schema"):
        shape(set[int], {})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("settings", [Settings(), Settings(json=True), Settings(verbosity=-1)], ids=["plain", "json", "quiet"])
def test_progress_is_for_people_who_watch(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, with the time it still needs; not with --json, not with -q, not where stderr is a file."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with settings.work() as progress:
        assert (progress is not None) is (settings == Settings())
        for done in range(3):
            if progress is not None:
                progress("validate", done, 4)
                time.sleep(0.15)
    shown = terminal.getvalue()
    assert ("validate" in shown and "2/4" in shown and "0:00:0" in shown) is (settings == Settings())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with settings.work() as progress:
        assert progress is None
