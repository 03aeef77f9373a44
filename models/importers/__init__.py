"""Official checkpoints of pruning methods to a dense model and our parameters. A module per method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tpcompile.models.importers import as_vit, dynamicvit, evit, ltmp, ltp, top, transkimmer


class Importer(Protocol):
    """What a module of this package offers."""

    NAME: str

    def recognises(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
        """Whether a checkpoint is of this kind."""

    def read(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """The dense model and the method's parameters."""

    def demand(self, parameters: Mapping[str, Any]) -> None:
        """Raise UsageError for a parameter only the caller can know."""


IMPORTERS: dict[str, Importer] = {module.NAME: module for module in (ltp, top, transkimmer, as_vit, evit, dynamicvit, ltmp)}
"""Method -> importer."""


def beside(folder: Path) -> dict[str, Tensor]:
    """What official checkpoints keep in further files of their directory, by names of their own among the weights.

    Raises:
        ModelError: a file that is not read, or is corrupt.
    """
    return top.beside(folder)


def recognise(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Importer | None:
    """The importer for a checkpoint; None for an ordinary one."""
    return next((importer for importer in IMPORTERS.values() if importer.recognises(config, weights)), None)
