"""What a graph takes and gives: names, dtypes and shapes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a program, an ONNX model or an engine.

    Attributes:
        name: the parameter's or output's name.
        dtype: numpy's name: ``int64``, ``float32``, ``bool``.
        shape: a fixed size, or the name of a dynamic dim.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Patches:
    """Which part of an image each token is: ``prefix`` tokens that are none (CLS, distillation, registers), then patches row by row.

    Attributes:
        prefix: leading tokens that are no patches.
        rows: patches from top to bottom.
        columns: patches from left to right.
    """

    prefix: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Number of tokens, prefix included."""
        return self.prefix + self.rows * self.columns
