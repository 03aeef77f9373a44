"""PoWER-BERT (ICML 2020, arXiv 2001.08950): a fixed number of word vectors leaves every layer.

In layer ``l`` a token's significance is the attention it receives, ``sig[w] = sum_q mean_h A[h, q, w] - mean_h A[h, w, w]``: its column
without the diagonal (the paper sums over heads; the mean ranks the same). Behind the attention's LayerNorm and before
the feed-forward, CLS and the ``retention[l] - 1`` most significant other tokens stay, in their own order.

Deviations:

- padding does not vote, and stands behind every real token: the padding of a batch changes nothing. The published code lets pads vote,
  and relies on their being ranked last.
- equal significances: the token in front stays.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_cls
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.masked import attention, joined, leading


class PowerBertParameters(base.Parameters):
    """Parameters of PoWER-BERT.

    Attributes:
        retention: the retention configuration: tokens that leave each layer, CLS among them; one per layer, never rising.
    """

    retention: list[Annotated[int, Field(ge=1)]]


class PowerBertLayer(nn.Module):
    """One block, with an extract layer in its middle.

    Attributes:
        count: tokens that leave it; None where as many come in.
    """

    def __init__(self, block: Block, count: int | None) -> None:
        super().__init__()
        self.block = block
        self.count = count

    def forward(self, x: Tensor, alive: Tensor) -> Step:
        """Run the block on ``x: [B, N, C]``, ``alive: bool [B, N]``."""
        weights, value = attention(self.block, x, alive)
        x = self.block.attention_output(joined(weights @ value, x), x)
        if self.count is None:
            return Step(self.block.feed_forward(x), alive)
        score = significance(weights)
        first = leading(x, 1)
        others = torch.logical_and(alive, torch.logical_not(first))
        rank = ops.rank(torch.where(alive, torch.where(first, -1.0, score), float("-inf")))
        keep = torch.logical_or(torch.logical_and(others, rank < self.count - 1), torch.logical_and(alive, first))
        return Step(self.block.feed_forward(ops.prune(x, keep, score)), keep, score, x)


def significance(weights: Tensor) -> Tensor:
    """Attention ``[B, H, N, N]``, rows of dead queries 0, to significances ``[B, N]``."""
    mean = weights.mean(dim=1)
    places = torch.arange(mean.shape[1], device=mean.device)
    return torch.where(places[:, None] == places[None, :], 0.0, mean).sum(dim=1)


class PowerBert(Method):
    """PoWER-BERT over all blocks of a model with a CLS token."""

    name: ClassVar[str] = "power_bert"
    Parameters = PowerBertParameters
    dials = (Dial("retention", "over", least=1),)

    def __init__(self, parts: Parts, parameters: PowerBertParameters) -> None:
        super().__init__(parts, parameters)
        check_cls(self.name, parts)
        counts, layers = parameters.retention, len(parts.blocks)
        if len(counts) != layers or sorted(counts, reverse=True) != counts:
            raise UsageError(
                f"retention is {counts}, the model has {layers} layers",
                fix=f"pass {layers} counts of tokens, none above the one before",
            )
        before = [None, *counts]
        self.steps = nn.ModuleList(
            PowerBertLayer(block, None if count == last else count)
            for block, count, last in zip(parts.blocks, counts, before, strict=False)
        )
