"""What a method demands of a model and of its parameters, each with the way out."""

from collections.abc import Sequence
from itertools import pairwise

from tpcompile.errors import UsageError
from tpcompile.models.families import Parts


def check_locations(name: str, locations: Sequence[int], blocks: int, first: int = 0) -> None:
    """Demand rising block numbers that the model has.

    Args:
        name: the parameter's.
        locations: block numbers, from 0.
        blocks: the model's.
        first: the earliest block at which the method can decide.

    Raises:
        UsageError: naming the parameter and what it may hold.
    """
    rising = all(a < b for a, b in pairwise(locations))
    if not rising or not all(first <= block < blocks for block in locations):
        raise UsageError(
            f"{name} is {list(locations)}, the model has blocks 0 to {blocks - 1}",
            fix=f"give rising block numbers from {first} to {blocks - 1}",
        )


def check_cls(method: str, parts: Parts) -> None:
    """Demand a CLS token.

    Raises:
        UsageError: the model has none.
    """
    if not parts.cls:
        raise UsageError(
            f"{method} scores tokens by a CLS token, and this {parts.architecture} has none",
            fix="use --method ltp, which averages over all queries",
        )


def check_images(method: str, parts: Parts, cls: bool = True) -> None:
    """Demand a model of images with one output per image, and a CLS token where it is needed.

    Raises:
        UsageError: naming what is missing.
    """
    if "pixel_values" not in parts.inputs:
        raise UsageError(
            f"{method} is a method for images, and {parts.architecture} takes {parts.inputs[0]}",
            fix="use ltp, tome or zero_tprune",
        )
    if cls:
        check_cls(method, parts)
    check_pooled(method, parts)


def check_pooled(method: str, parts: Parts) -> None:
    """Demand outputs without a row per token.

    Raises:
        UsageError: the model's outputs have one.
    """
    if parts.token_level:
        raise UsageError(
            f"{method} gathers by itself and brings no dropped row back, and the outputs of {parts.architecture} have one per token",
            fix="use ltp, or a model with a pooled output",
        )


def check_length(name: str, values: Sequence[object], depth: int) -> None:
    """Demand one value per block.

    Raises:
        UsageError: naming the parameter and both lengths.
    """
    if len(values) != depth:
        raise UsageError(f"{name} has {len(values)} values, the model has {depth} blocks", fix=f"pass {depth} values")


def is_padded(parts: Parts) -> bool:
    """Whether inputs may hold padding: texts may, images do not."""
    return "pixel_values" not in parts.inputs
