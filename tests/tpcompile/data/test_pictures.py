"""Images as data: files, folders, classes and digits."""

from pathlib import Path

import numpy as np
import pytest

from tpcompile.data import pictures
from tpcompile.data.images import CONFIG, Preprocessing
from tpcompile.data.load import load_data
from tpcompile.errors import InputError, ModelError, UsageError
from tpcompile.spec import Patches

pytest.importorskip("PIL")

GRID = Patches(1, 4, 4)
NAMES = ("pixel_values",)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return config(tmp_path / "bundle", 3, 16)


def config(folder: Path, channels: int, side: int) -> Path:
    folder.mkdir()
    preprocessing = Preprocessing(channels, side, side, side, "bilinear", (0.5,) * channels, (0.5,) * channels)
    (folder / CONFIG).write_text(preprocessing.to_json(), encoding="utf-8")
    return folder


def load(spec, folder, limit=None, **changes):
    return load_data(spec, folder, 512, limit, **{"names": NAMES, "patches": GRID, **changes})


def test_one_file(bundle, draw):
    path = draw("a.jpg", size=(40, 20))
    (sample,) = load(path, bundle)
    assert (sample.text, sample.label, sample.length) == (str(path), None, 17)
    assert (sample.inputs["pixel_values"].shape, sample.inputs["pixel_values"].dtype) == ((1, 3, 16, 16), np.float32)
    assert sample.picture is not None
    assert (sample.picture.shape, sample.picture.dtype) == ((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(sample.inputs["pixel_values"], Preprocessing.read(bundle).normalise(sample.picture))


def test_grey_engines_see_grey(tmp_path, draw):
    (sample,) = load(draw("a.png"), config(tmp_path / "grey", 1, 16))
    assert sample.inputs["pixel_values"].shape == (1, 1, 16, 16)
    assert sample.picture is not None
    assert (sample.picture == sample.picture[..., :1]).all()


def test_a_folder_is_read_by_name_and_no_further_than_asked(bundle, draw, tmp_path):
    for name in ("many/b.png", "many/a.JPG", "many/.hidden.png"):
        draw(name)
    (tmp_path / "many" / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "many" / "c.png").write_bytes(b"broken")
    assert [Path(sample.text).name for sample in load(tmp_path / "many", bundle, 2)] == ["a.JPG", "b.png"]
    with pytest.raises(InputError, match=r"many.c\.png is no image"):
        load(tmp_path / "many", bundle)


def test_classes_take_turns(bundle, draw, tmp_path):
    for name in ("classes/dog/1.png", "classes/cat/1.png", "classes/cat/2.png", "classes/bird/x.png"):
        draw(name)
    (tmp_path / "classes" / "ant").mkdir()
    found = [(Path(sample.text).parent.name, sample.label) for sample in load(str(tmp_path / "classes"), bundle)]
    assert found == [("bird", 1), ("cat", 2), ("dog", 3), ("cat", 2)]
    assert [sample.label for sample in load(tmp_path / "classes", bundle, 2)] == [1, 2]


def test_digits_by_part_and_by_default(tmp_path, bundle):
    pytest.importorskip("sklearn")
    small = config(tmp_path / "small", 1, 8)
    default, named = load(None, small, 3), load("digits:test", small, 3)
    assert [sample.text for sample in default] == [f"digits:test[{i}]" for i in range(3)] == [sample.text for sample in named]
    assert all(sample.label in range(10) for sample in default)
    assert len(load("digits", small)) == 1797
    assert load("digits:train", bundle, 1)[0].inputs["pixel_values"].shape == (1, 3, 16, 16)
    with pytest.raises(UsageError, match="digits have no part 'half'"):
        load("digits:half", small)


def test_refusals(bundle, draw, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    draw("mixed/a.png")
    draw("mixed/b/c.png")
    draw("long.png", size=(1, 10_000))
    monkeypatch.setattr(pictures, "MAX_BYTES", 2 * 4 * 3 * 16 * 16)
    for i in range(4):
        draw(f"four/{i}.png")
    suffixes = ".bmp, .gif, .jpeg, .jpg, .pbm, .pgm, .png, .ppm, .tif, .tiff, .webp"
    cases = [
        (None, "this engine takes images, and none come with it", "pass --data with an image, a folder of images, or digits"),
        (tmp_path / "none.png", f"{tmp_path}/none.png cannot be read: No such file or directory", "check the path"),
        (tmp_path / "empty", f"{tmp_path}/empty holds no images", f"images end in {suffixes}"),
        (tmp_path / "mixed", f"{tmp_path}/mixed holds both images and folders", "keep one folder per class, or images only"),
        (tmp_path / "four", "4 images would take 0.0 GiB of memory", "pass --samples 2 (limit=...), or fewer"),
    ]
    for spec, message, fix in cases:
        with pytest.raises(InputError) as caught:
            load(spec, bundle)
        assert (caught.value.message, caught.value.fix) == (message, fix)


def test_an_elongated_image_is_named(tmp_path, draw):
    path = draw("long.png", size=(1, 30_000))
    with pytest.raises(InputError) as caught:
        load(path, config(tmp_path / "large", 3, 224))
    assert caught.value.message == f"{path}: an image of 1 x 30000 pixels is too elongated to resize"


def test_engines_that_take_something_else(bundle, draw):
    path = draw("a.png")
    with pytest.raises(UsageError) as caught:
        load(path, bundle, names=("pixel_values", "mask"))
    assert caught.value.message == "an image gives one input, the engine takes pixel_values, mask"
    with pytest.raises(ModelError) as unknown:
        load(path, bundle, patches=None)
    assert unknown.value.message == "the bundle does not say which token is which patch"
    with pytest.raises(UsageError, match="the limit on samples is 0"):
        load(path, bundle, 0)


def test_a_tokenizer_comes_first(bundle):
    (bundle / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        load("digits", bundle)
