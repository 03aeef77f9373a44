"""``tpcompile run``: on an image, with grids, classes and pictures; on texts and arrays; refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tpcompile.cli import main
from tpcompile.cli.run import Answer, Given, _document, _page
from tpcompile.kept import Kept
from tpcompile.spec import Patches

Image = pytest.importorskip("PIL.Image")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, message: str, fix: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.splitlines() == [message, f"  fix     {fix}"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Bright in the middle: patches of the border are dropped first."""
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[2:6, 2:8] = 100
    pixels[4:6, 2:4] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def test_the_page_draws_a_grid_per_site(image_bundle: Path, picture: Path) -> None:
    done = call("run", image_bundle, "--image", picture)
    assert done.exit_code == 0, done.output
    page = done.stdout.splitlines()
    assert page[:10] == [
        "site 0    7 of 17   6 of 16 patches, 1 of 1 prefix tokens",
        "  ....",
        "  .###",
        "  .###",
        "  ....",
        "site 1    2 of 17   1 of 16 patches, 1 of 1 prefix tokens",
        "  ....",
        "  ....",
        "  .#..",
        "  ....",
    ]
    assert page[10].startswith("logits float32[1, 10]  ")
    assert page[11].startswith("classes    ")
    assert page[11].count("(") == 5


def test_the_document_places_the_patches(image_bundle: Path, picture: Path) -> None:
    document = json.loads(call("run", image_bundle, "--image", picture, "--json").stdout)
    assert (document["tokens"], document["patches"]) == (None, {"prefix": 1, "rows": 4, "columns": 4})
    assert document["sites"][1] == {
        "site": 1, "of": 17, "kept": 2, "stored": 2, "positions": [0, 10], "prefix": 1,
        "patches": [{"position": 10, "row": 2, "column": 1}],
    }  # fmt: skip
    values = document["outputs"]["logits"]["values"][0]
    best = [row["class"] for row in document["answers"]["classes"]]
    assert best == np.argsort(values)[::-1][:5].tolist()
    assert document["answers"]["classes"][0]["logit"] == max(values)


def test_an_array_of_pixels_is_drawn_too(image_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 1, 8, 8), dtype=np.float32))
    page = call("run", image_bundle, "--input", f"pixel_values={tmp_path}/x.npy").stdout
    assert page.startswith("site 0   17 of 17   16 of 16 patches, 1 of 1 prefix tokens\n  ####\n")


def test_the_picture_has_a_panel_per_site(image_bundle: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    line = ("run", image_bundle, "--image", picture, "--save-picture", out)
    assert call(*line).exit_code == 0
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (224, 3 * 224 + 2 * 8, 3)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, 232, 0] == 34  # dropped and black
    assert pixels[60, 232 + 60, 0] == 100  # kept at the first site
    refused(call(*line), f"UsageError: {out} exists", "choose another name, or pass --force")
    assert call(*line, "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "x.png"]


def test_wrong_lines(image_bundle: Path, picture: Path, tmp_path: Path) -> None:
    one = "tpcompile run DIR --text 'some words'"
    both = ("--image", picture, "--text", "x")
    lines: list[tuple[tuple[Any, ...], str, str]] = [
        (both, "give exactly one of --text, --image and --input", one),
        (("--text", "x", "--save-picture", "k.png"), "--save-picture needs --image",
         "tpcompile run DIR --image F.jpg --save-picture kept.png"),
        (("--image", picture, "--save-picture", "k.jpg"), "k.jpg does not end in .png", "--save-picture kept.png"),
        (("--image", picture, "--save-picture", tmp_path / "no" / "k.png"), f"{tmp_path}/no is no folder",
         "make it first, or save elsewhere"),
    ]  # fmt: skip
    for line, message, fix in lines:
        refused(call("run", image_bundle, *line), f"UsageError: {message}", fix)


def test_bad_images(image_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("words", encoding="utf-8")
    formats = "use one of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"
    refused(call("run", image_bundle, "--image", tmp_path / "x.png"), f"InputError: {tmp_path}/x.png is no image", formats)
    missing = f"InputError: {tmp_path}/none.png cannot be read: No such file or directory"
    refused(call("run", image_bundle, "--image", tmp_path / "none.png"), missing, "check the path")


def answer(outputs: dict[str, np.ndarray], tokens: list[str] | None, patches: Patches | None = None) -> Answer:
    mask = np.ones(3, dtype=bool)
    return Answer(Given({}, tokens), outputs, Kept((mask,), (3,), (np.zeros(3, dtype=np.float32),)), patches)


def test_a_class_for_every_token() -> None:
    found = answer({"logits": np.eye(4, dtype=np.float32)[[2, 0, 3]][None]}, ["[CLS]", "a", "b"])
    assert _document(Path("x"), found)["answers"] == {"token_classes": [2, 0, 3]}
    assert _page(found).splitlines()[2:] == [
        "logits float32[1, 3, 4]  0 0 1 0 1 0 0 0 ...",
        "by token   [CLS]/2 a/0 b/3",
    ]
    assert _page(answer(dict(found.outputs), None)).splitlines()[-1] == "by token   0/2 1/0 2/3"


def test_a_span() -> None:
    ends = {"start_logits": np.array([[0.0, 1, 0]]), "end_logits": np.array([[0.0, 0, 1]])}
    found = answer(ends, ["[CLS]", "a", "b"])
    assert _document(Path("x"), found)["answers"] == {"span": [1, 2]}
    assert _page(found).splitlines()[-1] == "span       1 to 2  a b"


def test_hidden_states_have_no_answer() -> None:
    found = answer({"last_hidden_state": np.zeros((1, 3, 2), dtype=np.float32), "logits": np.zeros((1, 1))}, None)
    assert _document(Path("x"), found)["answers"] == {}
    assert "last_hidden_state float32[1, 3, 2]  0 0 0 0 0 0" in _page(found)


def test_report_draws_patches(image_bundle: Path, tmp_path: Path) -> None:
    """One file from one verb: parity, latency, and the patches over the images."""
    page = tmp_path / "page.html"
    done = call("report", image_bundle, "--data", "digits:test", "--samples", "3", "-o", page, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["report"] == str(page)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") >= 3
    assert "patches" in text


# --- texts and arrays ---------------------------------------------------------------------------------------------------------


def assert_refused(result: Result, text: str) -> None:
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert "  fix     " in result.stderr


def test_run_shows_kept_tokens(text_bundles: dict[str, Path]) -> None:
    document = json.loads(call("run", text_bundles["onnx"], "--text", "Ab cd", "--json").stdout)
    assert document["tokens"] == ["[CLS]", "a", "##b", "c", "##d", "[SEP]"]
    assert [row["of"] for row in document["sites"]] == [6] * len(document["sites"])
    for row in document["sites"]:
        assert [document["tokens"][place] for place in row["positions"]] == row["tokens"]
    page = call("run", text_bundles["onnx"], "--text", "Ab cd").stdout
    assert page.startswith("tokens    6         [CLS] a ##b c ##d [SEP]\nsite 0 ")


def test_run_takes_arrays_and_saves_outputs(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[2, 9, 8, 3]]))
    np.save(tmp_path / "mask.npy", np.ones((1, 4), dtype=np.int64))
    line: list[Any] = [
        "run",
        text_bundles["onnx"],
        "--input",
        f"input_ids={tmp_path}/ids.npy",
        "--input",
        f"attention_mask={tmp_path}/mask.npy",
    ]
    out = tmp_path / "outputs.npz"
    done = call(*line, "--save-outputs", out, "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)["outputs"]
    with np.load(out, allow_pickle=False) as saved:
        assert {name: list(saved[name].shape) for name in saved} == {name: row["shape"] for name, row in shown.items()}
    assert_refused(call(*line, "--save-outputs", out), "exists")
    assert call(*line, "--save-outputs", out, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--text", "  "], "the text is empty"),
        (["--text", "long " * 40], "InputError: "),
        (["--input", "input_ids=nothing.npy"], "nothing.npy is no numpy array"),
        (["--input", "input_ids"], "'input_ids' is not of the form NAME=FILE.npy"),
    ],
)
def test_run_refuses_bad_input(arguments: list[str], text: str, text_bundles: dict[str, Path]) -> None:
    assert_refused(call("run", text_bundles["onnx"], *arguments), text)


def test_run_refuses_pickles(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert_refused(call("run", text_bundles["onnx"], "--input", f"input_ids={tmp_path}/x.npy"), "no objects")
