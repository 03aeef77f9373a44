"""The verbs `diff`, `bisect` and `passes`: exit codes, texts and documents."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from tpcompile import bundle as bundles
from tpcompile.cli import main
from tpcompile.passes import DEFAULT, PASSES

LAYER = "dense.model.encoder.layer.1.output.dense"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(text_bundles: dict[str, Path]) -> Path:
    return text_bundles["onnx"]


@pytest.fixture
def planted(bundle: Path, tmp_path: Path) -> Path:
    """The same with a fault in one layer's weights, sealed again."""
    out = tmp_path / "planted"
    shutil.copytree(bundle, out)
    model = onnx.load(out / "model.onnx")
    (tensor,) = [one for one in model.graph.initializer if one.name == f"captured.{LAYER}.weight.T"]
    value = numpy_helper.to_array(tensor).copy()
    value[3, 4] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, out / "model.onnx")
    bundles.seal(out, bundles.read(out).manifest)
    return out


def document(result: Result, verb: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(result.stdout)
    assert found.pop("schema_version") == 1
    assert found.pop("verb") == verb
    return found


def test_diff(bundle: Path, planted: Path) -> None:
    same = call("diff", bundle, bundle, "--exit-code")
    assert (same.exit_code, same.stdout) == (0, "no differences\n")
    found = call("diff", bundle, planted)
    assert found.exit_code == 0
    assert f"  ~ {LAYER}.weight.T float32[64, 32]: by up to 0.5\n" in found.stdout
    asked = call("diff", bundle, planted, "--exit-code", "--json")
    assert asked.exit_code == 11
    shown = document(asked, "diff")
    assert shown["differs"] is True
    assert [graph["file"] for graph in shown["graphs"]] == ["model.onnx"]  # type: ignore[attr-defined]  # JSON


def test_diff_refuses(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    for b, code, text in [
        (tmp_path / "none", 2, "UsageError: nothing at "),
        (tmp_path / "bad.onnx", 2, "compare two of a kind"),
        (tmp_path, 9, "IntegrityError: "),
    ]:
        result = call("diff", bundle, b, "--exit-code")
        assert result.exit_code == code
        assert text in result.stderr
        assert "Traceback" not in result.stderr
    result = call("diff", tmp_path / "bad.onnx", tmp_path / "bad.onnx")
    assert result.exit_code == 4
    assert "ModelError: " in result.stderr


def test_bisect(planted: Path, bundle: Path, tmp_path: Path) -> None:
    result = call("bisect", planted, "-o", tmp_path / "part", "--json")
    assert result.exit_code == 5, result.output
    shown = document(result, "bisect")
    culprit = shown["culprit"]
    assert isinstance(culprit, dict)
    assert (culprit["module"], culprit["value"]) == (LAYER, "linear_11")
    assert {path.name for path in (tmp_path / "part").iterdir()} == {
        "engine.onnx", "engine.npz", "reference.onnx", "reference.npz", "rows.npz", "repro.py",
    }  # fmt: skip
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"FAILED bisect {planted}: site1 keeps other tokens in sample 2; ")
    assert last.endswith(f"of its weights {LAYER}.weight.T float32[64, 32]: by up to 0.5")
    sound = call("bisect", bundle, "--samples", "4")
    assert sound.exit_code == 0, sound.output
    assert sound.stdout.count("equal") == 4
    assert sound.stderr.splitlines()[-1].startswith(f"PASSED bisect {bundle}: 4 of 4 samples")


def test_bisect_of_a_model(bert_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "shape.yaml"
    recipe.write_text("method: ltp\nparameters:\n  thresholds: [0.0, 0.04, 0.06]\nflops: 1.4\n", encoding="utf-8")
    result = call("bisect", "-m", bert_folder, "--recipe", recipe, "--samples", "4", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-2] == "the recipe's values are a shape: `export` fits it to FLOPs /1.4 on data"
    shown = document(result, "bisect")
    assert (shown["mode"], shown["culprit"]) == ("pass", None)
    assert [step["name"] for step in shown["steps"]] == ["capture", *(step.name for step in DEFAULT.passes), "emit"]  # type: ignore[attr-defined]  # JSON


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ([], "give a bundle or --model, one of the two"),
        (["nowhere"], "no bundle at nowhere"),
        (["out", "-m", "bert"], "give a bundle or --model, one of the two"),
        (["-m", "bert", "--mode", "layer"], "layers are compared in a bundle's engine"),
        (["-m", "bert", "--param", "thresholds"], "'thresholds' is not of the form name=value"),
        (["-m", "nowhere", "--method", "ltp"], "nowhere"),
        (["out", "--samples", "0"], "0 is not in the range x>=1"),
        (["out", "--mode", "network"], "'network' is not one of"),
    ],
)
def test_bisect_refuses(line: list[str], text: str) -> None:
    result = call("bisect", *line)
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert result.stderr.splitlines()[-1] == "FAILED bisect UsageError"


def test_bisect_of_a_bundle_needs_no_method(bundle: Path) -> None:
    result = call("bisect", bundle, "--method", "ltp")
    assert result.exit_code == 2
    assert "a bundle needs none" in result.stderr


@pytest.mark.parametrize("name", list(PASSES))
def test_passes_show_prints_the_cases(name: str) -> None:
    shown = document(call("passes", "show", name, "--json"), "passes show")
    assert str(shown["cases"]).startswith(f"{shown['takes']} -> {shown['gives']}")
    assert "module docstring" not in str(shown["doc"])
    assert str(shown["cases"]) in call("passes", "show", name).stdout
