"""The mask of a random model, in one of the forms in which people hold it."""

import math
from typing import Any

import torch
from random_recipes import LOWS, Recipe
from torch import Tensor


class Masks:
    """The model's mask in one of the forms of ``GROWS``, and what readers take from it.

    Args:
        recipe: whose fields carry, grow, spelling and low say how.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.low = recipe, LOWS[recipe.low]

    def pick(self, *options: Any) -> Any:
        """One of several equal forms."""
        return options[self.recipe.spelling % len(options)]()

    def of(self, alive: Tensor) -> Any:
        """A bool ``[B, N]``, true where a token lives, in the form that is carried."""
        match self.recipe.carry:
            case "int":
                return alive.long()
            case "float":
                return alive.float()
            case "column":
                return alive.unsqueeze(-1).float()
            case "dead":
                return self.pick(lambda: ~alive, lambda: torch.logical_not(alive), lambda: alive == 0)
            case "additive" | "twin":
                added = self.added_to(torch.zeros_like(alive, dtype=torch.float32), ~alive)
                return (alive, added) if self.recipe.carry == "twin" else added
        return alive

    def added_to(self, zeros: Tensor, dead: Tensor) -> Tensor:
        """Zeros with the low number at the dead."""
        return self.pick(lambda: zeros.masked_fill(dead, self.low), lambda: torch.where(dead, self.low, zeros))

    def grown(self, mask: Any, keep: Tensor) -> Any:
        """The mask with another decision, bool ``[B, N]``, in it."""
        if self.recipe.flaw == "revives":
            return self.of(keep)
        if self.recipe.carry == "additive":
            return self._lowered(mask, keep)
        if self.recipe.carry == "twin":
            return mask[0] & keep, self._lowered(mask[1], keep)
        new = self.of(keep)
        match self.recipe.grow:
            case "and":
                return mask & new
            case "logical_and":
                return torch.logical_and(mask, new)
            case "mul":
                return mask * new
            case "minimum":
                return torch.minimum(mask, new)
            case "or":
                return mask | new
            case "logical_or":
                return torch.logical_or(mask, new)
        return torch.maximum(mask, new)

    def _lowered(self, mask: Tensor, keep: Tensor) -> Tensor:
        match self.recipe.grow:
            case "where":
                return torch.where(keep, mask, torch.full_like(mask, self.low))
            case "masked_fill":
                return mask.masked_fill(~keep, self.low)
            case "minimum":
                return torch.minimum(mask, self.added_to(torch.zeros_like(mask), ~keep))
            case "add":
                return mask + self.added_to(torch.zeros_like(mask), ~keep)
        mask = mask.clone()
        mask[~keep] = self.low
        return mask

    def alive(self, mask: Any) -> Tensor:
        """Bool ``[B, N]``, true where a token lives."""
        match self.recipe.carry:
            case "int":
                return self.pick(lambda: mask.bool(), lambda: mask == 1, lambda: mask > 0, lambda: mask != 0)
            case "float":
                return self.pick(lambda: mask > 0.5, lambda: mask != 0, lambda: mask == 1, lambda: mask.bool(), lambda: mask >= 1)
            case "column":
                return self.pick(lambda: mask.squeeze(-1) > 0.5, lambda: mask[..., 0] != 0, lambda: (mask > 0).squeeze(2))
            case "dead":
                return self.pick(lambda: ~mask, lambda: torch.logical_not(mask), lambda: mask == 0)
            case "additive":
                return self.pick(lambda: mask == 0, lambda: mask > -1.0, lambda: mask >= 0)
            case "twin":
                return mask[0]
        return mask

    def weight(self, mask: Any) -> Tensor:
        """Float ``[B, N]``, 1 where a token lives, 0 elsewhere."""
        match self.recipe.carry:
            case "float":
                return mask
            case "column":
                return self.pick(lambda: mask.squeeze(-1), lambda: mask[..., 0])
            case "dead":
                return self.pick(lambda: (~mask).float(), lambda: 1.0 - mask.float(), lambda: (1 - mask.long()).float())
        return self.alive(mask).float()

    def added(self, mask: Any) -> Tensor:
        """Float ``[B, N]``, 0 where a token lives, the low number elsewhere."""
        if self.recipe.carry == "additive":
            return mask
        if self.recipe.carry == "twin":
            return mask[1]
        alive = self.alive(mask)
        chosen = torch.where(alive, 0.0, self.low)
        if math.isinf(self.low):
            return chosen
        return self.pick(lambda: (1.0 - self.weight(mask)) * self.low, lambda: chosen, lambda: (~alive).float() * self.low)
