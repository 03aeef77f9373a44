"""``export --flops`` and ``recipe fit``: what is written, what is told, and what is refused."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from test_documents import check

import tpcompile
from tpcompile import bundle as bundles
from tpcompile import models
from tpcompile.cli import main
from tpcompile.cli.export import method_of
from tpcompile.errors import UsageError
from tpcompile.models.sources import DIGITS
from tpcompile.recipe import Recipe

SHAPE = "method: ltp\nparameters:\n  thresholds: [0.3]\n"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("tokens come and go\nthe rest is silence, he said\nsome of these words matter less\n", encoding="utf-8")
    return path


def test_a_bundle_tells_how_it_was_fitted(short_bert_folder: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "shape.yaml"
    recipe.write_text(f"{SHAPE}flops: 1.1\n", encoding="utf-8")
    result = call("export", "onnx", "-m", short_bert_folder, "--recipe", recipe, "--calibrate", data, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    told = check("export", result)["fitted"]
    manifest = bundles.read(tmp_path / "out").manifest
    assert manifest.fitted is not None
    assert told == manifest.fitted.model_dump(mode="json")
    assert (told["target"], told["data"], told["samples"], told["moves"]) == (1.1, str(data), 3, ["thresholds"])
    assert 1.1 <= told["reached"] < 1.12
    assert f"fitted, not learned: {manifest.fitted.text()}" in result.stderr
    assert f"fitted    {manifest.fitted.text()}" in call("inspect", tmp_path / "out").stdout
    assert manifest.method is not None
    assert manifest.method.parameters["thresholds"] == pytest.approx([told["factor"] * 0.3], rel=1e-5)
    assert bundles.read(tmp_path / "out" / "dense").manifest.fitted is None


def test_a_recipe_is_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcompile.operating.SAMPLES", 2)
    out = tmp_path / "mine.yaml"
    line = ["recipe", "fit", "-m", DIGITS, "--method", "evit", "--param", "drop_loc=[1, 2, 4]", "-o", out]
    found = check("recipe fit", call(*line, "--flops", "1.5", "--json"))
    recipe = Recipe.read(out)
    assert found["path"] == str(out)
    assert recipe.model_dump(mode="json") == {key: found[key] for key in Recipe.model_fields}
    assert recipe.flops is None
    assert str(recipe.note).endswith("on 2 samples of digits:calibration (asked for /1.5).")
    assert models.prune(models.load(DIGITS).model, recipe.method, **recipe.parameters).method_parameters == recipe.parameters
    again = call(*line, "--flops", "1.5")
    assert (again.exit_code, again.stderr) == (2, f"UsageError: {out} exists\n  fix     pass --force to replace it, or another -o\n")
    none = call(*line, "--force")
    assert none.exit_code == 2
    assert none.stderr == (
        "UsageError: no FLOPs ratio is given\n  fix     add --flops 2 for half the FLOPs, or give a recipe that names one\n"
    )


def test_a_recipe_that_could_not_be_written_is_refused_before_the_fit(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = ["recipe", "fit", "-m", "nowhere", "--method", "evit", "--flops", "2"]
    below = call(*line, "-o", tmp_path / "file" / "mine.yaml")
    assert below.exit_code == 3
    assert below.stderr == (
        f"EnvironmentFault: {tmp_path}/file/mine.yaml cannot be written: {tmp_path}/file takes no files\n  fix     choose another -o\n"
    )
    folder = call(*line, "-o", tmp_path, "--force")
    assert folder.exit_code == 2
    assert "is a directory" in folder.stderr


def test_a_recipe_brings_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "made" / "mine.yaml"
    Recipe(method="ltp", parameters={"thresholds": [0.1]}).write(path)
    assert Recipe.read(path).parameters == {"thresholds": [0.1]}
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.yaml"]


def test_a_shipped_shape_without_data_is_refused(tmp_path: Path) -> None:
    vit = importlib.import_module("timm.models.vision_transformer")
    model = vit.VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=12, num_heads=2, num_classes=3).eval()
    recipe = Recipe.read(Path("as-vit-deit-s"))
    with pytest.raises(UsageError) as caught:
        tpcompile.export(
            model, {"pixel_values": torch.zeros(1, 3, 16, 16)}, tmp_path / "out",
            method=recipe.method, parameters=recipe.parameters, flops=recipe.flops,
        )  # fmt: skip
    assert str(caught.value) == (
        "a FLOPs ratio is fitted on data, and none comes with this model\n"
        "  fix     give real inputs (--calibrate F or --data F; in Python, also a mapping of arrays a sample), "
        "or thresholds of your own and no ratio"
    )
    assert not (tmp_path / "out").exists()


def test_values_on_the_line_are_taken_as_they_are() -> None:
    assert method_of(None, {}, Path("ltp-roberta-base")).flops == 2
    assert method_of(None, {"n_ref": 64}, Path("ltp-roberta-base")).flops == 2
    taken = method_of(None, {"thresholds": [0.1] * 12}, Path("ltp-roberta-base"))
    assert taken.flops is None
    assert taken.parameters is not None
    assert taken.parameters["thresholds"] == [0.1] * 12
    assert method_of("ltp", {"thresholds": [0.1]}, None) == ("ltp", {"thresholds": [0.1]}, None)


def test_calibration_data_for_nothing_is_still_refused(bert_folder: Path, data: Path, tmp_path: Path) -> None:
    line = ["--method", "ltp", "--param", "thresholds=[0.1, 0.1, 0.1]", "--calibrate", data, "-o", tmp_path / "out"]
    assert "lowering auto calibrates nothing" in call("export", "onnx", "-m", bert_folder, *line).stderr


@pytest.mark.parametrize("value", ["1", "0.5", "'two'", ".inf"])
def test_a_ratio_in_a_recipe_is_above_1(value: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{SHAPE}flops: {value}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="is no recipe: flops: input should be"):
        Recipe.read(path)


def test_a_recipe_shows_its_ratio() -> None:
    shown = call("recipe", "show", "ltmp-deit-s")
    assert shown.stdout.splitlines()[-1] == "fitted on data to FLOPs /1.53: these values are where it starts"
    assert json.loads(call("recipe", "show", "ltmp-deit-s", "--json").stdout)["flops"] == 1.53
