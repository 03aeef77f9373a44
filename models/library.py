"""transformers and timm, imported late; and the models of transformers, built without a download and without a checkpoint's code."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.compat import ensure_torchvision
from tpcompile.errors import EnvironmentFault, ModelError
from tpcompile.models.families.bert import Architecture


def transformers() -> Any:
    """The transformers package.

    Raises:
        EnvironmentFault: not installed.
    """
    ensure_torchvision()
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise EnvironmentFault("the package transformers cannot be imported", fix="pip install 'tpcompile[hf]'") from error


def timm() -> Any:
    """The timm package.

    Raises:
        EnvironmentFault: not installed.
    """
    ensure_torchvision()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise EnvironmentFault("the package timm cannot be imported", fix="pip install 'tpcompile[timm]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what transformers logs below an error, and put its verbosity back."""
    logging = transformers().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def build(names: Architecture, class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """An untrained library model in eval mode; torch's random state is left as it was.

    Args:
        names: its architecture.
        class_name: class in ``names.home``.
        config: the content of config.json.

    Raises:
        ModelError: the library refuses the config.
    """
    transformers()
    with quiet(), torch.random.fork_rng(devices=[]):
        model_class = getattr(importlib.import_module(names.home), class_name)
        try:
            model: nn.Module = model_class(model_class.config_class.from_dict(dict(config)))
        except Exception as error:  # the library checks a config with many exception types of its own
            raise ModelError(
                f"config.json does not describe a {class_name}: {error}", fix="compare config.json with the model's original"
            ) from error
    return model.eval()


def fill(model: nn.Module, weights: Mapping[str, Tensor], base: str, optional: tuple[str, ...] = ()) -> None:
    """Copy weights into a library model, under the names of a bare encoder or of a model with a head.

    Args:
        model: from `build`.
        weights: by checkpoint name, finite.
        base: attribute that holds the encoder in a model with a head; a checkpoint may carry or lack it as a prefix.
        optional: prefixes of weights that may be absent.

    Raises:
        ModelError: weights of the backbone or of a needed head are missing, have no place, or have another shape.
    """
    expected = model.state_dict()
    named = {_rename(name, base, expected): weight for name, weight in weights.items()}
    missing = [name for name in expected if name not in named and not name.startswith(optional or (" ",))]
    if missing:
        raise ModelError(
            f"weights are missing for {listed(missing)}", fix="save the whole model again, with the head its config.json names"
        )
    homeless = [name for name in named if name not in expected and _is_backbone(name, base)]
    if homeless:
        raise ModelError(
            f"weights without a place in {type(model).__name__}: {listed(homeless)}",
            fix="the checkpoint is of another architecture than its config.json says",
        )
    for name, weight in named.items():
        if name in expected and expected[name].shape != weight.shape:
            raise ModelError(
                f"{name} has shape {list(weight.shape)}, config.json asks for {list(expected[name].shape)}",
                fix="config.json and the weights are of different models: save both again",
            )
    model.load_state_dict({name: weight for name, weight in named.items() if name in expected}, strict=False)


def _rename(name: str, base: str, expected: Mapping[str, Any]) -> str:
    """A checkpoint's name as the model calls it: LayerNorm's old names, and the encoder's prefix added or taken away."""
    stem, _, leaf = name.rpartition(".")
    name = f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }" if stem.endswith("LayerNorm") else name
    if name in expected:
        return name
    bare = name.removeprefix(f"{base}.")
    return next((form for form in (bare, f"{base}.{name}") if form in expected), name)


def _is_backbone(name: str, base: str) -> bool:
    """Whether an unplaced weight belongs to embeddings or layers. Other heads stay behind; position buffers are rebuilt."""
    bare = name.removeprefix(f"{base}.")
    return bare.startswith(("embeddings", "encoder.", "transformer.")) and not bare.endswith(("position_ids", "token_type_ids"))


def listed(names: list[str]) -> str:
    """The first three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
