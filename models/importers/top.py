"""Official ToP checkpoints (github.com/microsoft/Moonlit, ToP): a plain BERT, and its gates in ``zs.pt`` beside it.

``l0_module.pt`` holds the same gates inside a pickled object of the training code: it is never read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import ModelError
from tpcompile.models.checkpoint import read_pickled
from tpcompile.models.families.bert import ARCHITECTURES
from tpcompile.models.library import build, fill, listed

NAME = "top"
GATES, PICKLE = "zs.pt", "l0_module.pt"
PREFIX = "zs."
"""How the gates are called among a checkpoint's weights."""

NEEDED = (f"{PREFIX}token_z", f"{PREFIX}pruner_z")


def beside(folder: Path) -> dict[str, Tensor]:
    """The gates in a directory, by name; empty where it is no checkpoint of ToP.

    Raises:
        ModelError: only the pickled object is there, or ``zs.pt`` holds more than tensors.
    """
    if (folder / GATES).is_file():
        return {f"{PREFIX}{name}": gate for name, gate in read_pickled(folder / GATES).items()}
    if (folder / PICKLE).is_file():
        raise ModelError(
            f"{folder} has its gates in {PICKLE} only, a pickled object, which tpcompile does not read",
            fix=f"save them beside it with the official code: torch.save({{'token_z': ..., 'pruner_z': ...}}, '{GATES}')",
        )
    return {}


def recognises(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether there are gates beside the weights."""
    return any(name.startswith(PREFIX) for name in weights)


def read(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        weights: the official state dict, and the gates as `beside` names them.
        config: the content of its config.json, a plain BERT's.

    Returns:
        The dense ``BertForSequenceClassification``, and ``token_z`` and ``pruner_z``, 1 where open. Which layers prune is not recorded:
        by the official script's rule the last ones, as many as there are gates; ``token_prune_loc`` says otherwise.

    Raises:
        ModelError: gates that are missing, unknown or misshapen; weights of another model.
    """
    gates = {name: gate for name, gate in weights.items() if name.startswith(PREFIX)}
    rest = {n: w for n, w in weights.items() if n not in gates and "layer_transformation." not in n}
    names = next(row for row in ARCHITECTURES if row.name == "bert")
    model = build(names, names.classifier, config)
    fill(model, rest, names.base)
    return model, parameters(gates)


def parameters(gates: Mapping[str, Tensor]) -> dict[str, Any]:
    """The method's parameters in its gates.

    Raises:
        ModelError: gates are missing, unknown or misshapen.
    """
    missing, foreign = [name for name in NEEDED if name not in gates], sorted(gates.keys() - set(NEEDED))
    if missing or foreign:
        raise ModelError(
            f"{GATES} {'lacks' if missing else 'holds'} {listed([name.removeprefix(PREFIX) for name in missing or foreign])}",
            fix="pass zs.pt as the official code saved it: token_z [locations, bins] and pruner_z [locations]",
        )
    rows, switches = (gates[name] for name in NEEDED)
    if rows.dim() != 2 or not rows.numel() or switches.shape != rows.shape[:1]:
        raise ModelError(
            f"{GATES}: token_z has shape {list(rows.shape)}, pruner_z {list(switches.shape)}",
            fix="pass zs.pt as the official code saved it: token_z [locations, bins] and pruner_z [locations]",
        )
    return {"token_z": (rows > 0).float().tolist(), "pruner_z": (switches > 0).float().tolist()}


def demand(parameters: Mapping[str, Any]) -> None:
    """A checkpoint records all that the method needs."""
