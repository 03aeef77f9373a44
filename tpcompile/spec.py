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
