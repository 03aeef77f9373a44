"""TPS, joint token pruning and squeezing (arXiv 2304.10716, CVPR 2023), equations 4 to 6: dTPS and eTPS.

Tokens are chosen as another method chooses them. *dTPS*: in front of a block, by DynamicViT's predictor, ``int(keep_ratio * N)`` of the
image's N patches. *eTPS*: behind a block's attention, by the CLS token's attention as in EViT. Then each token that is not kept is
squeezed into its *host*, the kept token with the most similar features: ``x_j <- (e x_j + sum_i exp(c_ij / T) y_i) / (e + sum_i exp(c_ij
/ T))``, with the cosine c.

Deviations: dTPS none at batch 1 or more (N is the model's number of patches, where the official code has 196). eTPS has no official code
that runs: its place and score are EViT's, its count is dTPS's, so that one ``keep_ratio`` means the same for both.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods.base import Step
from tpcompile.models.methods.demands import check_images, check_locations
from tpcompile.models.methods.dynamicvit import DynamicVitParameters, OfPatches, count, ratios
from tpcompile.models.methods.gathered import Plain, attend, attention_of_cls, behind, fetch, ranked, scored
from tpcompile.models.methods.predictor import Predictor, attached

EPS = 1e-6
"""Added to the norms of features, as in the official code."""


class TpsParameters(DynamicVitParameters):
    """Parameters of TPS: those of DynamicViT, and two more.

    Attributes:
        variant: ``dtps`` or ``etps``.
        temperature: T; it divides the cosines of squeezed tokens, not the kept token's own 1.
    """

    variant: Literal["dtps", "etps"] = "dtps"
    temperature: Annotated[float, Field(gt=0)] = 1.0


class Tps(OfPatches):
    """TPS over all blocks of a model."""

    name: ClassVar[str] = "tps"
    Parameters = TpsParameters
    decided = "its predictors are trained for one keep_ratio"

    def __init__(self, parts: Parts, parameters: TpsParameters) -> None:
        super().__init__(parts, parameters)
        check_images(self.name, parts, cls=parameters.variant == "etps")
        check_locations("prune_loc", parameters.prune_loc, len(parts.blocks))
        stages = len(parameters.prune_loc)
        predictors = attached("dtps", parts, stages) if parameters.variant == "dtps" else [None] * stages
        chosen = dict(zip(parameters.prune_loc, zip(predictors, ratios(parameters), strict=True), strict=True))
        self.prefix = parts.prefix
        self.steps = nn.ModuleList(
            TpsBlock(block, parts.prefix, *chosen[number], parameters.temperature) if number in chosen else Plain(block)
            for number, block in enumerate(parts.blocks)
        )


class TpsBlock(nn.Module):
    """A block that keeps some tokens and squeezes the others into them; without a predictor it is eTPS's."""

    def __init__(self, block: Block, prefix: int, predictor: Predictor | None, ratio: float, temperature: float) -> None:
        super().__init__()
        self.block, self.prefix, self.predictor, self.ratio, self.temperature = block, prefix, predictor, ratio, temperature

    def forward(self, x: Tensor, patches: int) -> Step:
        """``x: [B, N, C]`` and the image's number of patches to ``[B, K, C]``."""
        kept = count(patches, self.ratio)
        if self.predictor is not None:
            x, _, _ = attend(self.block, self.squeeze(x, self.predictor(x[:, self.prefix :]), kept))
        else:
            x, attention, _ = attend(self.block, x)
            x = self.squeeze(x, attention_of_cls(attention, self.prefix), kept)
        return Step(self.block.feed_forward(x), torch.ones_like(x.select(2, 0), dtype=torch.bool))

    def squeeze(self, x: Tensor, score: Tensor, kept: int) -> Tensor:
        """``x: [B, N, C]`` by ``score: [B, N - prefix]`` to ``[B, prefix + kept, C]``."""
        order = behind(self.prefix, ranked(score))
        index, lost = order[:, : self.prefix + kept], order[:, self.prefix + kept :]
        hosts, guests = fetch(x, index[:, self.prefix :]), fetch(x, lost)
        cosine = _unit(guests) @ _unit(hosts).transpose(-1, -2)
        best = cosine.amax(dim=-1, keepdim=True)
        weight = torch.where(cosine == best, (cosine / self.temperature).exp(), 0.0)
        squeezed = (math.e * hosts + weight.transpose(-1, -2) @ guests) / (math.e + weight.sum(dim=1).unsqueeze(-1))
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        into = own.scatter(1, lost, index[:, self.prefix :].gather(1, cosine.argmax(dim=-1)))
        rows = torch.cat([x[:, : self.prefix], squeezed], dim=1)
        marked: Tensor = ops.gathered(rows, x, index, score=scored(self.prefix, score), into=into)
        return marked


def _unit(x: Tensor) -> Tensor:
    """Features ``[B, N, C]`` over their norms."""
    unit: Tensor = x / (x.norm(dim=-1, keepdim=True) + EPS)
    return unit
