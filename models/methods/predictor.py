"""The predictor of DynamicViT (arXiv 2106.02034), which dTPS uses too: what scores a token by itself and by the mean of all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.errors import UsageError
from tpcompile.models.families import Parts

ATTRIBUTE = "score_predictor"
"""Where a model of timm carries the predictors, an ``nn.ModuleList``, as the official models do."""


class Predictor(nn.Module):
    """Scores tokens, half of it from the token and half from the mean of all; equations 1 to 5 of the paper.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(), nn.Linear(width // 4, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, N, C]``, the tokens alive, to the log-probability that each is kept: ``[B, N]``."""
        own, shared = self.in_conv(x).chunk(2, dim=-1)
        mean = shared.mean(dim=1, keepdim=True).expand_as(shared)
        scores: Tensor = self.out_conv(torch.cat([own, mean], dim=-1)).log_softmax(dim=-1)
        return scores.select(-1, 0)


def parts_of(weights: Mapping[str, Tensor], width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of all predictors of a model, as many as ``weights`` tells of."""
    stages = {name.split(".")[1] for name in weights}  # a number that is out of the row, or no number, has no place among them
    predictors = nn.ModuleList(Predictor(width) for _ in range(max(1, sum(map(str.isdigit, stages)))))
    return {f"{ATTRIBUTE}.{name}": tuple(weight.shape) for name, weight in predictors.state_dict().items()}


def attach(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model its trained predictors.

    Args:
        model: of timm.
        weights: ``score_predictor.<p>.in_conv.<i>.weight``, ..., complete.
    """
    own = {name.removeprefix(f"{ATTRIBUTE}."): weight for name, weight in weights.items() if name.startswith(f"{ATTRIBUTE}.")}
    stages = sorted({int(name.split(".")[0]) for name in own})
    predictors = nn.ModuleList(Predictor(own[f"{stage}.in_conv.0.weight"].numel()) for stage in stages)
    predictors.load_state_dict(own)
    model.add_module(ATTRIBUTE, predictors.eval())


def attached(method: str, parts: Parts, stages: int) -> list[Any]:
    """A model's predictors.

    Raises:
        UsageError: it has none, or another number of them than there are locations.
    """
    predictors = getattr(getattr(parts, "model", None), ATTRIBUTE, None)
    if predictors is None:
        raise UsageError(
            f"{method} needs its trained predictors, and this {parts.architecture} carries no {ATTRIBUTE}",
            fix="load an official checkpoint, or attach predictors with tpcompile.models.methods.predictor.attach",
        )
    if len(predictors) != stages:
        raise UsageError(
            f"prune_loc names {stages} blocks, the checkpoint has {len(predictors)} predictors",
            fix=f"give {len(predictors)} blocks",
        )
    return list(predictors)
