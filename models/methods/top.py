"""ToP, constraint-aware and ranking-distilled token pruning (arXiv 2306.14393, KDD 2023): learned sets of ranks, with hard gates.

At the entry of each layer of ``token_prune_loc`` the tokens are ranked by the attention they received in the layer before, averaged over
heads and queries. With ``m`` living tokens beside CLS, rank ``r`` falls into bin ``floor(clamp(r / (m + 1e-6), 0, 1) * G)``, and stays
where that bin's gate in ``token_z`` is open; open bins need not be the first ones. A location whose ``pruner_z`` is closed drops
nothing. CLS is not ranked and always stays. A dropped token returns at the end with its last hidden state (``fill=last``).

Deviations:

- only living tokens vote. In the published masked form padding and tokens dropped before vote too, so a text's kept tokens depend on its
  padding, and no gathered form can equal it; at the first location, without padding, both are one.
- bins are computed in whole numbers: engines divide floats in ways of their own, and a rank on the edge of a bin would fall differently in
  each. On an edge the published float32 takes the lower bin below 32 living tokens and the upper one from there on, all but two times of
  a hundred; here always.
- equal scores: the token in front has the better rank.
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
from tpcompile.models.methods.demands import check_cls, check_locations
from tpcompile.models.methods.masked import attention, joined, leading

LOST = 32
"""From so many living tokens on, the 1e-6 that the published code adds to their number is lost in float32."""

Gate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TopParameters(base.Parameters):
    """Parameters of ToP.

    Attributes:
        token_z: one row of bins per location, all rows of one length; above 0 is an open gate.
        pruner_z: one gate per location; default: all open.
        token_prune_loc: the layers at whose entry tokens are dropped, from 1; default: the last ones, as many as ``token_z`` has rows.
    """

    token_z: list[list[Gate]]
    pruner_z: list[Gate] | None = None
    token_prune_loc: list[int] | None = None


class TopLayer(nn.Module):
    """One block, with a decision at its entry or none.

    Attributes:
        gates: float32 ``[G + 1]``, 1 for an open bin; the last stands for ranks behind the living and is closed. None: no decision.
        scores: whether the next block decides by this one's attention.
    """

    gates: Tensor | None

    def __init__(self, block: Block, gates: list[float] | None, scores: bool) -> None:
        super().__init__()
        self.block = block
        self.scores = scores
        self.register_buffer("gates", None if gates is None else torch.tensor([*(float(z > 0) for z in gates), 0.0]))

    def forward(self, x: Tensor, alive: Tensor, score: Tensor | None) -> tuple[Step, Tensor | None]:
        """Run the block.

        Args:
            x: hidden states ``[B, N, C]``.
            alive: bool ``[B, N]``.
            score: ``[B, N]`` of the block before; None where it gave none.

        Returns:
            What the block did, and its score ``[B, N]``, None where nobody reads it.
        """
        entry, decides = x, self.gates is not None and score is not None
        if self.gates is not None and score is not None:
            alive = _kept(self.gates, score, alive)
            x = ops.prune(x, alive, score)
        weights, value = attention(self.block, x, alive)
        y = self.block.feed_forward(self.block.attention_output(joined(weights @ value, x), x))
        voters = alive.to(x.dtype).sum(dim=1, keepdim=True).clamp(min=1.0)
        found = weights.sum(dim=(1, 2)) / (voters * weights.shape[1]) if self.scores else None
        return Step(y, alive, score, entry) if decides else Step(y, alive), found


def _kept(gates: Tensor, score: Tensor, alive: Tensor) -> Tensor:
    """What stays of ``alive: bool [B, N]`` by gates ``[G + 1]`` and ``score: [B, N]``."""
    first = leading(score, 1)
    others = torch.logical_and(alive, torch.logical_not(first))
    rank = ops.rank(torch.where(alive, torch.where(first, -1.0, score), float("-inf")))
    living, count = others.sum(dim=1, keepdim=True).clamp(min=1), gates.shape[0] - 1
    bins = torch.minimum((rank * count - (living < LOST).to(torch.int64)).clamp(min=0) // living, torch.full_like(rank, count))
    return torch.logical_or(torch.logical_and(others, gates[bins] > 0), torch.logical_and(alive, first))


class Top(Method):
    """ToP over all blocks of a model with a CLS token."""

    name: ClassVar[str] = "top"
    Parameters = TopParameters
    decided = "its gates are learned for each rank, and come with a checkpoint"

    def __init__(self, parts: Parts, parameters: TopParameters) -> None:
        super().__init__(parts, parameters)
        check_cls(self.name, parts)
        layers, rows = len(parts.blocks), parameters.token_z
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise UsageError(
                f"token_z has rows of {[len(row) for row in rows]} bins",
                fix="pass one row of gates per location, all of one length",
            )
        places = parameters.token_prune_loc
        places = list(range(max(layers - len(rows), 0), layers)) if places is None else places
        check_locations("token_prune_loc", places, layers, first=1)
        gates = parameters.pruner_z if parameters.pruner_z is not None else [1.0] * len(rows)
        if not len(places) == len(rows) == len(gates):
            raise UsageError(
                f"token_z has {len(rows)} rows, pruner_z {len(gates)} gates, token_prune_loc {len(places)} layers",
                fix="pass as many of each",
            )
        open_ = {place: row for place, row, gate in zip(places, rows, gates, strict=True) if gate > 0}
        self.steps = nn.ModuleList(TopLayer(block, open_.get(i), i + 1 in open_) for i, block in enumerate(parts.blocks))

    def forward(self, x: Tensor, alive: Tensor) -> tuple[Step, ...]:
        """Run the blocks on ``x: [B, N, C]``, ``alive: bool [B, N]``; what each returned, in order."""
        score: Tensor | None = None
        steps: list[Step] = []
        for layer in self.steps:
            step, score = layer(x, alive, score)
            steps.append(step)
            x, alive = step.x, step.alive
        return tuple(steps)
