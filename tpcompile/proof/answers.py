"""Answers of a question-answering model: from the logits of both ends to text, and SQuAD's exact match and F1."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample

ENDS = ("start_logits", "end_logits")
LONGEST = 30
"""Tokens of the longest answer, as in the usual evaluation."""


def answer_text(sample: Sample, outputs: Mapping[str, NDArray[Any]], nothing: bool) -> str:
    """The best answer's characters in ``sample.text``; empty where no answer is better.

    Args:
        sample: with ``spans`` into its text; tokens that are not of the text have ``(0, 0)``.
        outputs: ``start_logits`` and ``end_logits [1, N]``.
        nothing: there may be no answer: position 0 then stands for that.
    """
    start, end = (outputs[name][0].astype(np.float64) for name in ENDS)
    inside = np.array([high > low >= sample.context for low, high in sample.spans], dtype=bool)
    length = len(inside)
    sums = start[:length, None] + end[None, :length]
    reach = np.subtract.outer(np.arange(length), np.arange(length))
    sums[~(inside[:, None] & inside[None, :] & (reach <= 0) & (reach > -LONGEST))] = -np.inf
    first, last = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
    if sums[first, last] == -np.inf or (nothing and start[0] + end[0] > sums[first, last]):
        return ""
    return sample.text[sample.spans[first][0] : sample.spans[last][1]]


def score_answer(text: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 against the best of the right answers; without any the right one is empty."""
    wanted = answers or ("",)
    exact = max(float(_words(text) == _words(right)) for right in wanted)
    return exact, max(_overlap(_words(text), _words(right)) for right in wanted)


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's own script reads an answer."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    same = sum((Counter(given) & Counter(right)).values())
    return 2 * same / (len(given) + len(right))
