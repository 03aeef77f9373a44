"""Real images to prove and time on: a file, a folder, or scikit-learn's digits, as an engine takes them."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tpcompile.data import tasks
from tpcompile.data.images import Preprocessing, digits, open_image
from tpcompile.data.samples import Sample
from tpcompile.data.textfiles import read_text
from tpcompile.errors import InputError, ModelError, UsageError
from tpcompile.spec import Patches

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"])
"""Files with another suffix are no images of a folder."""
MAX_BYTES = 4 * 2**30
"""The most memory the inputs of all samples may take."""

CLASSES, SYNSETS, TABLE = 1000, "LOC_synset_mapping.txt", "LOC_val_solution.csv"
"""Of ImageNet: how many classes, and the published lists of synsets and of labels."""

Source = tuple[str, int | None, Callable[[], "Image"]]
"""Where an image comes from, its class where known, and how to open it."""


def load_images(
    spec: str | Path | None, folder: Path, limit: int | None, *, names: Sequence[str], patches: Patches | None
) -> list[Sample]:
    """Read and preprocess images.

    Args:
        spec: an image file; a folder of images, sorted by name; a folder of folders of images, one per class, of which the
            first images of every class come first, then the second ones; ``imagenet:FOLDER``, its published layouts;
            ``datasets:FOLDER[:SPLIT]``; ``digits`` or ``digits:PART``, scikit-learn's. None is
            ``digits:test`` where the engine takes grey images of 8 x 8, and an error elsewhere.
        folder: with ``preprocessor_config.json``.
        limit: the most images, from the front; no others are opened.
        names: the engine's one input.
        patches: the engine's tokens.

    Raises:
        InputError: no data, no such file, no image, too many for the memory.
        UsageError: an unknown part of the digits; an engine with more inputs.
        ModelError: the bundle does not say how images become tokens.
        EnvironmentFault: Pillow or scikit-learn is missing.
    """
    if patches is None:
        raise ModelError("the bundle does not say which token is which patch", fix="export it again")
    preprocessing = Preprocessing.read(folder)
    found = list(itertools.islice(_sources(spec, preprocessing), limit))
    need = 4 * len(found) * preprocessing.channels * preprocessing.height * preprocessing.width
    if need > MAX_BYTES:
        fix = f"pass --samples {MAX_BYTES * len(found) // need} (limit=...), or fewer"
        raise InputError(f"{len(found)} images would take {need / 2**30:.1f} GiB of memory", fix=fix)
    return [image_sample(name, label, read(), preprocessing, names, patches) for name, label, read in found]


def image_sample(
    name: str,
    label: int | None,
    image: "Image",
    preprocessing: Preprocessing,
    names: Sequence[str],
    patches: Patches | None = None,
) -> Sample:
    """One image as an engine takes it.

    Args:
        name: where it came from; begins the message of an error.
        label: its class, where known.
        image: any size.
        preprocessing: of the engine.
        names: the engine's one input.
        patches: of the engine; the sample's length is unknown without them.

    Raises:
        InputError: the image is too elongated.
        UsageError: the engine has more inputs.
    """
    if len(names) != 1:
        raise UsageError(f"an image gives one input, the engine takes {', '.join(names)}", fix="pass tensors")
    try:
        view = preprocessing.view(image)
    except InputError as error:
        raise InputError(f"{name}: {error.message}", fix=error.fix) from error
    return Sample(
        text=name,
        inputs={names[0]: preprocessing.normalise(np.asarray(view))},
        label=label,
        tokens=patches.tokens if patches is not None else 0,
        picture=np.asarray(view.convert("RGB")),
    )


def _sources(spec: str | Path | None, preprocessing: Preprocessing) -> Iterator[Source]:
    if spec is None:
        if (preprocessing.channels, preprocessing.height, preprocessing.width) != (1, 8, 8):
            raise InputError(
                "this engine takes images, and none come with it", fix="pass --data with an image, a folder of images, or digits"
            )
        spec = "digits:test"
    name, _, part = str(spec).partition(":")
    if name == "digits":
        return _digits(part or "all")
    if name == "imagenet":
        return _imagenet(Path(part))
    if name == "datasets":
        return ((source, label, partial(_same, image)) for source, label, image in tasks.images(str(spec), part))
    path = Path(spec)
    return _folder(path) if path.is_dir() else iter([_file(path)])


def _digits(part: str) -> Iterator[Source]:
    from PIL import Image

    for number, (image, label) in enumerate(zip(*digits(part), strict=True)):
        yield f"digits:{part}[{number}]", int(label), partial(Image.fromarray, image)


def _same(image: "Image") -> "Image":
    return image


def _imagenet(folder: Path) -> Iterator[Source]:
    """ImageNet's validation images as they are published: a folder per synset, or one folder and a table of labels.

    A class is the place of its synset among all thousand, which a part of the data does not show: then the list of synsets is needed.
    """
    inside = next((one for one in (folder / "val", folder / "ILSVRC" / "Data" / "CLS-LOC" / "val") if one.is_dir()), folder)
    files, folders = _entries(inside)
    synsets = _synsets(folder) or [one.name for one in folders]
    if len(synsets) != CLASSES and not _synsets(folder):
        fix = f"keep all {CLASSES} folders, or {SYNSETS} beside them"
        raise InputError(f"{inside} holds {len(synsets)} classes, and no {SYNSETS} says which", fix=fix)
    number = {name: i for i, name in enumerate(synsets)}
    if files:
        table = folder / TABLE
        if not table.is_file():
            fix = f"put {TABLE} there, or keep a folder per synset"
            raise InputError(f"{inside} holds images of no class, and there is no {table}", fix=fix)
        labels = _labels(table, number)
        unknown = [path for path in files if path.stem not in labels]
        if unknown:
            raise InputError(f"{table} has no label of {unknown[0].name}", fix="pass the images and the table as published")
        return (_file(path, labels[path.stem]) for path in files)
    if strange := [one.name for one in folders if one.name not in number]:
        raise InputError(f"{SYNSETS} has no class for the folder {strange[0]}", fix="pass the list of synsets as published")
    return _in_turns([_file(path, number[one.name]) for path in _entries(one)[0]] for one in folders)


def _labels(table: Path, number: Mapping[str, int]) -> dict[str, int]:
    """Image -> class, of a table ``ImageId,PredictionString``: the first word of the second column is the synset."""
    found = {}
    for place, line in enumerate(read_text(table).splitlines()[1:], 2):
        image, _, boxes = line.partition(",")
        synset = boxes.partition(" ")[0]
        if synset not in number:
            raise InputError(f"{table}:{place}: {synset!r} is no class", fix="pass the table as published")
        found[image] = number[synset]
    return found


def _synsets(folder: Path) -> list[str]:
    path = folder / SYNSETS
    return [line.split()[0] for line in read_text(path).splitlines() if line.strip()] if path.is_file() else []


def _file(path: Path, label: int | None = None) -> Source:
    return str(path), label, partial(open_image, path)


def _folder(folder: Path) -> Iterator[Source]:
    """The images of a folder; of its class folders in turn, so that any first part is a fair sample."""
    files, folders = _entries(folder)
    if files and folders:
        raise InputError(f"{folder} holds both images and folders", fix="keep one folder per class, or images only")
    if files:
        return (_file(path) for path in files)
    classes = [_entries(one)[0] for one in folders]
    if not any(classes):
        raise InputError(f"{folder} holds no images", fix=f"images end in {', '.join(sorted(SUFFIXES))}")
    return _in_turns([_file(path, label) for path in paths] for label, paths in enumerate(classes))


def _in_turns(classes: Iterable[Sequence[Source]]) -> Iterator[Source]:
    """The first image of every class, then the second ones."""
    return (source for row in itertools.zip_longest(*classes) for source in row if source is not None)


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files and the folders in a folder, each sorted by name; hidden ones left out."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}", fix="check the path") from error
    return [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()], [p for p in entries if p.is_dir()]
