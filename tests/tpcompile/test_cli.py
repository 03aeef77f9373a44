"""The command line: exit codes, texts and documents, with real exports of a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tpcompile.cli import main

TEXTS = ["a quick brown fox jumps", "over the lazy dog", "tokens come and go", "one", "the rest is silence, he said"]
THRESHOLDS = "[0.0, 0.04, 0.06]"
"""For the tiny BERT's three layers: a text of some 20 tokens loses a part at the second and third."""

HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "transformers", "numpy", "scipy", "pydantic", "rich", "yaml"}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def export(model: Path, out: Path, *more: str, target: str = "onnx", thresholds: str = THRESHOLDS) -> Result:
    return call("export", target, "-m", model, "--method", "ltp", "--param", f"thresholds={thresholds}", "-o", out, *more)


def refused(result: Result, code: int, *texts: str) -> None:
    """The run ended with a code, a named error and a next step, and without a traceback."""
    assert result.exit_code == code, result.output
    for text in texts:
        assert text in result.stderr
    assert "  fix     " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def bundle(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "out"
    result = export(bert_folder, out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


# --- the shell around the verbs ---------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        f"import sys\nfrom tpcompile.cli import main\ntry: main(['--help'])\nfinally: print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "verb", ["", *main.commands, "passes list", "passes show", "recipe list", "recipe show", "recipe schema", "recipe fit"]
)
def test_every_verb_has_help(verb: str) -> None:
    result = call(*verb.split(), "-h")
    assert result.exit_code == 0
    assert f"Usage: tpcompile {verb}".strip() in result.stdout


def test_version() -> None:
    assert call("--version").stdout == "tpcompile 0.1.0\n"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("frob", "UsageError: No such command 'frob'."),
        ("export", "UsageError: Missing argument"),
        ("export onnx -o out", "UsageError: Missing option '-m' / '--model'."),
        ("export onnx -m m -o out --param thresholds", "'thresholds' is not of the form name=value"),
        ("export onnx -m m -o out --param t=[1,", "the value of 't' is not JSON: [1,"),
        ("validate out --max-drop lots", "'lots' is neither points (0.5pp) nor a fraction (0.005)"),
        ("validate out --max-drop 5", "did you mean 5pp?"),
        ("bench out --confidence 2", "2.0 is not in the range 0<x<1"),
        ("run out", "give exactly one of --text, --image and --input"),
        ("explain Nothing", "no error and no model is called 'Nothing'"),
        ("passes show nothing", "no pass is called 'nothing'"),
        ("doctor --target tpu", "unknown target 'tpu'"),
        ("inspect nowhere", "no bundle at nowhere"),
        ("validate nowhere", "no bundle at nowhere"),
        ("bench nowhere", "no bundle at nowhere"),
        ("verify nowhere", "no bundle at nowhere"),
        ("run nowhere --text words", "no bundle at nowhere"),
    ],
)
def test_a_wrong_line_is_a_usage_error(line: str, text: str) -> None:
    refused(call(*line.split()), 2, text)


def test_an_error_in_json_is_one_document() -> None:
    for line in ("--json inspect nowhere", "inspect nowhere --json"):
        result = call(*line.split())
        assert result.exit_code == 2
        assert json.loads(result.stdout) == {
            "schema_version": 1,
            "verb": "inspect",
            "error": {
                "class": "UsageError",
                "message": "no bundle at nowhere",
                "fix": "pass the directory that `tpcompile export` wrote",
                "exit_code": 2,
            },
        }


def test_a_gate_that_cannot_run_ends_with_its_verdict() -> None:
    assert call("validate", "nowhere").stderr.splitlines()[-1] == "FAILED validate UsageError"


def test_a_bug_keeps_its_traceback_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys.modules["tpcompile.cli.explain"], "error_classes", lambda: {}["oops"])
    result = call("explain", "UsageError")
    refused(result, 1, "InternalError: this is a bug in tpcompile: KeyError: 'oops'")
    (saved,) = tmp_path.iterdir()
    assert f"  traceback {saved}" in result.stderr
    assert "KeyError: 'oops'" in saved.read_text(encoding="utf-8")
    assert "Traceback" in call("explain", "UsageError", "-v").stderr


# --- verbs that need no model -----------------------------------------------------------------------------------------------


def test_explain_prints_cause_example_and_fix() -> None:
    assert call("explain", "UnmaskedFold").stdout == (
        "UnmaskedFold: A fold over tokens reads values that dropped tokens still hold.\n"
        "  cause    a sum, mean, max, softmax or matmul over a pruned token axis without a mask that is neutral there.\n"
        "  example  ``x.mean(1)`` after pruning: the masked model averages dropped tokens too, a gathered engine cannot.\n"
        "  fix      multiply by the keep mask (sum), or fill with -inf or -1e4 (softmax, max) before the fold.\n"
        "  exit     4\n"
    )


def test_passes_list_is_the_pipeline() -> None:
    document = json.loads(call("passes", "list", "--json").stdout)
    assert [row["name"] for row in document["passes"]] == document["pipeline"].split(",")
    assert document["passes"][0]["takes"] == "captured"
    assert document["passes"][-1]["gives"] == "compact"


def test_passes_show_prints_the_specification() -> None:
    result = call("passes", "show", "place")
    assert result.exit_code == 0
    assert result.stdout.startswith("place: marked -> placed\n")


def test_doctor_names_what_is_here() -> None:
    document = json.loads(call("doctor", "--json", "--target", "onnx").stdout)
    (row,) = [row for row in document["backends"] if row["name"] == "onnx"]
    assert row["ok"]
    assert document["versions"]["torch"]
    assert document["hardware"]["cpus"] >= 1
    assert call("explain", "backends").exit_code == 0


# --- export -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_journey(target: str, bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export(bert_folder, out, "--json", target=target)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == target
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    parity = call("validate", out, "--data", texts, "--json")
    assert parity.exit_code == 0, parity.output
    assert json.loads(parity.stdout)["verdict"] == "PASSED"
    assert parity.stderr.splitlines()[-1].startswith("PASSED validate ")

    latency = call("bench", out, "--data", texts, "--repeats", "2", "--json")
    assert latency.exit_code in (0, 10), latency.output
    assert latency.stderr.splitlines()[-1].split()[1] == "bench"

    assert call("verify", out).stderr.splitlines()[-1] == f"PASSED verify {out}: every file and vector is as exported"


def test_the_journey_in_stages(bert_folder: Path, bundle: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(bert_folder, out, "--form", "staged").exit_code == 0
    for verb, *more in (["validate", "--data", texts], ["bisect", "--data", texts], ["verify"]):
        done = call(verb, out, *more)
        assert done.exit_code == 0, done.output
    assert "form staged" in call("inspect", out).stdout
    ran, same = (json.loads(call("run", one, "--text", TEXTS[0], "--json").stdout) for one in (out, bundle))
    assert ran["sites"] == same["sites"]
    assert {"stage0.onnx", "stage1.onnx", "model.onnx.data"} <= {path.name for path in out.iterdir()}
    assert call("diff", "--exit-code", bundle, out).exit_code == 11


def test_existing_output_is_kept_unless_forced(bert_folder: Path, bundle: Path) -> None:
    before = (bundle / "tpcompile.json").read_bytes()
    refused(export(bert_folder, bundle), 2, "UsageError: ", str(bundle))
    assert (bundle / "tpcompile.json").read_bytes() == before


def test_force_replaces_a_bundle(bert_folder: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = json.loads(call("inspect", copy(bundle, out), "--json").stdout)
    after = json.loads(export(bert_folder, out, "--json", "--force", thresholds="[0.0, 0.0, 0.05]").stdout)
    assert before["identity"] != after["identity"] == json.loads(call("inspect", out, "--json").stdout)["identity"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--method", "ltq"], "unknown method 'ltq' (did you mean 'ltp'?)"),
        (["--method", "ltp", "--param", "threshold=[0.1,0.1,0.1]"], "unknown parameter 'threshold'"),
        (["--method", "ltp", "--param", "thresholds=[0.1]"], "thresholds"),
        (["--method", "ltp", "--param", "thresholds=high"], "thresholds"),
        (["--method", "ltp", "--recipe", "nothing.yaml"], "cannot read the recipe nothing.yaml"),
    ],
)
def test_a_wrong_method_is_a_usage_error(arguments: list[str], text: str, bert_folder: Path, tmp_path: Path) -> None:
    refused(call("export", "onnx", "-m", bert_folder, "-o", tmp_path / "out", *arguments), 2, "UsageError: ", text)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_target_is_a_usage_error(bert_folder: Path, tmp_path: Path) -> None:
    refused(export(bert_folder, tmp_path / "out", target="tpu"), 2, "unknown target 'tpu'")


def test_a_missing_model_directory(tmp_path: Path) -> None:
    refused(export(tmp_path / "none", tmp_path / "out"), 2, "UsageError: ", str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["no config", "config no JSON", "weights cut", "weights gone", "NaN"])
def test_a_corrupt_model_directory(damage: str, bert_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in bert_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    spoil(model, damage)
    refused(export(model, tmp_path / "out"), 4, "ModelError: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def spoil(model: Path, damage: str) -> None:
    from safetensors.numpy import load_file, save_file

    weights = model / "model.safetensors"
    if damage == "no config":
        (model / "config.json").unlink()
    elif damage == "config no JSON":
        (model / "config.json").write_text("{", encoding="utf-8")
    elif damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "weights gone":
        weights.unlink()
    else:
        tensors = load_file(weights)
        tensors["encoder.layer.1.output.dense.weight"][3, 4] = np.nan
        save_file(tensors, weights)


RECIPE = "method: ltp\nparameters:\n  thresholds: [0.0, 0.04, 0.06]\nnote: by hand\n"


def test_a_recipe_gives_the_same_bundle_as_its_parameters(bert_folder: Path, bundle: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    more = ["--recipe", recipe, "--dump-ir", tmp_path / "ir", "-o", tmp_path / "out", "--json"]
    done = call("export", "onnx", "-m", bert_folder, *more)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["identity"] == json.loads(call("inspect", bundle, "--json").stdout)["identity"]
    assert {"00-captured.txt", "rules.txt"} <= {path.name for path in (tmp_path / "ir").iterdir()}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("method: ltp\nparams: {}\n", "is no recipe: params: extra inputs are not permitted"),
        ("- ltp\n", "holds no mapping"),
        ("method: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("method: topk\n", "--method ltp, but"),
    ],
)
def test_a_wrong_recipe(content: str, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content, encoding="utf-8")
    refused(call("export", "onnx", "-m", "m", "--method", "ltp", "--recipe", recipe, "-o", tmp_path / "out"), 2, text)


# --- nothing half-written ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    refused(export(bert_folder, tmp_path / "out"), 3, "EnvironmentFault: ")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(bert_folder: Path, tmp_path: Path) -> None:
    # A shell may start its background jobs with SIGINT ignored, and Python would then ignore it too.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tpcompile.cli import main; main()"
    line = [
        "export",
        "onnx",
        "-m",
        str(bert_folder),
        "--method",
        "ltp",
        "--param",
        f"thresholds={THRESHOLDS}",
        "-o",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen([sys.executable, "-c", code, *line], stderr=subprocess.PIPE, text=True)
    while not any(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)  # in the middle of the work, not in the system call that made the folder
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Interrupted: stopped before the end" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


# --- using a bundle ---------------------------------------------------------------------------------------------------------


def test_inspect_reads_the_manifest(bundle: Path) -> None:
    document = json.loads(call("inspect", bundle, "--json").stdout)
    assert document["manifest"]["method"]["name"] == "ltp"
    page = call("inspect", bundle).stdout
    assert page.startswith("target    onnx (pruned), fp32, lowering dynamic, form single, batch one\n")
    assert "input     input_ids: int64[1, seq]\n" in page


@pytest.mark.parametrize(("line", "text"), [("a\n\nb", "texts.txt:2: the text is empty"), ("long " * 40, "texts.txt:1: ")])
def test_bad_data_is_named_by_line(line: str, text: str, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text(line, encoding="utf-8")
    for verb in ("validate", "bench"):
        refused(call(verb, bundle, "--data", path), 2, "InputError: ", text)


# --- gates ------------------------------------------------------------------------------------------------------------------


def copy(bundle: Path, to: Path) -> Path:
    for path in bundle.rglob("*"):
        if path.is_file():
            (to / path.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(bundle)).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("verb", ["verify", "run", "validate"])
def test_a_changed_file_is_9(verb: str, bundle: Path, tmp_path: Path) -> None:
    out = copy(bundle, tmp_path / "out")
    model = out / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(bytes(content))
    refused(call(verb, out, *(["--text", "words"] if verb == "run" else [])), 9, "IntegrityError: ", "model.onnx")
