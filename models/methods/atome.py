"""A-ToMe, adjacent token merging (arXiv 2306.16009, Interspeech 2023), in its form with a fixed ratio.

In chosen blocks, between attention and feed-forward, neighbouring frames pair up, and of all pairs those with the most similar keys (the
cosine of their means over heads) merge into their mean. What stays stands in its order, so that alignments and decoders read frames as they
come. A frame that has merged counts as one from there on, as in the paper; a mean over all frames at the output counts it with its frames.

A pair is an even place and the odd one behind it, in one frequency band: the last frame of a band and the first of the next are no
neighbours. The class and distillation tokens never merge. Counts follow from the length alone: a block with n frames in b bands
merges ``min(floor(ratio * n), (n - 2 * b) // 2)`` pairs, as many as there are for certain.
"""

from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from tpcompile import ops
from tpcompile.errors import UsageError
from tpcompile.models.families import Block, Parts
from tpcompile.models.methods import base
from tpcompile.models.methods.base import Method, Step
from tpcompile.models.methods.demands import check_locations, check_pooled
from tpcompile.models.methods.dial import Dial
from tpcompile.models.methods.gathered import FAR, Blocks, Plain, attend, fetch, ranked

Ratio = Annotated[float, Field(gt=0, le=0.5)]


class AtomeParameters(base.Parameters):
    """Parameters of A-ToMe.

    Attributes:
        blocks: numbers of the blocks that merge.
        ratio: pairs that merge there, as a share of the frames.
    """

    blocks: Blocks
    ratio: Ratio


class Frames(NamedTuple):
    """What is known of each row.

    Attributes:
        band: int64 ``[B, N]``, its frequency band; each prefix token has one of its own.
        size: float ``[B, N]``, frames of the input in it.
    """

    band: Tensor
    size: Tensor


class Atome(Method):
    """A-ToMe over the blocks of a speech encoder."""

    name: ClassVar[str] = "atome"
    Parameters = AtomeParameters
    dials = (Dial("ratio", least=1e-6, most=0.5),)

    def __init__(self, parts: Parts, parameters: AtomeParameters) -> None:
        super().__init__(parts, parameters)
        grid = getattr(parts, "grid", None)
        if grid is None or "pixel_values" in parts.inputs:
            raise UsageError(
                f"atome merges neighbours in time, and {parts.architecture} takes {parts.inputs[0]}",
                fix="use tome, or a speech encoder",
            )
        check_pooled(self.name, parts)
        check_locations("blocks", parameters.blocks, len(parts.blocks))
        self.prefix, (self.bands, self.columns) = parts.prefix, grid
        self.steps = nn.ModuleList(
            Merging(block, parts.prefix, self.bands, parameters.ratio) if number in parameters.blocks else Plain(block)
            for number, block in enumerate(parts.blocks)
        )

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``, all True; what each returned, in order."""
        places = torch.arange(x.shape[1], device=x.device) - self.prefix
        band = torch.where(places < 0, places, torch.div(places, self.columns, rounding_mode="floor"))
        frames = Frames(band.expand(x.shape[0], -1), torch.ones_like(x.select(2, 0)))
        steps: list[Step] = []
        for layer in self.steps:
            if isinstance(layer, Merging):
                step, frames = layer(x, alive, frames)
            else:
                step = layer(x, alive)
            steps.append(step._replace(weight=frames.size))
            x, alive = step.x, step.alive
        return tuple(steps)


class Merging(nn.Module):
    """A block that merges neighbours."""

    def __init__(self, block: Block, prefix: int, bands: int, ratio: float) -> None:
        super().__init__()
        self.block, self.prefix, self.bands, self.ratio = block, prefix, bands, ratio

    def forward(self, x: Tensor, alive: Tensor, frames: Frames) -> tuple[Step, Frames]:
        """Run the block.

        Args:
            x: ``[B, N, C]``.
            alive: bool ``[B, N]``, all True.
            frames: of the rows of ``x``.
        """
        x, _, key = attend(self.block, x)
        free = x.shape[1] - self.prefix
        count = min(int(self.ratio * free), (free - 2 * self.bands) // 2)
        if count < 1:
            return Step(self.block.feed_forward(x), alive), frames
        left = ranked(likeness(key, frames.band, self.prefix))[:, :count].sort(dim=1).values * 2 + self.prefix
        gone = torch.zeros_like(frames.band).scatter(1, left + 1, 1)
        merged = torch.zeros_like(frames.band).scatter(1, left, 1).to(x.dtype).unsqueeze(-1)
        behind = torch.cat([x[:, 1:], x[:, -1:]], dim=1)
        means = x + merged * (behind - x) / 2
        order = torch.argsort(gone, dim=1, stable=True)
        index = order[:, : x.shape[1] - count]
        into = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1) - gone
        rows = ops.gathered(fetch(means, index), x, index, into=into)
        sizes = frames.size + merged.squeeze(-1) * torch.cat([frames.size[:, 1:], frames.size[:, -1:]], dim=1)
        left_over = Frames(frames.band.gather(1, index), sizes.gather(1, index))
        return Step(self.block.feed_forward(rows), torch.ones_like(rows.select(2, 0), dtype=torch.bool)), left_over


def likeness(key: Tensor, band: Tensor, prefix: int) -> Tensor:
    """Cosines of neighbouring keys, of pairs from the first frame on; -inf where two bands meet.

    Args:
        key: ``[B, H, N, D]``.
        band: int64 ``[B, N]``.
        prefix: leading tokens that never merge.

    Returns:
        ``[B, (N - prefix) // 2]``.
    """
    metric = key.mean(dim=1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    pairs = (key.shape[2] - prefix) // 2
    even, odd = slice(prefix, prefix + 2 * pairs, 2), slice(prefix + 1, prefix + 2 * pairs, 2)
    cosine: Any = (metric[:, even] * metric[:, odd]).sum(dim=-1)
    found: Tensor = cosine.masked_fill(band[:, even] != band[:, odd], FAR)
    return found
