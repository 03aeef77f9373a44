"""The layout of a sentence-transformers directory: modules.json, a pooling config, perhaps a normalisation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcompile.errors import ModelError
from tpcompile.models.checkpoint import read_json
from tpcompile.models.families import Pooling

_LEGACY = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a sentence encoder's transformer lies and how its tokens are pooled.

    Attributes:
        folder: directory of config.json and weights.
        pooling: ``mean`` or ``cls``; empty where no module says so.
        normalize: L2-normalise the pooled vector.
        max_length: ``max_seq_length`` of the directory; None where it sets none.
    """

    folder: Path
    pooling: str = ""
    normalize: bool = False
    max_length: int | None = None


def read_layout(folder: Path) -> Layout:
    """Read a directory's layout; a plain Hugging Face directory is its own transformer without pooling.

    Raises:
        ModelError: corrupt files, or a module or pooling tpcompile does not know.
    """
    if not (folder / "modules.json").is_file():
        return Layout(folder)
    transformer, pooling, normalize = folder, "", False
    for kind, path in _modules(folder):
        if kind == "Transformer":
            transformer = path
        elif kind == "Pooling":
            pooling = _pooling(path / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise ModelError(f"modules.json names a {kind} module", fix="tpcompile knows Transformer, Pooling and Normalize")
    return Layout(transformer, pooling, normalize, _max_length(transformer))


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Kind and directory of each module, in order."""
    try:
        entries = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'modules.json'} is corrupt: {error!r}", fix="download or save the model again") from error
    for _, path in modules:
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise ModelError(f"modules.json names a module outside the directory: {path!r}", fix="download the model again")
    return [(kind, folder / path) for kind, path in modules]


def _pooling(path: Path) -> str:
    """``mean`` or ``cls`` from a pooling config, in its present or its older form."""
    config: dict[str, Any] = read_json(path)
    modes = [mode for key, mode in _LEGACY.items() if config.get(key)]
    modes += [key for key, on in config.items() if key.startswith("pooling_mode_") and on and key not in _LEGACY]
    if "pooling_mode" in config:
        stated = config["pooling_mode"]
        modes = [str(mode) for mode in stated] if isinstance(stated, list) else [str(stated)]
    if len(modes) != 1 or modes[0] not in Pooling.MODES:
        raise ModelError(
            f"{path} asks for pooling {' + '.join(modes) or 'of no kind'}",
            fix=f"tpcompile knows {', '.join(Pooling.MODES)}, one at a time",
        )
    return modes[0]


def _max_length(transformer: Path) -> int | None:
    """``max_seq_length`` of the directory."""
    path = transformer / "sentence_bert_config.json"
    length = read_json(path).get("max_seq_length") if path.is_file() else None
    return length if isinstance(length, int) and length > 0 else None
