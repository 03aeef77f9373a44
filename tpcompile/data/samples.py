"""A sample as an engine takes it, whatever it was made from, and samples gathered into batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tpcompile.errors import UsageError

Role = Literal["", "query", "target"]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One text or image as an engine takes it.

    Attributes:
        text: the text; for an image, where it came from.
        inputs: by name; for a text int64 ``[1, n]`` (``input_ids``, ``attention_mask`` and what else was asked for), for an
            image float32 ``[1, C, H, W]``.
        spans: for each token, its characters ``(start, end)`` in ``text``; ``(0, 0)`` for special tokens.
        words: for each token, the number of its word; None for special tokens.
        pieces: for each token, its entry in the vocabulary.
        label: class index or None.
        number: the right number, where the task is a regression.
        answers: the right answers' texts, where the task is to find one in ``text``; empty: there is none.
        context: where in ``text`` the part begins that answers are looked for in.
        metric: of the labels, a name in ``tpcompile.proof.scores.METRICS``; empty: accuracy.
        pair: number of the retrieval pair, or None.
        role: ``query`` or ``target`` in a pair.
        tokens: number of tokens, where the inputs do not show it; 0 where they do.
        picture: uint8 ``[H, W, 3]``, the image as the model sees it; None for a text.
    """

    text: str
    inputs: Mapping[str, NDArray[Any]]
    spans: tuple[tuple[int, int], ...] = ()
    words: tuple[int | None, ...] = ()
    pieces: tuple[str, ...] = ()
    label: int | None = None
    pair: int | None = None
    role: Role = ""
    tokens: int = 0
    picture: NDArray[np.uint8] | None = None
    number: float | None = None
    answers: tuple[str, ...] | None = None
    context: int = 0
    metric: str = ""

    @property
    def length(self) -> int:
        """Number of tokens, special tokens counted."""
        return self.tokens or int(next(iter(self.inputs.values())).shape[1])

    @property
    def answerable(self) -> bool:
        """Whether the sample says what is right."""
        return any(known is not None for known in (self.label, self.number, self.answers))


def collate(samples: Sequence[Sample], pads: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
    """The inputs of several samples of one kind as one batch.

    Args:
        samples: one or more.
        pads: input name -> what fills the right end of shorter rows; 0 where none is given.

    Returns:
        by name ``[B, ...]``: integer inputs ``[1, n]`` are padded to the longest, everything else is stacked.

    Raises:
        UsageError: no samples, other names, or shapes that cannot be padded.
    """
    if not samples:
        raise UsageError("a batch needs a sample", fix="pass one or more samples")
    names = list(samples[0].inputs)
    for sample in samples:
        if set(sample.inputs) != set(names):
            raise UsageError(
                f"a batch of samples with inputs {', '.join(names)} and {', '.join(sample.inputs)}",
                fix="batch samples of one kind",
            )
    return {name: _stack(name, [sample.inputs[name] for sample in samples], (pads or {}).get(name, 0)) for name in names}


def split(
    outputs: Mapping[str, NDArray[Any]], samples: Sequence[Sample], along: Mapping[str, int]
) -> list[dict[str, NDArray[Any]]]:
    """A batch's outputs by sample, without what belongs to its padding.

    Args:
        outputs: by name ``[B, ...]``.
        samples: the samples of the batch, in order.
        along: output name -> the dim that runs over tokens, for outputs that have one.
    """
    rows = [{name: value[b : b + 1] for name, value in outputs.items()} for b in range(len(samples))]
    for row, sample in zip(rows, samples, strict=True):
        row.update({name: row[name].take(range(sample.length), dim) for name, dim in along.items() if name in row})
    return rows


def _stack(name: str, rows: Sequence[NDArray[Any]], fill: int) -> NDArray[Any]:
    ragged = all(row.ndim == 2 and row.dtype.kind in "iub" for row in rows)
    if ragged:
        longest = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, longest - row.shape[1])), constant_values=fill) for row in rows]
    shapes = {row.shape[1:] for row in rows}
    if len(shapes) > 1:
        shown = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise UsageError(f"{name} has samples of shape {shown}", fix="batch samples of one shape")
    return np.concatenate(rows)


def batches(samples: Sequence[Sample], size: int, *, by_length: bool = False) -> Iterator[list[int]]:
    """Cut samples into groups of ``size``; the last may be smaller.

    Args:
        samples: the stream.
        size: samples a group, 1 or more.
        by_length: group samples of similar length: sorted by it, then cut; equal lengths stay in stream order.

    Returns:
        Indices into ``samples``, a list per group.

    Raises:
        UsageError: ``size`` is below 1.
    """
    if size < 1:
        raise UsageError(f"the batch size is {size}", fix="give 1 or more")
    order = list(range(len(samples)))
    if by_length:
        order.sort(key=lambda index: samples[index].length)
    return (order[start : start + size] for start in range(0, len(order), size))
