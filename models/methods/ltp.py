"""LTP, Learned Token Pruning (arXiv 2107.00910, KDD 2022), in its hard form with absolute thresholds.

In every layer a token is dropped when the attention it receives, averaged over heads and queries, lies below the layer's
threshold. The decision falls inside the attention, which still sees every token alive at entry, and rules this layer's
feed-forward and all that follows. Nothing is protected: a fallen first token computes on, seen by nobody and seeing nobody, and
is still what a classifier reads.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step

MASKED = -10000.0
"""Added to the logits of dead keys; far enough below any logit that their softmax is exactly 0 in float32."""

FLOOR = 1e-5
"""The official lower bound of an active threshold: it keeps tokens without attention, the dead ones, below every threshold."""


class LtpParameters(base.Parameters):
    """Parameters of LTP.

    Attributes:
        thresholds: one per layer, 0 or more; 0 switches the layer's decision off.
        n_ref: number of queries the score is averaged over. ``length``: the sample's own number of real tokens, so padding does
            not matter. ``padded``: the padded length of the run, the official form. A number: the padded length used in training.
    """

    thresholds: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    n_ref: Annotated[int, Field(ge=1)] | Literal["length", "padded"] = "length"


class LtpLayer(nn.Module):
    """One block with LTP's decision between its attention output and its feed-forward.

    Attributes:
        threshold: float32, 0-d.
        active: False for a threshold of exactly 0: the block hands its mask on.
    """

    threshold: Tensor

    def __init__(self, block: Block, theta: float) -> None:
        super().__init__()
        self.block = block
        exact = torch.tensor(theta, dtype=torch.float32)
        self.active = bool(exact != 0)
        self.register_buffer("threshold", exact.clamp(min=FLOOR))

    def forward(self, x: Tensor, alive: Tensor, n_ref: Tensor | int) -> Step:
        """Run the block.

        Args:
            x: hidden states ``[B, N, C]``.
            alive: bool ``[B, N]``, tokens alive at entry.
            n_ref: queries counted in the mean: a number, or float ``[B, 1]``.
        """
        query, key, value = self.block.qkv(x)
        logits = query @ key.transpose(-1, -2) * self.block.scale
        logits = logits + torch.where(alive, 0.0, MASKED)[:, None, None, :]
        # Dead queries count for nothing: neither in the context nor in the score.
        attention = logits.softmax(dim=-1) * alive.to(x.dtype)[:, None, :, None]
        context = (attention @ value).transpose(1, 2).reshape(x.shape)
        x = self.block.attention_output(context, x)
        if not self.active:
            return Step(self.block.feed_forward(x), alive, None)
        score = attention.sum(dim=(1, 2)) / (n_ref * self.block.heads)
        keep = torch.logical_and(alive, score >= self.threshold)
        x = ops.prune(x, keep, score)
        return Step(self.block.feed_forward(x), keep, score)


class Ltp(Method):
    """LTP over all blocks of a model."""

    name: ClassVar[str] = "ltp"
    Parameters = LtpParameters

    def __init__(self, parts: Parts, parameters: LtpParameters) -> None:
        super().__init__(parts, parameters)
        check_length(parameters.thresholds, len(parts.blocks))
        self.n_ref = parameters.n_ref
        self.steps = nn.ModuleList(
            LtpLayer(block, theta) for block, theta in zip(parts.blocks, parameters.thresholds, strict=True)
        )

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """``x: [B, N, C]``, ``alive: bool [B, N]`` to the same after the last block."""
        n_ref = self.counted(x, alive)
        for layer in self.steps:
            x, alive, _ = layer(x, alive, n_ref)
        return x, alive

    def counted(self, x: Tensor, alive: Tensor) -> Tensor | int:
        """Number of queries the score is averaged over: a number, or float ``[B, 1]``."""
        if self.n_ref == "length":
            return alive.to(x.dtype).sum(dim=1, keepdim=True).clamp(min=1.0)
        return x.shape[1] if self.n_ref == "padded" else self.n_ref


def check_length(thresholds: Sequence[float], layers: int) -> None:
    """Demand one threshold per layer.

    Raises:
        UsageError: naming both lengths.
    """
    if len(thresholds) != layers:
        raise UsageError(
            f"thresholds has {len(thresholds)} values, the model has {layers} layers",
            fix=f"pass {layers} thresholds, 0 for a layer that should not prune",
        )
