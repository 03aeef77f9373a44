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

from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import ModelError, UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import LEARNED, Method, Step, Weights
from tpcompile.models.methods.masked import attention, demand_cls, joined, leading


class TranskimmerParameters(base.Parameters):
    """Parameters of Transkimmer.

    Attributes:
        predictors: their weights, ``<layer>.predictor.<0, 1, 2, 4>.<weight, bias>``, as a checkpoint has them behind ``skim_predictors.``.
    """

    predictors: Annotated[Weights | None, LEARNED] = None


class TranskimmerLayer(nn.Module):
    """A predictor, and one block for what it keeps.

    Attributes:
        predictor: ``[B, N, C]`` to ``[B, N, 2]``: skim, keep.
    """

    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.block = block
        self.predictor = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 2)
        )

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
    Parameters = TranskimmerParameters

    def __init__(self, parts: Parts, parameters: TranskimmerParameters) -> None:
        super().__init__(parts, parameters)
        demand_cls(self.name, parts)
        if parameters.predictors is None:
            raise UsageError(
                "transkimmer decides by trained predictors, and a dense model has none",
                fix="pass the directory of an official Transkimmer checkpoint as the model",
            )
        self.steps = nn.ModuleList(TranskimmerLayer(block, width(parameters.predictors)) for block in parts.blocks)
        own = {name: weight for name, weight in self.steps.state_dict().items() if ".predictor." in name}
        check_weights("skim_predictors.", parameters.predictors, own)
        self.steps.load_state_dict(parameters.predictors, strict=False)

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``; what each returned, in order."""
        steps: list[Step] = []
        for layer in self.steps:
            steps.append(layer(x, alive))
            x, alive = steps[-1].x, steps[-1].alive
        return tuple(steps)


def width(predictors: Weights) -> int:
    """The hidden size that predictors were trained for; 0 where the first one is missing."""
    first = predictors.get("0.predictor.0.weight")
    return 0 if first is None else first.numel()


def check_weights(prefix: str, given: Weights, expected: Weights) -> None:
    """Demand weights of the same names and shapes.

    Args:
        prefix: how a checkpoint's names begin.
        given: what it holds.
        expected: what the method needs.

    Raises:
        ModelError: a weight is missing, has no place, or has another shape.
    """
    fix = "pass the checkpoint as the official code saved it, with the config.json it was trained with"
    missing, foreign = (sorted(a.keys() - b.keys()) for a, b in ((expected, given), (given, expected)))
    for names, what in ((missing, "is missing"), (foreign, "has no place in the model")):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"weight {prefix}{names[0]} {what}{more}", fix=fix)
    for name, weight in given.items():
        if weight.shape != expected[name].shape:
            raise ModelError(
                f"weight {prefix}{name} has shape {list(weight.shape)}, the model asks for {list(expected[name].shape)}", fix=fix
            )
