"""``tpcompile run``: one input through an engine, with the tokens it kept."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings
from tpcompile.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from tpcompile.engine import Kept

    Array = np.ndarray[Any, Any]

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(cls=Verb)
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--text", help="A text, tokenised with the bundle's own tokenizer.")
@click.option("--input", "arrays", multiple=True, metavar="NAME=FILE.npy", help="An input as numpy array; may be repeated.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0: all.")
@click.option("--save-outputs", "save", metavar="F.npz", type=FILE, help="Write the outputs as numpy archive.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.pass_obj
def run(settings: Settings, /, bundle: Path, text: str | None, arrays: tuple[str, ...], **options: Any) -> None:
    """Run one input and show outputs and kept tokens."""
    if (text is None) == (not arrays):
        raise UsageError("give either --text or --input", fix="tpcompile run DIR --text 'some words'")
    save: Path | None = options["save"]
    if save is not None and save.exists() and not options["force"]:
        raise UsageError(f"{save} exists", fix="choose another name, or pass --force")
    with settings.work():
        from tpcompile.engine import load

        with load(bundle, threads=options["threads"]) as engine:
            names = [spec.name for spec in engine.inputs]
            inputs, tokens = _encoded(bundle, text, names) if text is not None else (_arrays(arrays), None)
            outputs, kept = engine.kept(**inputs)
    if save is not None:
        _save(save, outputs)
    settings.emit(_document(bundle, outputs, kept, tokens), _page(outputs, kept, tokens))


def _encoded(bundle: Path, text: str, names: Sequence[str]) -> tuple[dict[str, "Array"], list[str]]:
    """The engine's inputs, int64 ``[1, n]``, and the tokens, for one text."""
    import numpy as np

    from tpcompile.data import open_tokenizer

    if not text.strip():
        raise InputError("the text is empty", fix="tpcompile run DIR --text 'some words'")
    encoding = open_tokenizer(bundle).encode(text)
    made = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
    unknown = [name for name in names if name not in made]
    if unknown:
        raise UsageError(f"a text gives no input '{unknown[0]}'", fix=f"pass {' '.join(f'--input {n}=F.npy' for n in names)}")
    return {name: np.array([made[name]], dtype=np.int64) for name in names}, list(encoding.tokens)


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


def _save(path: Path, outputs: Mapping[str, "Array"]) -> None:
    """Write beside, then rename: a full disk leaves nothing half-written."""
    import numpy as np

    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder", fix="make it first, or save elsewhere")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **outputs)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sites(kept: "Kept", tokens: list[str] | None) -> list[dict[str, Any]]:
    """Per site: how many tokens live and are stored, and where."""
    rows = []
    for number, (mask, stored) in enumerate(zip(kept.masks, kept.stored, strict=True)):
        positions = [int(place) for place in mask.nonzero()[0]]
        words = {} if tokens is None else {"tokens": [tokens[place] for place in positions]}
        counts = {"of": len(mask), "kept": len(positions), "stored": int(stored)}
        rows.append({"site": number, **counts, "positions": positions, **words})
    return rows


def _document(bundle: Path, outputs: Mapping[str, "Array"], kept: "Kept", tokens: list[str] | None) -> dict[str, Any]:
    values = {name: {"dtype": str(v.dtype), "shape": list(v.shape), "values": v.tolist()} for name, v in outputs.items()}
    return {"bundle": str(bundle), "tokens": tokens, "sites": _sites(kept, tokens), "outputs": values}


def _page(outputs: Mapping[str, "Array"], kept: "Kept", tokens: list[str] | None) -> str:
    lines = [] if tokens is None else [f"tokens {len(tokens):>4}         {' '.join(tokens)}"]
    for row in _sites(kept, tokens):
        words = " ".join(map(str, row.get("tokens", row["positions"])))
        lines += [f"site {row['site']:<2}{row['kept']:>4} of {row['of']:<4} {words}"]
    for name, value in outputs.items():
        head = " ".join(f"{number:.6g}" for number in value.reshape(-1)[:8])
        lines.append(f"{name} {value.dtype}{list(value.shape)}  {head}{' ...' if value.size > 8 else ''}")
    return "\n".join(lines)
