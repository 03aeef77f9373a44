"""Token sets, placements and factors: the words of the compiler, without torch.

A *factor* is one index of an einsum-like description of an op. ``"b i k, b k j -> b i j"`` says that a batched matmul has four
factors and that ``k`` is combined along. An axis rule states facts about factors; the engine in ``passes/place.py`` owns the search.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tpcompile.errors import Where

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class TokenSet:
    """The tokens alive after one prune site. ``t0`` is the full sequence.

    Attributes:
        level: 0 for the full sequence, then one more per site.
        size: number of tokens where it is fixed; None where it is known only at run time.
        born: the site's place in the user's code; empty for ``t0``.
    """

    level: int
    size: int | None = None
    born: Where = field(default_factory=Where)

    @property
    def name(self) -> str:
        """``t0``, ``t1``, ...: the name printed in every shape."""
        return f"t{self.level}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Placement:
    """Which dims of a tensor run over which token set; prints as ``0:t1`` pairs. Empty means no token dim.

    Attributes:
        dims: dim -> token set level. A set may appear twice (``[B, H, t1, t1]``), a dim once.
    """

    dims: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.dims)

    def shape(self, sizes: Iterable[object]) -> str:
        """``[1, 12, t1, t1]`` for sizes ``(1, 12, N, N)`` and dims ``{2: 1, 3: 1}``."""
        return "[" + ", ".join(f"t{self.dims[d]}" if d in self.dims else str(s) for d, s in enumerate(sizes)) + "]"


@dataclass(frozen=True, slots=True)
class Factors:
    """How the dims of an op's tensor inputs and outputs correspond, and what the op does along each factor.

    A dim that belongs to no factor (a broadcast dim of size 1, a dim made of nothing else) is written ``None``.

    Attributes:
        ins: for each tensor input, the factor of each of its dims.
        outs: for each output, the factor of each of its dims.
        folds: factors that are combined along, with the value that makes dropping a token equal to filling it. A *contraction*
            folds with 0 and holds when either operand is 0 there.
        rigid: factors along which position or count matters: no law, the full length is needed.
        reads: factors of which only some positions are read (``x[:, 0]``): factor -> (start, stop), both from the front.
        product: a contraction or a product: one zero operand makes the result zero.
    """

    ins: tuple[tuple[str | None, ...], ...]
    outs: tuple[tuple[str | None, ...], ...]
    folds: Mapping[str, float] = field(default_factory=dict)
    rigid: frozenset[str] = frozenset()
    reads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    product: bool = False

    @property
    def names(self) -> set[str]:
        """Every factor that some dim belongs to."""
        return {f for side in (self.ins, self.outs) for dims in side for f in dims if f is not None}


def parse(notation: str) -> tuple[tuple[tuple[str | None, ...], ...], tuple[tuple[str | None, ...], ...]]:
    """Read ``"b i k, b k j -> b i j"`` into (ins, outs); ``1`` stands for a dim without a factor.

    Raises:
        ValueError: when there is no arrow.
    """
    left, arrow, right = notation.partition("->")
    if not arrow:
        raise ValueError(f"no '->' in factor notation {notation!r}")

    def side(text: str) -> tuple[tuple[str | None, ...], ...]:
        return tuple(tuple(None if name == "1" else name for name in dims.split()) for dims in text.split(","))

    return side(left), side(right)
