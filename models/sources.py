"""`load`: a model directory, a timm name or the shipped model to a dense model."""

from dataclasses import replace
from pathlib import Path

from tpcompile.errors import UsageError
from tpcompile.models import text, vision
from tpcompile.models.source import Source

DIGITS = "tpcompile/digits-vit"
"""The shipped model: a small vision transformer for handwritten digits."""

DIGITS_FOLDER = Path(__file__).parent / "digits"
"""Its directory."""


def load(source: str | Path, *, pooling: str = "auto", checkpoint: Path | None = None) -> Source:
    """Load a model. Nothing is downloaded and no code from a directory is run.

    Args:
        source: a Hugging Face or sentence-transformers directory, an official checkpoint of a pruning method, a directory in timm's
            hub layout, ``timm/NAME`` for a model of timm by name, or ``tpcompile/digits-vit``, the shipped model.
        pooling: for text. ``auto``: what the directory says; for a bare encoder its pooler where it has one, else the mean. ``mean``
            or ``cls``: pool a bare encoder so. ``tokens`` (or ``none``): a vector per token.
        checkpoint: file with the weights of ``timm/NAME``; without one they are random. Or a file of LTMP's thresholds alone, for any
            vision model.

    Raises:
        UsageError: no such directory or timm model, or an option that does not fit.
        ModelError: missing, corrupt or foreign files; NaN or infinite weights; an architecture no family knows.
    """
    name = source.as_posix() if isinstance(source, Path) else source
    named = name.startswith(vision.PREFIX) and not Path(source).is_dir()
    alone = vision.thresholds(checkpoint) if checkpoint is not None else {}
    if alone:
        return replace(load(source, pooling=pooling), imported=alone.popitem())
    if checkpoint is not None and not named:
        raise UsageError(f"{source} has weights of its own: a checkpoint has no place", fix="leave it out, or load timm/NAME")
    folder = DIGITS_FOLDER if name == DIGITS else None if named else _folder(source)
    if folder is not None and not vision.is_timm(folder):
        return text.load(folder, pooling)
    if pooling != "auto":
        raise UsageError(f"pooling {pooling!r} is for text encoders, {source} is a vision model", fix="leave pooling at auto")
    if folder is None:
        return vision.from_name(name, checkpoint)
    return vision.from_folder(folder, DIGITS if name == DIGITS else folder.resolve().name)


def _folder(source: str | Path) -> Path:
    """The directory, or a refusal that says what to do instead."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{source} is a file", fix=f"pass the directory it lies in: {folder.parent}")
    if isinstance(source, str) and source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        raise UsageError(
            f"no directory {source!r}; if it is a model id, tpcompile does not download",
            fix=f"run: hf download {source} --local-dir DIR, then pass DIR",
        )
    raise UsageError(
        f"no directory {source}", fix="pass the directory that save_pretrained wrote (config.json, model.safetensors)"
    )


__all__ = ["DIGITS", "DIGITS_FOLDER", "Source", "load"]
