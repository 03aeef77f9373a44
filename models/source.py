"""`Source`: a loaded dense model, with everything an export needs to know about where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpcompile.models import importers
from tpcompile.spec import Patches


@dataclass(frozen=True)
class Source:
    """A loaded model.

    Attributes:
        name: what the source calls the model.
        model: dense, eval, float32; takes the inputs of ``example``, returns a dict.
        family: name of its family.
        architecture: the library's class.
        example: one sample by input name, batch 1.
        dynamic: input -> dim -> name of what varies; the batch is left out.
        ranges: name of such a dim -> least and greatest size.
        values: integer input -> least and greatest value.
        weights_sha256: over the weights in use, the same for every file format.
        assets: tokenizer and config files to copy into a bundle.
        documents: name -> content of files to write into a bundle.
        patches: which part of an image each token is; None for text.
        imported: method and parameters found in an official checkpoint of a pruning method.
        note: what a reader of a report must know about the weights; empty as a rule.
    """

    name: str
    model: nn.Module
    family: str
    architecture: str
    example: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    ranges: Mapping[str, tuple[int, int]]
    values: Mapping[str, tuple[int, int]]
    weights_sha256: str
    assets: tuple[Path, ...] = ()
    documents: Mapping[str, str] = field(default_factory=dict)
    patches: Patches | None = None
    imported: tuple[str, dict[str, Any]] | None = None
    note: str = ""

    def parameters(self, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """A method's parameters: what the checkpoint holds, overridden by what the caller gives.

        Raises:
            UsageError: the checkpoint holds this method's parameters but lacks one that only the caller can know.
        """
        if self.imported is None or self.imported[0] != method:
            return dict(given)
        merged = {**self.imported[1], **given}
        importers.IMPORTERS[method].demand(merged)
        return merged
