"""Images: how one becomes an engine's input, how an untrusted file is opened, and the handwritten digits of scikit-learn."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tpcompile.errors import EnvironmentFault, InputError, ModelError, UsageError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIG = "preprocessor_config.json"
MAX_CONFIG = 2**20
MAX_PIXELS = 64 * 2**20
"""The most pixels an image may have, before and after resizing: a file of a few bytes can claim any size."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The decoders an untrusted file may reach. Pillow knows others, some of which start a program (EPS)."""
DIGIT_PARTS = {"all": (0, 1, 2, 3, 4), "train": (0, 1, 2), "calibration": (3,), "test": (4,)}
"""Part of the digits -> the remainders by 5 of its indices."""
CROP = 0.875
"""timm's crop_pct where a config has none."""

Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
RESAMPLE: tuple[Interpolation, ...] = get_args(Interpolation)
"""Pillow's numbers for them, by position."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the engine's input: resize, crop the centre (or pad with black), rescale, normalise.

    The crop's offset is half the surplus, rounded half to even, as in torchvision and timm.

    Attributes:
        channels: 1 (grey) or 3 (red, green, blue).
        height: of the input, after the crop.
        width: of the input, after the crop.
        resize: the shortest edge, or the exact (height, width), before the crop; None leaves the image as it is.
        interpolation: Pillow's filter for it.
        rescale: factor for the pixels 0..255.
        mean: per channel, subtracted after rescaling.
        std: per channel, divided by.
    """

    channels: int
    height: int
    width: int
    resize: int | tuple[int, int] | None
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1 / 255

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """The evaluation transform of timm: equal to ``timm.data.create_transform(**config, is_training=False)``.

        Args:
            config: a model's ``pretrained_cfg``, or what ``timm.data.resolve_model_data_config`` returns.

        Raises:
            ModelError: the config lacks a value, or asks for what a preprocessor_config.json cannot say.
        """
        channels, height, width = _timm_size(config)
        interpolation = str(config.get("interpolation"))
        if interpolation not in RESAMPLE:
            raise _bad_timm(f"interpolation {interpolation!r} is none of {', '.join(RESAMPLE)}")
        part = float(config.get("crop_pct") or CROP)
        scaled = math.floor(height / part), math.floor(width / part)
        mode = config.get("crop_mode") or "center"
        resize: int | tuple[int, int] = scaled
        if mode == "center":
            if scaled[0] != scaled[1]:
                raise _bad_timm(f"crop_mode 'center' needs a square input, this one is {height} x {width}")
            resize = scaled[0]
        elif mode != "squash":
            raise _bad_timm(f"crop_mode {mode!r} is none of center, squash")
        mean, std = (_timm_channels(config, name, channels) for name in ("mean", "std"))
        return cls(channels, height, width, resize, interpolation, mean, std)

    @classmethod
    def read(cls, folder: Path) -> "Preprocessing":
        """The ``preprocessor_config.json`` of a folder, as untrusted input.

        Raises:
            InputError: there is none.
            ModelError: it is no such file, or asks for a step that is not done here.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise InputError(f"no {CONFIG} in {folder}", fix="save the image processor beside the model, or pass tensors")
        fix = "save the image processor again with transformers (save_pretrained writes every field)"
        if path.stat().st_size > MAX_CONFIG:
            raise ModelError(f"{path} is larger than {MAX_CONFIG} bytes", fix=fix)
        try:
            return _Config.model_validate_json(path.read_bytes()).preprocessing
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ModelError(f"{path} is not valid{f' at {where}' if where else ''}: {first['msg']}", fix=fix) from error

    def to_json(self) -> str:
        """The content of a ``preprocessor_config.json`` with which transformers' image processors do the same."""
        crop = self.resize != (self.height, self.width)
        exact = (self.height, self.width) if self.resize is None else self.resize
        document = {
            "image_processor_type": "CLIPImageProcessor" if crop else "ViTImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": self.resize is not None,
            "size": {"shortest_edge": exact} if isinstance(exact, int) else _size(*exact),
            "resample": RESAMPLE.index(self.interpolation),
            "do_center_crop": crop,
            "crop_size": _size(self.height, self.width),
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        return json.dumps(document, indent=2) + "\n"

    def view(self, image: "Image") -> "Image":
        """The crop the model sees, ``height`` x ``width``, grey (``L``) or ``RGB``.

        Raises:
            InputError: the image is so elongated that resizing its shortest edge would fill the memory.
        """
        plain = _plain(image).convert("L" if self.channels == 1 else "RGB")
        if self.resize is not None:
            height, width = self._resized(plain.height, plain.width)
            plain = plain.resize((width, height), RESAMPLE.index(self.interpolation))
        return _centre(plain, self.height, self.width)

    def __call__(self, image: "Image") -> NDArray[np.float32]:
        """An image as the engine takes it.

        Returns:
            float32 ``[1, C, H, W]``.

        Raises:
            InputError: as for ``view``.
        """
        return self.normalise(np.asarray(self.view(image)))

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels of the right size, uint8 ``[H, W]`` or ``[H, W, C]``, as float32 ``[1, C, H, W]``."""
        planes = pixels.reshape(self.height, self.width, self.channels).transpose(2, 0, 1).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        return np.ascontiguousarray(((planes * np.float32(self.rescale) - mean) / std)[None], dtype=np.float32)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        long = int(self.resize * max(height, width) / min(height, width))
        if long * self.resize > MAX_PIXELS:
            raise InputError(f"an image of {width} x {height} pixels is too elongated to resize", fix="crop it first")
        return (self.resize, long) if height <= width else (long, self.resize)


def open_image(path: str | Path) -> "Image":
    """Open an image file as untrusted input: the first frame, upright, grey (``L``) or ``RGB``; transparent parts on white.

    Raises:
        InputError: no such file, no image, a truncated or broken one, more than ``MAX_PIXELS`` pixels.
        EnvironmentFault: Pillow is not installed.
    """
    pillow = _pillow()
    from PIL import ImageOps

    file = Path(path)
    try:
        with file.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of broken metadata, and of sizes that are refused here
            with pillow.open(stream, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise pillow.DecompressionBombError
                return _plain(ImageOps.exif_transpose(image))
    except InputError as error:
        raise InputError(f"{file}: {error.message}", fix=error.fix) from error
    except pillow.DecompressionBombError as error:
        raise InputError(f"{file} has more than {MAX_PIXELS} pixels", fix="make the image smaller") from error
    except pillow.UnidentifiedImageError as error:
        raise InputError(f"{file} is no image", fix=f"use one of {', '.join(FORMATS)}") from error
    except OSError as error:
        if error.errno is not None:
            raise InputError(f"{file} cannot be read: {error.strerror}", fix="check the path") from error
        raise _broken(file, error) from error
    except Exception as error:  # a broken file makes Pillow's decoders raise whatever they meet: SyntaxError, struct.error, ...
        raise _broken(file, error) from error


def digits(part: str = "all") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 handwritten digits that come with scikit-learn.

    Args:
        part: ``all``, or by index modulo 5 ``train`` (0, 1, 2), ``calibration`` (3) or ``test`` (4).

    Returns:
        pixels uint8 ``[n, 8, 8]``, 0 to 255, and classes int64 ``[n]``.

    Raises:
        UsageError: unknown part.
        EnvironmentFault: scikit-learn is not installed.
    """
    if part not in DIGIT_PARTS:
        raise UsageError(f"digits have no part {part!r}", fix=f"one of {', '.join(DIGIT_PARTS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EnvironmentFault("the digits need the package 'scikit-learn'", fix="pip install 'tpcompile[digits]'") from error
    found = load_digits()
    chosen = np.isin(np.arange(len(found.target)) % 5, DIGIT_PARTS[part])
    pixels = np.rint(found.images[chosen] * 255 / 16).astype(np.uint8)
    return pixels, found.target[chosen].astype(np.int64)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentFault("images need the package 'pillow'", fix="pip install 'tpcompile[images]'") from error
    return Image


def _broken(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is broken: {first_line(error)}", fix="copy or save the image again")


def _plain(image: "Image") -> "Image":
    """An image in mode ``L`` or ``RGB``: 16 bits to their upper 8, transparency on white."""
    if image.mode.startswith("I;16"):
        upper = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return cast("Image", _pillow().fromarray(upper))
    if image.mode in ("I", "F"):
        raise InputError(f"pixels of mode {image.mode} have no range of their own", fix="save the image with 8 or 16 bits")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = _pillow().new("RGBA", coloured.size, "white")
        return cast("Image", _pillow().alpha_composite(white, coloured).convert("RGB"))
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _centre(image: "Image", height: int, width: int) -> "Image":
    """Crop the centre, or pad with black where the image is smaller."""
    left, top = (_offset(have, want) for have, want in ((image.width, width), (image.height, height)))
    return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


def _offset(have: int, want: int) -> int:
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def _size(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}


def _bad_timm(message: str) -> ModelError:
    return ModelError(f"timm config: {message}", fix="pass timm.data.resolve_model_data_config(model), or a changed copy of it")


def _timm_size(config: Mapping[str, Any]) -> tuple[int, int, int]:
    size = config.get("input_size")
    if not isinstance(size, tuple | list) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise _bad_timm(f"input_size is {size!r}, not (channels, height, width)")
    if size[0] not in (1, 3):
        raise _bad_timm(f"images have 1 or 3 channels, not {size[0]}")
    return size[0], size[1], size[2]


def _timm_channels(config: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in config.get(name) or ())
    if len(values) not in (1, channels):
        raise _bad_timm(f"{name} has {len(values)} values for {channels} channels")
    return values * channels if len(values) == 1 else values


Edge = Annotated[int, Field(ge=1, le=2**14, strict=True)]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]
KNOWN_TO_NO_PIXEL = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_valid_processor_keys",
    "data_format",
    "input_data_format",
    "return_tensors",
    "disable_grouping",
    "device",
}
"""Fields transformers writes that change no pixel."""


class _Size(BaseModel):
    """``{"shortest_edge": n}`` or ``{"height": n, "width": n}``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shortest_edge: Edge | None = None
    height: Edge | None = None
    width: Edge | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "_Size":
        if (self.shortest_edge is None) == (self.height is None) or (self.height is None) != (self.width is None):
            raise ValueError("give either shortest_edge, or height and width")
        return self

    @property
    def value(self) -> int | tuple[int, int]:
        return self.shortest_edge if self.height is None or self.width is None else (self.height, self.width)  # type: ignore[return-value]  # one kind is given


class _Config(BaseModel):
    """The fields of a preprocessor_config.json that say what happens to the pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    do_resize: bool = True
    size: _Size | None = None
    resample: Annotated[int, Field(ge=0, le=len(RESAMPLE) - 1, strict=True)]
    do_center_crop: bool = False
    crop_size: _Size | None = None
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0)] = 1 / 255
    do_normalize: bool = True
    image_mean: Channels
    image_std: Channels
    do_convert_rgb: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, found: Any) -> Any:
        """Leave out what changes no pixel, and steps of other processors that are switched off."""
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return {
            key: value
            for key, value in found.items()
            if key in cls.model_fields or (key not in KNOWN_TO_NO_PIXEL and value is not None and value is not False)
        }

    @field_validator("size", "crop_size", mode="before")
    @classmethod
    def _square(cls, found: Any) -> Any:
        return {"height": found, "width": found} if isinstance(found, int) else found

    @model_validator(mode="after")
    def _whole(self) -> "_Config":
        if self.do_resize and self.size is None:
            raise ValueError("size is missing")
        if not isinstance(self._final, tuple):
            raise ValueError("crop_size with height and width is needed, or a size with both and no crop")
        if len(self.image_mean) not in (1, 3) or len(self.image_mean) != len(self.image_std):
            raise ValueError("image_mean and image_std need 1 or 3 values each")
        if self.do_normalize and min(self.image_std) <= 0:
            raise ValueError("image_std must be above 0")
        return self

    @property
    def _final(self) -> int | tuple[int, int] | None:
        last = self.crop_size if self.do_center_crop else self.size if self.do_resize else None
        return None if last is None else last.value

    @property
    def preprocessing(self) -> Preprocessing:
        channels = 3 if self.do_convert_rgb else len(self.image_mean)
        height, width = cast(tuple[int, int], self._final)
        mean, std = (values * (channels // len(values)) for values in (self.image_mean, self.image_std))
        return Preprocessing(
            channels=channels,
            height=height,
            width=width,
            resize=self.size.value if self.do_resize and self.size else None,
            interpolation=RESAMPLE[self.resample],
            mean=mean if self.do_normalize else (0.0,) * channels,
            std=std if self.do_normalize else (1.0,) * channels,
            rescale=self.rescale_factor if self.do_rescale else 1.0,
        )
