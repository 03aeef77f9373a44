"""SViT, keep and update (arXiv 2306.07050, WACV 2024): tokens that are not selected bypass a block and stay in the feature map.

In front of chosen blocks a small predictor, a norm and a two-layer MLP, says of every token whether it is updated: it is where the first of
two channels is larger. Selected tokens go through the whole block, attention among themselves alone; the others keep their state, and a
later block may select them again. The map stays whole, so dense heads (detection, segmentation) read it as that of the dense model.

Which tokens are selected, and how many, depends on the sample. Each block gathers its tokens and writes their new states back: the method
gathers by itself (``ops.compact``, ``ops.put``); its sites all begin from the whole map. Class and register tokens are always selected.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_locations
from tpcompile.models.methods.gathered import Blocks, Plain, attend, hidden
from tpcompile.models.methods.masked import leading

ATTRIBUTE = "selectors"
"""Where a model carries its trained selectors, an ``nn.ModuleList``."""


class SvitParameters(base.Parameters):
    """Parameters of SViT.

    Attributes:
        blocks: numbers of the blocks that select.
    """

    blocks: Blocks


class Selector(nn.Module):
    """Says of every token whether it is updated.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, C]`` to how much larger the first channel is: ``[B, N]``, above 0 where the token is updated."""
        channels: Tensor = self.mlp(self.norm(x))
        return channels.select(-1, 0) - channels.select(-1, 1)


class Svit(Method):
    """SViT over the blocks of a model."""

    name: ClassVar[str] = "svit"
    Parameters = SvitParameters
    decided = "its selectors are learned, and come with a checkpoint"

    def __init__(self, parts: Parts, parameters: SvitParameters) -> None:
        super().__init__(parts, parameters)
        if "pixel_values" not in parts.inputs:
            raise UsageError(
                f"svit is a method for images, and {parts.architecture} takes {parts.inputs[0]}",
                fix="use ltp, tome or zero_tprune",
            )
        check_locations("blocks", parameters.blocks, len(parts.blocks))
        selectors = iter(_attached(parts, len(parameters.blocks)))
        self.steps = nn.ModuleList(
            Updating(block, parts.prefix, next(selectors)) if number in parameters.blocks else Plain(block)
            for number, block in enumerate(parts.blocks)
        )


class Updating(nn.Module):
    """A block that updates the selected tokens."""

    def __init__(self, block: Block, prefix: int, selector: nn.Module) -> None:
        super().__init__()
        self.block, self.prefix, self.selector = block, prefix, selector

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """``x: [B, N, C]``, ``alive: bool [B, N]``, all True: every token stays."""
        score = self.selector(x)
        first = leading(x, max(self.prefix, 1)).expand_as(alive)
        rows, living, index = ops.compact(x, torch.logical_or(score > 0, first), first, score)
        rows = ops.gathered(rows, x, index, torch.logical_or(score > 0, first), score)
        y, _, _ = attend(self.block, rows, hidden(living))
        return Step(ops.put(x, self.block.feed_forward(y), index, living), alive)


def attach(model: nn.Module, selectors: nn.ModuleList) -> None:
    """Give a model of timm its trained selectors, one for each block that selects."""
    model.add_module(ATTRIBUTE, selectors.eval())


def _attached(parts: Parts, count: int) -> list[Any]:
    selectors = getattr(getattr(parts, "model", None), ATTRIBUTE, None)
    found = 0 if selectors is None else len(selectors)
    if found != count:
        raise UsageError(
            f"svit needs a trained selector for each of {count} blocks, and this {parts.architecture} carries {found or 'none'}",
            fix="attach them with tpcompile.models.methods.svit.attach",
        )
    return list(selectors)  # type: ignore[arg-type]  # found is not 0
