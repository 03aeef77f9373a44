"""What a model or an engine takes, and the refusal of arrays that do not fit: the same before there is an engine as after."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tpcompile.errors import InputError
from tpcompile.spec import TensorSpec

INSPECT = "compare with `tpcompile inspect DIR`"


@dataclass(frozen=True)
class Takes:
    """What is taken.

    Attributes:
        inputs: names, dtypes and shapes.
        dims: dynamic dim name -> least and greatest size; what is not named is of any size.
        ranges: input -> least and greatest value.
        attended: inputs ``[B, N]`` that hold 0 and 1, and 1 at position 0.
    """

    inputs: tuple[TensorSpec, ...]
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    attended: tuple[str, ...] = ()

    def check(self, feeds: Mapping[str, object]) -> dict[str, np.ndarray]:
        """Refuse what does not fit.

        Returns:
            Every input as a contiguous array, in the order of ``inputs``.

        Raises:
            InputError: a name, dtype, rank, size or value that does not fit.
        """
        specs = {spec.name: spec for spec in self.inputs}
        _names(feeds, specs)
        arrays = {name: _array(feeds[name], spec) for name, spec in specs.items()}
        sizes: dict[str, int] = {}
        for name, spec in specs.items():
            _sizes(arrays[name], spec, self.dims, sizes)
            _values(name, arrays[name], self.ranges.get(name))
        for name in self.attended:
            _attended(name, arrays[name])
        return arrays


def _names(feeds: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> None:
    for what, names in (("missing", specs.keys() - feeds.keys()), ("unknown", feeds.keys() - specs.keys())):
        if names:
            raise InputError(f"{what} input: {', '.join(sorted(names))}", fix=f"this engine takes exactly: {', '.join(specs)}")


def array_of(name: str, value: object) -> np.ndarray:
    """An input as an array.

    Raises:
        InputError: numpy does not take it: rows of different lengths, a tensor of another device or with a gradient.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        fix = "pass a numpy array, of a tensor tensor.detach().cpu().numpy()"
        raise InputError(f"{name} is not an array: {error}", fix=fix) from error


def _array(value: object, spec: TensorSpec) -> np.ndarray:
    array = array_of(spec.name, value)
    if array.dtype != np.dtype(spec.dtype):
        raise InputError(f"{spec.name} is {array.dtype}, not {spec.dtype}", fix=f"convert it with .astype(numpy.{spec.dtype})")
    if array.ndim != len(spec.shape):
        raise InputError(f"{spec.name} has shape {list(array.shape)}, not {spec}", fix=INSPECT)
    return np.ascontiguousarray(array)


def _sizes(array: np.ndarray, spec: TensorSpec, dims: Mapping[str, tuple[int, int]], seen: dict[str, int]) -> None:
    """Compare one array's sizes with its spec, the dim's range, and the inputs before it (``seen``, added to)."""
    for size, want in zip(array.shape, spec.shape, strict=True):
        if isinstance(want, int):
            if size != want:
                raise InputError(f"{spec.name} has shape {list(array.shape)}, not {spec}", fix=INSPECT)
            continue
        low, high = dims.get(want, (1, size))
        what = f"{spec.name} has {want} = {size}"
        if size < max(low, 1):
            raise InputError(
                f"{what}; the engine takes {max(low, 1)} or more", fix="pass a longer input; empty text has no tokens"
            )
        if size > high:
            raise InputError(f"{what}; the engine takes {high} at most", fix=f"truncate to {high}, or split the text")
        if seen.setdefault(want, size) != size:
            raise InputError(f"{what}, another input {seen[want]}", fix="give every input the same length")


def _attended(name: str, mask: np.ndarray) -> None:
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError(
            f"{name} holds other numbers than 0 and 1", fix="pass 1 for a token and 0 for padding: the export assumed it"
        )
    if not (mask[:, 0] == 1).all():
        raise InputError(f"{name} hides the first token of a sample", fix="pad on the right: the export assumed it")


def _values(name: str, array: np.ndarray, limits: tuple[int, int] | None) -> None:
    if limits is None or limits[0] <= array.min() <= array.max() <= limits[1]:
        return
    raise InputError(
        f"{name} holds values from {array.min()} to {array.max()}; the engine takes {limits[0]} to {limits[1]}",
        fix="tokenise with the tokenizer files in the bundle",
    )
