"""Pruned against dense on data: the best question the data allows, answered by both models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.errors import UsageError
from tpcompile.samples import Sample

EMBEDDINGS = ("sentence_embedding", "pooler_output")
LOGITS = "logits"
ENDS = ("start_logits", "end_logits")
HIDDEN = "last_hidden_state"

Outputs = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Task:
    """How well dense and pruned do on the data, each a share from 0 to 1.

    Attributes:
        name: ``recall@1`` (retrieval pairs), ``accuracy`` (labels), ``top-1 agreement`` (logits), ``token agreement`` (logits of
            every token), ``span agreement`` (both ends of an answer), ``token cosine`` (hidden states) or ``cosine`` (embeddings).
        count: queries, labelled samples, samples or tokens behind it.
        dense: the dense model's score; None where the metric compares the two models directly.
        pruned: the pruned engine's.
        agreement: share of cases in which both give the same answer (the mean cosine for ``cosine`` and ``token cosine``).
    """

    name: str
    count: int
    dense: float | None
    pruned: float | None
    agreement: float

    @property
    def drop(self) -> float | None:
        """Dense minus pruned."""
        return None if self.dense is None or self.pruned is None else self.dense - self.pruned

    def __str__(self) -> str:
        agree = f"agreement {self.agreement:.4f} on {self.count}"
        if self.dense is None or self.pruned is None:
            return f"{self.name}, {agree}"
        return f"{self.name} {self.pruned:.4f}, dense {self.dense:.4f}, {agree}"


def measure(samples: Sequence[Sample], dense: Outputs, pruned: Outputs) -> Task:
    """Dense against pruned on the best question the data allows: recall@1 of pairs, accuracy of labels, else plain agreement.

    Args:
        samples: the data; a token whose ``attention_mask`` is 0 does not count.
        dense: outputs of the dense model, one mapping per sample: an embedding ``[1, C]``, ``logits [1, L]`` or ``[1, N, L]``,
            ``start_logits`` and ``end_logits [1, N]``, or ``last_hidden_state [1, N, C]``.
        pruned: outputs of the pruned engine.

    Raises:
        UsageError: the two models share no output.
    """
    queries = [i for i, sample in enumerate(samples) if sample.role == "query"]
    targets = [i for i, sample in enumerate(samples) if sample.role == "target"]
    shared = [name for name in dense[0] if name in pruned[0]]
    embedding = next((name for name in EMBEDDINGS if name in shared), None)
    if queries and targets and embedding:
        right = np.array([samples[i].pair for i in targets])
        wanted = np.array([samples[i].pair for i in queries])
        a, b = (
            right[retrieve(_rows(outputs, queries, embedding), _rows(outputs, targets, embedding))] for outputs in (dense, pruned)
        )
        return Task("recall@1", len(queries), _share(a == wanted), _share(b == wanted), _share(a == b))
    if LOGITS in shared:
        return (_tag if dense[0][LOGITS].ndim == 3 else _classify)(samples, dense, pruned)
    if all(name in shared for name in ENDS):
        a, b = (_spans(samples, side) for side in (dense, pruned))
        return Task("span agreement", len(samples), None, None, _share((a == b).all(axis=1)))
    if not shared:
        raise UsageError("dense and pruned share no output", fix="export both with the same head")
    if embedding is None and HIDDEN in shared and dense[0][HIDDEN].ndim == 3:
        alike = all(a[HIDDEN].shape == b[HIDDEN].shape for a, b in zip(dense, pruned, strict=True))
        return _align(samples, dense, pruned) if alike else _remember(dense, pruned)
    name = embedding or shared[0]
    cosines = [cosine(a[name], b[name]) for a, b in zip(dense, pruned, strict=True)]
    return Task("cosine", len(cosines), None, None, float(np.mean(cosines)))


def _classify(samples: Sequence[Sample], dense: Outputs, pruned: Outputs) -> Task:
    a, b = (np.array([int(outputs[LOGITS].argmax()) for outputs in side]) for side in (dense, pruned))
    labels = np.array([-1 if sample.label is None else sample.label for sample in samples])
    known = labels >= 0
    if not known.any():
        return Task("top-1 agreement", len(samples), None, None, _share(a == b))
    right = labels[known]
    return Task("accuracy", int(known.sum()), _share(a[known] == right), _share(b[known] == right), _share(a == b))


def _tag(samples: Sequence[Sample], dense: Outputs, pruned: Outputs) -> Task:
    """A class for every token."""
    same = np.concatenate(
        [
            (a[LOGITS][0].argmax(axis=-1) == b[LOGITS][0].argmax(axis=-1))[_real(sample, a[LOGITS].shape[1])]
            for sample, a, b in zip(samples, dense, pruned, strict=True)
        ]
    )
    return Task("token agreement", len(same), None, None, _share(same))


def _align(samples: Sequence[Sample], dense: Outputs, pruned: Outputs) -> Task:
    """A vector for every token."""
    cosines = [
        cosine(x, y)
        for sample, a, b in zip(samples, dense, pruned, strict=True)
        for x, y, real in zip(a[HIDDEN][0], b[HIDDEN][0], _real(sample, a[HIDDEN].shape[1]), strict=True)
        if real
    ]
    return Task("token cosine", len(cosines), None, None, float(np.mean(cosines)))


def _remember(dense: Outputs, pruned: Outputs) -> Task:
    """A memory that is shorter where tokens are gone: the means over its rows."""
    cosines = [cosine(a[HIDDEN].mean(axis=1), b[HIDDEN].mean(axis=1)) for a, b in zip(dense, pruned, strict=True)]
    return Task("memory cosine", len(cosines), None, None, float(np.mean(cosines)))


def _spans(samples: Sequence[Sample], outputs: Outputs) -> NDArray[np.int64]:
    """First and last token of every sample's answer, ``[samples, 2]``."""
    rows = zip(samples, outputs, strict=True)
    ends = [[int(np.where(_real(s, o[end].shape[1]), o[end][0], -np.inf).argmax()) for end in ENDS] for s, o in rows]
    return np.array(ends, dtype=np.int64)


def _real(sample: Sample, tokens: int) -> NDArray[np.bool_]:
    """Which of a sample's tokens are no padding, where the mask is over the same tokens; ``[N]``."""
    mask = sample.inputs.get("attention_mask")
    return np.ones(tokens, dtype=bool) if mask is None or mask.size != tokens else mask.reshape(-1) != 0


def retrieve(queries: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.int64]:
    """For each query ``[Q, C]`` the index of the target ``[T, C]`` with the largest cosine; ``[Q]``, the first one on a tie."""
    unit = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-30) for side in (queries, targets)]
    return np.asarray((unit[0] @ unit[1].T).argmax(axis=1), dtype=np.int64)


def _rows(outputs: Sequence[Mapping[str, NDArray[Any]]], indices: Sequence[int], name: str) -> NDArray[np.float64]:
    return np.stack([outputs[i][name].astype(np.float64).ravel() for i in indices])


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean())


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Cosine of the flattened arrays; 1 for two zero vectors, 0 for one."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms else float(not x.any() and not y.any())
