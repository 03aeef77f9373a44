"""Preprocessing against timm and transformers, untrusted image files, and the digits."""

import builtins
import io
import json
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcompile.compat import ensure_torchvision
from tpcompile.data import images
from tpcompile.data.images import CONFIG, MAX_PIXELS, RESAMPLE, Preprocessing, digits, open_image
from tpcompile.errors import EnvironmentFault, InputError, ModelError, UsageError

Image = pytest.importorskip("PIL.Image")


def noise(height, width, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def config(channels=3, size=32, **changes):
    plain = {"input_size": (channels, size, size), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    return plain | {"mean": (0.485, 0.456, 0.406)[:channels], "std": (0.229, 0.224, 0.225)[:channels]} | changes


def timm_transform(found):
    ensure_torchvision()
    return pytest.importorskip("timm.data").create_transform(**found, is_training=False)


def restored(preprocessing, folder):
    (folder / CONFIG).write_text(preprocessing.to_json(), encoding="utf-8")
    return Preprocessing.read(folder)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(5, 90),
    width=st.integers(5, 90),
    channels=st.sampled_from([1, 3]),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0, 1.1, None]),
    crop_mode=st.sampled_from(["center", "squash", None]),
    interpolation=st.sampled_from(RESAMPLE),
)
def test_pixels_equal_timm(height, width, channels, crop_pct, crop_mode, interpolation):
    found = config(channels, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    image = noise(height, width, channels)
    expected = timm_transform(found)(image).numpy()[None]
    got = Preprocessing.from_timm(found)(image)
    assert (got.dtype, got.shape, got.flags.c_contiguous) == (np.float32, (1, channels, 32, 32), True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", RESAMPLE)
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 0.875), ("center", 1.0), ("squash", 0.875), ("squash", 1.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_transformers_reads_the_file_to_the_same_pixels(tmp_path, channels, crop_mode, crop_pct, interpolation):
    ensure_torchvision()
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    mine = Preprocessing.from_timm(config(channels, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation))
    assert restored(mine, tmp_path) == mine
    theirs = clip.from_pretrained(tmp_path)
    for height, width in ((40, 40), (64, 50), (33, 97), (20, 21)):
        image = noise(height, width, channels)
        np.testing.assert_allclose(theirs(image, return_tensors="np")["pixel_values"], mine(image), rtol=0, atol=2e-6)


def test_the_file_is_found_by_the_automatic_classes(tmp_path):
    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    for crop_pct, name in ((1.0, "ViTImageProcessor"), (0.875, "CLIPImageProcessor")):
        mine = restored(Preprocessing.from_timm(config(crop_mode="squash", crop_pct=crop_pct)), tmp_path)
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        assert type(theirs).__name__.startswith(name)
        image = noise(32, 32) if crop_pct == 1.0 else noise(36, 36)  # torch and Pillow round a resized pixel apart
        np.testing.assert_allclose(theirs(image, return_tensors="np")["pixel_values"], mine(image), rtol=0, atol=2e-6)


def test_the_file_holds_what_the_format_knows():
    document = json.loads(Preprocessing(1, 8, 8, (8, 8), "bicubic", (0.5,), (0.25,)).to_json())
    assert document == {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": False,
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "resample": 3,
        "do_center_crop": False,
        "crop_size": {"height": 8, "width": 8},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.25],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (4, 32, 32)}, "images have 1 or 3 channels, not 4"),
        ({"input_size": 32}, "input_size is 32, not (channels, height, width)"),
        ({"interpolation": "random"}, f"interpolation 'random' is none of {', '.join(RESAMPLE)}"),
        ({"crop_mode": "border"}, "crop_mode 'border' is none of center, squash"),
        ({"input_size": (3, 32, 64)}, "crop_mode 'center' needs a square input, this one is 32 x 64"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values for 3 channels"),
        ({"std": None}, "std has 0 values for 3 channels"),
    ],
)
def test_timm_configs_that_cannot_be_kept(changes, message):
    with pytest.raises(ModelError) as caught:
        Preprocessing.from_timm(config(**changes))
    assert caught.value.message == f"timm config: {message}"
    assert caught.value.fix == "pass timm.data.resolve_model_data_config(model), or a changed copy of it"


def test_one_mean_serves_every_channel():
    assert Preprocessing.from_timm(config(mean=[0.5], std=(0.5,))).mean == (0.5, 0.5, 0.5)


TWO_KINDS = "give either shortest_edge, or height and width"
NO_CROP = "crop_size with height and width is needed, or a size with both and no crop"


def document(**changes):
    plain = json.loads(Preprocessing.from_timm(config()).to_json()) | changes
    return json.dumps({key: value for key, value in plain.items() if value != "absent"})


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"do_normalize": False}, "mean", (0.0, 0.0, 0.0)),
        ({"do_rescale": False}, "rescale", 1.0),
        ({"do_resize": False}, "resize", None),
        ({"size": 40}, "resize", (40, 40)),
        ({"crop_size": 16}, "height", 16),
        ({"do_convert_rgb": None, "image_mean": [0.5], "image_std": [0.5]}, "channels", 1),
        ({"do_convert_rgb": True, "image_mean": [0.5], "image_std": [0.5]}, "mean", (0.5, 0.5, 0.5)),
        ({"processor_class": "CLIPProcessor", "do_pad": False, "pad_size": None}, "width", 32),
    ],
)
def test_other_files_are_read(tmp_path, changes, field, value):
    (tmp_path / CONFIG).write_text(document(**changes), encoding="utf-8")
    assert getattr(Preprocessing.read(tmp_path), field) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", " is not valid: Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("[]", " is not valid: Value error, not a JSON object"),
        (document(resample="absent"), " is not valid at resample: Field required"),
        (document(resample=0.5), " is not valid at resample: Input should be a valid integer"),
        (document(resample=9), " is not valid at resample: Input should be less than or equal to 5"),
        (document(do_reduce_labels=True), " is not valid at do_reduce_labels: Extra inputs are not permitted"),
        (document(size={"shortest_edge": 8, "height": 8, "width": 8}), f" is not valid at size: Value error, {TWO_KINDS}"),
        (document(size={"longest_edge": 8}), " is not valid at size.longest_edge: Extra inputs are not permitted"),
        (document(size={"height": 10**9, "width": 8}), " is not valid at size.height: Input should be less than or equal to 16384"),
        (document(size="absent"), " is not valid: Value error, size is missing"),
        (document(do_center_crop=False), f" is not valid: Value error, {NO_CROP}"),
        (document(image_mean=[0.5, 0.5]), " is not valid: Value error, image_mean and image_std need 1 or 3 values each"),
        (document(image_std=[0.5, 0.5, 0.0]), " is not valid: Value error, image_std must be above 0"),
        (document(image_mean=[float("nan")] * 3), " is not valid at image_mean.0: Input should be a finite number"),
        (" " * 2**20 + "{}", " is larger than 1048576 bytes"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path, content, message):
    (tmp_path / CONFIG).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        Preprocessing.read(tmp_path)
    assert caught.value.message == f"{tmp_path / CONFIG}{message}"
    assert caught.value.fix == "save the image processor again with transformers (save_pretrained writes every field)"


def test_no_file(tmp_path):
    with pytest.raises(InputError) as caught:
        Preprocessing.read(tmp_path)
    assert caught.value.message == f"no preprocessor_config.json in {tmp_path}"
    assert caught.value.fix == "save the image processor beside the model, or pass tensors"


def test_an_elongated_image_is_no_bomb():
    preprocessing = Preprocessing.from_timm(config(size=224))
    with pytest.raises(InputError) as caught:
        preprocessing(Image.new("RGB", (1, 5000)))
    assert caught.value.message == "an image of 1 x 5000 pixels is too elongated to resize"
    assert caught.value.fix == "crop it first"


def test_the_view_is_what_the_model_sees():
    preprocessing = Preprocessing.from_timm(config())
    image = noise(50, 70)
    view = preprocessing.view(image)
    assert (view.mode, view.size) == ("RGB", (32, 32))
    np.testing.assert_array_equal(preprocessing(image), preprocessing.normalise(np.asarray(view)))


# --- files ------------------------------------------------------------------------------------------------------------------


def test_modes_become_grey_or_colour(tmp_path):
    for mode, suffix, expected in [
        ("L", "png", "L"), ("RGB", "png", "RGB"), ("1", "png", "L"), ("P", "png", "RGB"), ("CMYK", "jpg", "RGB"),
        ("RGBA", "png", "RGB"), ("LA", "png", "RGB"), ("I;16", "png", "L"), ("YCbCr", "tif", "RGB"), ("RGB", "webp", "RGB"),
    ]:  # fmt: skip
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        Image.new(mode, (6, 4)).save(path)
        image = open_image(path)
        assert (image.mode, image.size) == (expected, (6, 4)), mode


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png")).tolist() == [[0, 0, 1, 128, 255]]


def test_transparent_parts_are_white(tmp_path):
    Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png")).tolist() == [[[255, 255, 255], [9, 9, 9]]]
    Image.new("P", (1, 1), 0).save(tmp_path / "b.gif", transparency=0)
    assert np.asarray(open_image(str(tmp_path / "b.gif"))).tolist() == [[[255, 255, 255]]]


def test_orientation_and_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 6)
    frames = [Image.new("L", (2, 2), value) for value in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(tmp_path / "moving.gif"))[0, 0].max() == 10


def bomb(width, height):
    """A PNG of some 60 bytes that claims any size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message", "fix"),
    [
        (bomb(2**14, 2**13), f" has more than {MAX_PIXELS} pixels", "make the image smaller"),
        (bomb(2**16, 2**16), f" has more than {MAX_PIXELS} pixels", "make the image smaller"),
        (b"", " is no image", "use one of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"),
        (b"hello", " is no image", "use one of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", " is no image", "use one of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"),
        (png(noise(60, 60))[:900], " is broken: image file is truncated", "copy or save the image again"),
        (bomb(4, 4), " is broken: ", "copy or save the image again"),
    ],
)
def test_bad_images_are_named(tmp_path, content, message, fix):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_image(path)
    assert caught.value.message.startswith(f"{path}{message}")
    assert caught.value.fix == fix


def test_a_mode_without_a_range(tmp_path):
    Image.new("F", (2, 2)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: pixels of mode F have no range of their own") as caught:
        open_image(tmp_path / "x.tif")
    assert caught.value.fix == "save the image with 8 or 16 bits"


def test_missing_files_and_folders(tmp_path):
    for path, reason in ((tmp_path / "none.png", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError) as caught:
            open_image(path)
        assert (caught.value.message, caught.value.fix) == (f"{path} cannot be read: {reason}", "check the path")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damage_never_escapes(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
    buffer = io.BytesIO()
    noise(9, 7).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    with suppress(InputError):
        image = open_image(path)
        assert image.mode in ("L", "RGB")
        assert image.width * image.height <= MAX_PIXELS


# --- packages and digits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "call", "message", "fix"),
    [
        ("PIL", lambda: open_image("x.png"), "images need the package 'pillow'", "pip install 'tpcompile[images]'"),
        ("sklearn", digits, "the digits need the package 'scikit-learn'", "pip install 'tpcompile[digits]'"),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, package, call, message, fix):
    actual = builtins.__import__

    def absent(name, *rest):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return actual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(EnvironmentFault) as caught:
        call()
    assert (caught.value.message, caught.value.fix) == (message, fix)


def test_importing_it_brings_no_pillow():
    source = Path(images.__file__).read_text(encoding="utf-8")
    assert "\nfrom PIL" not in source
    assert "\nimport PIL" not in source
    assert "sklearn" in sys.modules or "\nfrom sklearn" not in source


def test_digits_and_their_parts():
    pytest.importorskip("sklearn")
    pixels, labels = digits()
    assert (pixels.shape, pixels.dtype, labels.dtype, pixels.max()) == ((1797, 8, 8), np.uint8, np.int64, 255)
    assert set(labels.tolist()) == set(range(10))
    where = np.arange(1797) % 5
    for part, remainders in (("train", [0, 1, 2]), ("calibration", [3]), ("test", [4])):
        some, classes = digits(part)
        np.testing.assert_array_equal(some, pixels[np.isin(where, remainders)])
        np.testing.assert_array_equal(classes, labels[np.isin(where, remainders)])
    with pytest.raises(UsageError) as caught:
        digits("half")
    assert caught.value.message == "digits have no part 'half'"
    assert caught.value.fix == "one of all, train, calibration, test"
