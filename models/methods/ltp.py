"""LTP, Learned Token Pruning (arXiv 2107.00910, KDD 2022), in its hard form, and the other pruners of its published code.

In every layer a token's score is the attention it receives, averaged over heads and queries (the paper's importance). By ``prune_mode``:

- ``absolute_threshold``, the paper's method: a token is dropped when it scores below the layer's threshold.
- ``threshold``: below ``token_threshold`` times the highest score of its sample, the same in every layer.
- ``rising_threshold``: the same with ``final_token_threshold * l / L`` in layer ``l`` of ``L``.
- ``topk``, the cascade of SpAtten (arXiv 2012.09852): ``round(length * rate)`` highest stay, ``length`` the number of real tokens. The
  rate is 1 in the first ``max(3, ceil(0.15 L))`` layers and falls linearly to ``token_keep_rate`` in the last, but not below 0.01.
  Of images, which have no padding, that is a constant count.

In the paper's form nothing is protected: a fallen first token computes on, seen by nobody and seeing nobody, and is still what a classifier
reads. Deviations: equal scores of ``topk`` go to the token in front; ``rising_threshold`` is as the published code means it, which
cannot run.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.demands import is_padded
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.threshold import Score, ThresholdLayer, ThresholdMethod, Thresholds, check_length

Mode = Literal["absolute_threshold", "topk", "threshold", "rising_threshold"]

NEEDS: dict[Mode, str] = {
    "absolute_threshold": "thresholds",
    "topk": "token_keep_rate",
    "threshold": "token_threshold",
    "rising_threshold": "final_token_threshold",
}
"""Mode -> the parameter it takes its numbers from."""

WHOLE, SHARE, LEAST = 3, 0.15, 0.01
"""Of ``topk``: layers that keep all, at least so many and at least this share of them; the least rate."""


class LtpParameters(base.Parameters):
    """Parameters of LTP.

    Attributes:
        thresholds: for ``absolute_threshold``: one per layer, 0 or more; 0 switches the layer's decision off.
        n_ref: number of queries the score is averaged over. ``length``: the sample's own number of real tokens, so padding does
            not matter. ``padded``: the padded length of the run, the official form. A number: the padded length used in training.
        protect: ``none``: the paper's form. ``prefix``: the leading tokens that are no words or patches (CLS, distillation,
            registers) never fall.
        prune_mode: what decides; see the module docstring.
        token_keep_rate: for ``topk``: the last layer's rate.
        token_threshold: for ``threshold``: a share of the highest score.
        final_token_threshold: for ``rising_threshold``: the share that the layer behind the last would have.
    """

    thresholds: Thresholds | None = None
    n_ref: Annotated[int, Field(ge=1)] | Literal["length", "padded"] = "length"
    protect: Literal["none", "prefix"] = "none"
    prune_mode: Mode = "absolute_threshold"
    token_keep_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    token_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    final_token_threshold: Annotated[float, Field(ge=0, le=1)] | None = None


class RelativeLayer(ThresholdLayer):
    """A decision relative to the sample's highest score."""

    least = 0.0

    def wanted(self, score: Tensor, alive: Tensor, entry: Tensor) -> Tensor:
        """True at the layer's share of the highest score or above; see `ThresholdLayer`."""
        highest = torch.where(alive, score, float("-inf")).amax(dim=1, keepdim=True)
        return score / highest >= self.threshold


class TopkLayer(ThresholdLayer):
    """A decision by rank; the threshold is the rate that stays, and a rate of 1 switches the decision off."""

    least = 0.0

    def __init__(self, block: Block, rate: float, protected: int) -> None:
        super().__init__(block, rate, protected)
        self.active = rate != 1

    def wanted(self, score: Tensor, alive: Tensor, entry: Tensor) -> Tensor:
        """True for the layer's share of the sample's tokens; see `ThresholdLayer`."""
        best: Tensor = ops.rank(torch.where(alive, score, float("-inf"))) < self.count(entry)
        return best

    def count(self, entry: Tensor) -> Tensor | int:
        """How many stay of the tokens ``entry: bool [B, N]``: float ``[B, 1]``, or one number for all samples."""
        return (entry.to(self.threshold.dtype).sum(dim=1, keepdim=True) * self.threshold).round()


class FixedTopkLayer(TopkLayer):
    """The same of images, which have no padding: the count is a number, and the compiled graph static."""

    def __init__(self, block: Block, rate: float, protected: int) -> None:
        super().__init__(block, rate, protected)
        self.rate = float(self.threshold)

    def count(self, entry: Tensor) -> int:
        """How many stay of the tokens ``entry: bool [B, N]``."""
        return round(entry.shape[1] * self.rate)


LAYERS: dict[Mode, type[ThresholdLayer]] = {
    "absolute_threshold": ThresholdLayer,
    "topk": TopkLayer,
    "threshold": RelativeLayer,
    "rising_threshold": RelativeLayer,
}
"""Mode -> its block."""


class Ltp(ThresholdMethod):
    """LTP over all blocks of a model."""

    name: ClassVar[str] = "ltp"
    Parameters = LtpParameters
    dials = (
        Dial("thresholds", most=1.0),
        Dial("token_threshold", most=1.0),
        Dial("final_token_threshold", most=1.0),
        Dial("token_keep_rate", "from one", least=0.01),
    )

    def __init__(self, parts: Parts, parameters: LtpParameters) -> None:
        protected = parts.prefix if parameters.protect == "prefix" else 0
        fixed = parameters.prune_mode == "topk" and not is_padded(parts)
        layer = FixedTopkLayer if fixed else LAYERS[parameters.prune_mode]
        super().__init__(parts, parameters, numbers(parameters, len(parts.blocks)), protected, layer)
        self.n_ref = parameters.n_ref

    def score(self, x: Tensor, alive: Tensor) -> Score:
        """The attention a token receives: mean over heads and counted queries."""
        n_ref = self.counted(x, alive)
        return lambda attention: attention.sum(dim=(1, 2)) / (n_ref * attention.shape[1])

    def counted(self, x: Tensor, alive: Tensor) -> Tensor | int:
        """Number of queries the score is averaged over: a number, or float ``[B, 1]``."""
        if self.n_ref == "length":
            return alive.to(x.dtype).sum(dim=1, keepdim=True).clamp(min=1.0)
        return x.shape[1] if self.n_ref == "padded" else self.n_ref


def numbers(parameters: LtpParameters, layers: int) -> list[float]:
    """Each layer's threshold or rate.

    Raises:
        UsageError: the mode's own parameter is missing, another mode's is given, or there are too few or too many thresholds.
    """
    needed = NEEDS[parameters.prune_mode]
    if getattr(parameters, needed) is None:
        raise UsageError(
            f"method ltp: parameter {needed!r} is required with prune_mode {parameters.prune_mode}",
            fix=f"add --param {needed}=..., or choose another prune_mode: {', '.join(NEEDS)}",
        )
    idle = [name for name in NEEDS.values() if name != needed and getattr(parameters, name) is not None]
    if idle:
        raise UsageError(
            f"method ltp: prune_mode {parameters.prune_mode} does not read {', '.join(idle)}",
            fix=f"leave it out: it reads {needed}",
        )
    if parameters.thresholds is not None:
        check_length(parameters.thresholds, layers)
        return parameters.thresholds
    if parameters.token_keep_rate is not None:
        return rates(parameters.token_keep_rate, layers)
    if parameters.token_threshold is not None:
        return [parameters.token_threshold] * layers
    final = parameters.final_token_threshold or 0.0
    return [final * layer / layers for layer in range(layers)]


def rates(last: float, layers: int) -> list[float]:
    """The share of the tokens that leaves each layer of ``topk``."""
    whole = max(WHOLE, math.ceil(SHARE * layers))
    falling = max(layers - whole, 1)
    return [1.0 if layer < whole else max(LEAST, 1 + (last - 1) * (layer - whole + 1) / falling) for layer in range(layers)]
