"""What a random small transformer is made of: a ``Recipe``, drawn from a string of bytes so that every choice shrinks by itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

LONGEST = 24
LOWS = {"1e4": -1e4, "1e9": -1e9, "inf": float("-inf"), "min": torch.finfo(torch.float32).min, "weak": -5.0}
GROWS = {
    "bool": ("and", "logical_and", "mul", "minimum"),
    "int": ("and", "mul", "minimum"),
    "float": ("mul", "minimum"),
    "column": ("mul", "minimum"),
    "dead": ("or", "logical_or", "maximum"),
    "additive": ("where", "masked_fill", "minimum", "assign", "add"),
    "twin": ("where", "masked_fill", "minimum", "assign"),
}
"""How a mask is held from layer to layer -> how a decision is added to it."""
PADDING = {"bool": torch.bool, "long": torch.int64, "float": torch.float32}
BEFORE, MIDDLE, BEHIND = "before", "middle", "behind"


@dataclass(frozen=True)
class Recipe:
    """What a model is made of; the defaults are the simplest choice, towards which a failure shrinks.

    Attributes:
        mode: ``drawn``: each decision is an input; ``scored``: an input and a score; ``found``: a score, and nobody marks the site.
        prefix: tokens in front that never fall; ``given`` ones are the input's own, others are learned and joined.
        front: how the front's ones come into a decision.
        norm: where it stands; ``kind`` is how it is written.
        carry: how the mask is held, ``grow`` how a decision is added (``GROWS``), ``spelling`` which of several equal forms is written.
        attention: how keys are hidden, ``low`` by what, ``scale``: whether logits are scaled before or behind that; ``structure``: which
            keys a token sees at all.
        hide: where rows of dropped tokens become known numbers.
        score: what a decision is, or is reported to be, made from.
        position: what tells tokens apart.
        sites: (layer, place) of each.
        pool: the outputs.
        static: whether batch and length are those of the example, ``batch`` and ``length``.
        flaw: what is wrong with the model, if anything.
    """

    mode: str = "drawn"
    seed: int = 0
    depth: int = 1
    heads: int = 1
    width: int = 8
    prefix: int = 0
    given: bool = False
    front: str = "cat"
    padded: str = "no"
    norm: str = "none"
    kind: str = "module"
    carry: str = "bool"
    grow: str = "and"
    spelling: int = 0
    attention: str = "fill"
    low: str = "1e4"
    structure: str = "none"
    scale: str = "first"
    qkv: str = "apart"
    hide: str = "none"
    score: str = "none"
    position: str = "none"
    sites: tuple[tuple[int, str], ...] = ((0, MIDDLE),)
    pool: tuple[str, ...] = ("mean",)
    static: bool = False
    batch: int = 1
    length: int = 9
    flaw: str = "none"

    @property
    def joined(self) -> int:
        """Learned tokens in front of the input's own."""
        return 0 if self.given else self.prefix

    @property
    def sure(self) -> bool:
        """Whether position 0 is never dropped and never padding."""
        return self.prefix > 0 and not (self.given and self.padded != "no")


SIZE = 40
"""Bytes that a recipe is drawn from; what is not used is ignored."""


class _Choices:
    """One byte per choice; 0 is the first option, so that shorter and smaller bytes are simpler models.

    Args:
        code: the bytes.
    """

    def __init__(self, code: bytes) -> None:
        self.left = list(reversed(code))

    def byte(self) -> int:
        return self.left.pop() if self.left else 0

    def __call__(self, *options: Any) -> Any:
        return options[self.byte() * len(options) // 256]


OPTIONS: dict[str, tuple[Any, ...]] = {
    "seed": tuple(range(256)),
    "heads": (1, 2, 4),
    "width": (8, 16),
    "prefix": (0, 0, 1, 2, 3),
    "given": (False, True),
    "front": ("cat", "pad", "or", "assign"),
    "padded": ("no", "no", "no", *PADDING),
    "norm": ("none", "pre", "post"),
    "kind": ("module", "hand", "rms"),
    "carry": tuple(GROWS),
    "spelling": tuple(range(12)),
    "attention": ("fill", "where", "add", "zeroed", "sdpa_bool", "sdpa_add", "policy", "renormed", "outer"),
    "low": ("1e4", "1e9", "inf", "min"),
    "structure": ("none", "none", "none", "none", "none", "self", "causal", "window"),
    "scale": ("first", "behind"),
    "qkv": ("apart", "fused"),
    "hide": ("none", "probs", "attended", "where", "filled", "states", "states_filled"),
    "score": ("none", "norm", "linear", "mlp", "argmax", "received", "class"),
    "position": ("none", "input", "table", "bias", "rotary", "distance", "buckets"),
    "static": (False, True),
    "batch": (1, 1, 1, 3, 2, 4),
    "length": (9, 8, 16, 5),
}
"""What each field is drawn from; an option that stands twice comes twice as often."""
DEPTHS, SITES, PLACES = (1, 1, 2, 2, 2, 3, 4), (1, 1, 2, 2, 3), (MIDDLE, BEFORE, BEHIND)
POOLS = ("mean", "product", "share", "chosen", "rows", "zeros", "first", "max", "largest", "attention", "front", "ends")
FLAWS = ("forgets", "queries", "eps", "unscaled", "revives", "weak", "last_row", "all")


def recipe_of(code: bytes, mode: str = "drawn", sound: bool = False) -> Recipe:
    """The recipe that bytes stand for. Unless it is to be sound, one in eight stays as it is drawn, and some have a flaw."""
    one = _Choices(code)
    depth, order = one(*DEPTHS), (BEFORE, MIDDLE, BEHIND)
    places = {(one(*range(depth)), one(*PLACES)) for _ in range(one(*SITES))}
    sites = tuple(sorted(places, key=lambda site: (site[0], order.index(site[1]))))
    fields = {name: one(*options) for name, options in OPTIONS.items()}
    pools = POOLS if fields["prefix"] else POOLS[:-2]
    pool = tuple(dict.fromkeys(one(*pools) for _ in range(one(1, 2))))
    recipe = _consistent(Recipe(mode=mode, depth=depth, sites=sites, pool=pool, grow=one(*GROWS[fields["carry"]]), **fields))
    flaw, as_drawn = one(*["none"] * 120, *FLAWS), one(*[False] * 7, True)
    if flaw != "none" and not sound:
        return flawed(recipe, flaw)
    return recipe if as_drawn and not sound else mended(recipe)


def _consistent(recipe: Recipe) -> Recipe:
    """The nearest recipe that says what it does."""
    fused, changes = recipe.attention.startswith("sdpa"), dict[str, Any]()
    if fused and recipe.score in ("received", "class"):
        changes["score"] = "norm"
    if fused and recipe.hide == "probs":
        changes["hide"] = "attended"
    if recipe.attention == "sdpa_bool" and recipe.position in ("bias", "distance", "buckets"):
        changes["attention"] = "sdpa_add"
    if changes.get("attention", recipe.attention) == "sdpa_add":
        changes["structure"] = "none"
    if recipe.mode != "drawn" and changes.get("score", recipe.score) == "none":
        changes["score"] = "linear"
    return replace(recipe, **changes)


def flawed(recipe: Recipe, flaw: str) -> Recipe:
    """The recipe with something wrong."""
    needed = {"eps": "policy", "unscaled": "renormed", "forgets": "fill", "queries": "fill"}
    pool = (flaw,) if flaw in ("last_row", "all") else recipe.pool
    low = "weak" if flaw == "weak" else recipe.low
    return replace(recipe, flaw=flaw, attention=needed.get(flaw, recipe.attention), pool=pool, low=low)


def attentions(recipe: Recipe) -> int:
    """How many attentions stand behind the first site."""
    layer, place = recipe.sites[0]
    return recipe.depth - layer - (place != BEFORE)


def _infinite(recipe: Recipe) -> bool:
    """Whether rows all of whose keys are dropped are NaN."""
    return recipe.attention in ("policy", "renormed") or (recipe.low == "inf" and not recipe.attention.startswith("sdpa"))


def _sums_dropped(recipe: Recipe) -> bool:
    """Whether a score is a sum over queries of which some are dropped."""
    first = recipe.sites[0][0] + (recipe.sites[0][1] != BEFORE)
    reads = [layer - (place == BEFORE) for layer, place in recipe.sites[1:]]
    return recipe.score == "received" and recipe.hide != "probs" and any(layer >= first for layer in reads)


def _sees(recipe: Recipe) -> bool:
    """Whether every row sees a living key."""
    return recipe.structure == "self" or (recipe.sure and recipe.structure != "window")


def _falls_back(recipe: Recipe) -> bool:
    """Whether rows that see no living key reach what is read."""
    if _sees(recipe) or not attentions(recipe):
        return False
    if recipe.hide == "none":
        settled = {"chosen", "rows", "zeros"} | (set() if _infinite(recipe) else {"mean", "product", "share"})
        return attentions(recipe) > 1 or not set(recipe.pool) <= settled
    return _infinite(recipe) and recipe.hide in ("probs", "attended", "states")


def _blind(recipe: Recipe) -> bool:
    """Whether rows of padding may see no key at all, and be NaN in the masked model."""
    narrow = recipe.structure == "window" or (recipe.structure == "causal" and not recipe.sure)
    return narrow and recipe.padded != "no" and _infinite(recipe) and recipe.hide not in ("where", "filled")


Doubt = tuple[Callable[[Recipe], bool], dict[str, Any]]
"""Whether it applies, and what mends it."""

UNSOUND: dict[str, Doubt] = {
    "a flaw": (lambda r: r.flaw != "none", {"flaw": "none"}),
    "a score sums the attention that dropped queries pay": (_sums_dropped, {"score": "norm"}),
    "dropped rows are read before they are known": (_falls_back, {"hide": "filled"}),
    "rows of padding see nothing": (_blind, {"hide": "filled"}),
    "everything may fall, and a softmax pools": (lambda r: not r.sure and "attention" in r.pool, {"pool": ("mean",)}),
}
"""Why a recipe may be refused for good: docs/soundness.md, conditions 1 and 5."""

GAPS: dict[str, tuple[*Doubt, Recipe]] = {
    "queries masked with keys": (
        lambda r: r.attention == "outer", {"attention": "fill"}, Recipe(prefix=1, sites=((0, BEFORE),), attention="outer")
    ),
    "twin masks": (
        lambda r: r.carry == "twin" and r.padded != "no", {"carry": "bool", "grow": "and"},
        Recipe(prefix=1, padded="bool", carry="twin", grow="where", attention="add", sites=((0, BEFORE),)),
    ),
}  # fmt: skip
"""What is sound and refused today -> whether it applies, what mends it, and the smallest recipe."""


def doubt(recipe: Recipe) -> str:
    """The first reason why a recipe may be refused; empty where it must be compiled."""
    return next((why for why, (applies, *_) in (UNSOUND | GAPS).items() if applies(recipe)), "")


def mended(recipe: Recipe) -> Recipe:
    """The recipe without doubts."""
    for applies, changes, *_ in (*UNSOUND.values(), *GAPS.values()):
        recipe = replace(recipe, **changes) if applies(recipe) else recipe
    return recipe


def may_be_nan(recipe: Recipe) -> bool:
    """Whether rows without a living key are NaN in the masked model: then a token must live, which is an assumption of the proof."""
    return _infinite(recipe) and (not recipe.sure or recipe.structure == "window")
