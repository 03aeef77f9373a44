"""Transkimmer (arXiv 2205.07324, ACL 2022), deterministic and renormalised: a small network before each layer lets tokens skip the rest.

At the entry of every layer, the first included, a predictor reads each token's hidden state: LayerNorm, linear, LayerNorm, GELU, linear
to two numbers. A token stays when the second is the larger; what is skimmed stays skimmed. CLS is never predicted and always stays. A
skimmed token returns at the end with its hidden state at the layer that it skipped first (``fill=last``).

Deviations:

- the published code draws Gumbel noise in evaluation as well; here the larger number decides, a tie skims.
- the published code multiplies skimmed keys out *behind* the softmax, so that their logits still count in its denominator: no gathered form
  can equal that. Here they are masked before it (the ``renorm`` numbers of the oracles), which is what the paper's savings assume. Validate
  the accuracy again.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_cls
from tpcompile.models.methods.masked import attention, joined, leading

ATTRIBUTE = "skim_predictors"
"""Where a model carries the predictors, an ``nn.ModuleList`` in its encoder, as the official models do."""


class Predictor(nn.Module):
    """Two numbers per token, skim and keep: ``[B, N, C]`` to ``[B, N, 2]``.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.predictor = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, C]``."""
        said: Tensor = self.predictor(x)
        return said


def attach(encoder: nn.Module, layers: int, width: int) -> None:
    """Give an encoder untrained predictors, in eval mode, for weights to be copied into.

    Args:
        encoder: the module that holds the layers.
        layers: how many there are.
        width: C.
    """
    encoder.add_module(ATTRIBUTE, nn.ModuleList(Predictor(width) for _ in range(layers)).eval())


class TranskimmerLayer(nn.Module):
    """A predictor, and one block for what it keeps."""

    def __init__(self, block: Block, predictor: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.predictor = predictor

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """Run the block on ``x: [B, N, C]``, ``alive: bool [B, N]``."""
        said = self.predictor(x)
        score = said[..., 1] - said[..., 0]
        keep = torch.logical_and(alive, torch.logical_or(said[..., 1] > said[..., 0], leading(x, 1)))
        y = ops.prune(x, keep, score)
        weights, value = attention(self.block, y, keep)
        y = self.block.attention_output(joined(weights @ value, y), y)
        return Step(self.block.feed_forward(y), keep, score, x)


class Transkimmer(Method):
    """Transkimmer over all blocks of a model with a CLS token."""

    name: ClassVar[str] = "transkimmer"
    Parameters = base.Parameters
    decided = "its predictors are learned, and come with a checkpoint"

    def __init__(self, parts: Parts, parameters: base.Parameters) -> None:
        super().__init__(parts, parameters)
        check_cls(self.name, parts)
        found = [module for name, module in parts.dense.named_modules() if name.rpartition(".")[2] == ATTRIBUTE]
        if not found or len(list(found[0].children())) != len(parts.blocks):
            raise UsageError(
                f"transkimmer decides by a trained predictor per layer, and this {parts.architecture} carries no {ATTRIBUTE} for its "
                f"{len(parts.blocks)} layers",
                fix="pass the directory of an official Transkimmer checkpoint as the model",
            )
        self.steps = nn.ModuleList(map(TranskimmerLayer, parts.blocks, found[0].children()))
