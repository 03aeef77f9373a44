"""``tpcompile run``: one input through an engine, with the tokens it kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings
from tpcompile.errors import InputError, UsageError
from tpcompile.files import replacing

if TYPE_CHECKING:
    import numpy as np

    from tpcompile.kept import Kept
    from tpcompile.spec import Patches

    Array = np.ndarray[Any, Any]

FILE = click.Path(path_type=Path, dir_okay=False)
TOP = 5
"""Classes shown."""


@dataclass(frozen=True, eq=False)
class Given:
    """What one run starts from.

    Attributes:
        inputs: the engine's, by name.
        tokens: a text's, in words.
        picture: uint8 ``[H, W, 3]``, an image as the model sees it.
    """

    inputs: Mapping[str, "Array"]
    tokens: Sequence[str] | None = None
    picture: "Array | None" = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What one run ended with.

    Attributes:
        given: what it started from.
        outputs: by name.
        kept: per site.
        patches: which part of the image each token is, where the tokens are patches.
    """

    given: Given
    outputs: Mapping[str, "Array"]
    kept: "Kept"
    patches: "Patches | None"


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--text", help="A text, tokenised with the bundle's own tokenizer.")
@click.option("--image", metavar="FILE", type=FILE, help="An image, resized and cropped as the bundle says.")
@click.option("--input", "arrays", multiple=True, metavar="NAME=FILE.npy", help="An input as numpy array; may be repeated.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0: all.")
@click.option("--save-outputs", "save", metavar="F.npz", type=FILE, help="Write the outputs as numpy archive.")
@click.option(
    "--save-picture",
    "drawing",
    metavar="F.png",
    type=FILE,
    help="Write the image, and per site with its dropped patches darkened.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.pass_obj
def run(settings: Settings, /, bundle: Path, **options: Any) -> None:
    """Run one input and show outputs and kept tokens."""
    _check(options)
    save, drawing = options["save"], options["drawing"]
    with settings.work():
        from tpcompile.engine import load

        with load(bundle, threads=options["threads"]) as engine:
            given = _given(bundle, [spec.name for spec in engine.inputs], options)
            grid = engine.manifest.patches
            if drawing is not None and grid is None:
                raise UsageError("this engine's tokens are no patches", fix="leave out --save-picture")
            outputs, kept = engine.kept(**given.inputs)
            answer = Answer(given, outputs, kept, grid.spec if grid is not None else None)
        if save is not None:
            with replacing(save) as file:
                _archive(file, outputs)
        if drawing is not None:
            with replacing(drawing) as file:
                _draw(file, answer)
    settings.emit(_document(bundle, answer), _page(answer))


def _check(options: Mapping[str, Any]) -> None:
    """Refuse what is wrong with the options before anything is loaded.

    Raises:
        UsageError: not exactly one kind of input, or a file that exists.
    """
    if (options["text"] is not None) + (options["image"] is not None) + bool(options["arrays"]) != 1:
        raise UsageError("give exactly one of --text, --image and --input", fix="tpcompile run DIR --text 'some words'")
    drawing: Path | None = options["drawing"]
    if drawing is not None and options["image"] is None:
        raise UsageError("--save-picture needs --image", fix="tpcompile run DIR --image F.jpg --save-picture kept.png")
    if drawing is not None and drawing.suffix.lower() != ".png":
        raise UsageError(f"{drawing} does not end in .png", fix="--save-picture kept.png")
    for path in (options["save"], drawing):
        if path is not None and path.exists() and not options["force"]:
            raise UsageError(f"{path} exists", fix="choose another name, or pass --force")
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path.parent} is no folder", fix="make it first, or save elsewhere")


def _given(bundle: Path, names: Sequence[str], options: Mapping[str, Any]) -> Given:
    if options["text"] is not None:
        return _encoded(bundle, options["text"], names)
    if options["image"] is not None:
        return _seen(bundle, options["image"], names)
    return Given(_arrays(options["arrays"]))


def _encoded(bundle: Path, text: str, names: Sequence[str]) -> Given:
    """The engine's inputs, int64 ``[1, n]``, and the tokens, for one text."""
    import numpy as np

    from tpcompile.data.load import open_tokenizer

    if not text.strip():
        raise InputError("the text is empty", fix="tpcompile run DIR --text 'some words'")
    encoding = open_tokenizer(bundle).encode(text)
    made = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
    unknown = [name for name in names if name not in made]
    if unknown:
        raise UsageError(f"a text gives no input '{unknown[0]}'", fix=f"pass {' '.join(f'--input {n}=F.npy' for n in names)}")
    return Given({name: np.array([made[name]], dtype=np.int64) for name in names}, list(encoding.tokens))


def _seen(bundle: Path, path: Path, names: Sequence[str]) -> Given:
    """The engine's input, float32 ``[1, C, H, W]``, and the picture, for one image."""
    from tpcompile.data.images import Preprocessing, open_image
    from tpcompile.data.pictures import image_sample

    preprocessing = Preprocessing.read(bundle)
    sample = image_sample(str(path), None, open_image(path), preprocessing, names)
    return Given(sample.inputs, picture=sample.picture)


def _arrays(pairs: tuple[str, ...]) -> dict[str, "Array"]:
    """Read ``name=file.npy`` pairs; pickled objects are refused."""
    import numpy as np

    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals:
            raise UsageError(f"'{pair}' is not of the form NAME=FILE.npy", fix="--input input_ids=ids.npy")
        try:
            found[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} is no numpy array: {error}", fix="write it with numpy.save; no objects") from error
        if not isinstance(found[name], np.ndarray):
            raise InputError(f"{path} is an archive of arrays", fix="write one array with numpy.save")
    return found


def _archive(file: BinaryIO, outputs: Mapping[str, "Array"]) -> None:
    import numpy as np

    np.savez(file, allow_pickle=False, **outputs)


def _draw(file: BinaryIO, answer: Answer) -> None:
    """The picture and a panel per site."""
    from tpcompile.report import patchview

    if answer.given.picture is not None and answer.patches is not None:
        grids = [patchview.grid(mask, answer.patches) for mask in answer.kept.masks]
        file.write(patchview.png(patchview.panels(answer.given.picture, grids)))


def _sites(answer: Answer) -> list[dict[str, Any]]:
    """Per site: how many tokens live and are stored, and where."""
    rows = []
    for number, (mask, stored) in enumerate(zip(answer.kept.masks, answer.kept.stored, strict=True)):
        positions = [int(place) for place in mask.nonzero()[0]]
        row: dict[str, Any] = {
            "site": number,
            "of": len(mask),
            "kept": len(positions),
            "stored": int(stored),
            "positions": positions,
        }
        if answer.given.tokens is not None:
            row["tokens"] = [answer.given.tokens[place] for place in positions]
        if answer.patches is not None:
            prefix, columns = answer.patches.prefix, answer.patches.columns
            row["prefix"] = sum(place < prefix for place in positions)
            places = [(place, *divmod(place - prefix, columns)) for place in positions if place >= prefix]
            row["patches"] = [{"position": place, "row": y, "column": x} for place, y, x in places]
        rows.append(row)
    return rows


def _answers(outputs: Mapping[str, "Array"]) -> dict[str, Any]:
    """What the usual outputs say: ``classes`` (the best, best first), ``token_classes`` (one each), ``span`` (both ends in it)."""
    found: dict[str, Any] = {}
    logits = outputs.get("logits")
    if logits is not None and logits.ndim == 2 and logits.shape[1] > 1:
        best = (-logits[0]).argsort(kind="stable")[:TOP]
        found["classes"] = [{"class": int(i), "logit": float(logits[0, i])} for i in best]
    if logits is not None and logits.ndim == 3:
        found["token_classes"] = logits[0].argmax(axis=-1).tolist()
    ends = [outputs[name] for name in ("start_logits", "end_logits") if name in outputs]
    if len(ends) == 2:
        found["span"] = [int(end[0].argmax()) for end in ends]
    return found


def _document(bundle: Path, answer: Answer) -> dict[str, Any]:
    values = {n: {"dtype": str(v.dtype), "shape": list(v.shape), "values": v.tolist()} for n, v in answer.outputs.items()}
    grid = answer.patches
    return {
        "bundle": str(bundle),
        "tokens": answer.given.tokens,
        "patches": None if grid is None else {"prefix": grid.prefix, "rows": grid.rows, "columns": grid.columns},
        "sites": _sites(answer),
        "answers": _answers(answer.outputs),
        "outputs": values,
    }


def _page(answer: Answer) -> str:
    tokens = answer.given.tokens
    page = [] if tokens is None else [f"tokens {len(tokens):>4}         {' '.join(tokens)}"]
    for row in _sites(answer):
        head = f"site {row['site']:<2}{row['kept']:>4} of {row['of']:<4} "
        if answer.patches is None:
            page.append(head + " ".join(map(str, row.get("tokens", row["positions"]))))
        else:
            page += _drawn(head, answer.kept.masks[row["site"]], answer.patches)
    for name, value in answer.outputs.items():
        numbers = " ".join(f"{number:.6g}" for number in value.reshape(-1)[:8])
        page.append(f"{name} {value.dtype}{list(value.shape)}  {numbers}{' ...' if value.size > 8 else ''}")
    return "\n".join(page + _said(_answers(answer.outputs), tokens))


def _drawn(head: str, mask: "Array", patches: "Patches") -> list[str]:
    """A site's counts, and below them its grid: a character per patch."""
    from tpcompile.report import patchview

    return [head + patchview.counts(mask, patches), *(f"  {line}" for line in patchview.lines(patchview.grid(mask, patches)))]


def _said(answers: Mapping[str, Any], tokens: Sequence[str] | None) -> list[str]:
    """The answers in words, a line each."""
    page = []
    if "classes" in answers:
        page.append("classes    " + ", ".join(f"{row['class']} ({row['logit']:.4g})" for row in answers["classes"]))
    if "token_classes" in answers:
        classes = answers["token_classes"]
        page.append(
            "by token   " + " ".join(f"{word}/{c}" for word, c in zip(tokens or range(len(classes)), classes, strict=True))
        )
    if "span" in answers:
        start, end = answers["span"]
        words = f"  {' '.join(tokens[start : end + 1])}" if tokens is not None else ""
        page.append(f"span       {start} to {end}{words}")
    return page
