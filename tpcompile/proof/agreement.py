"""Pruned against dense on data: the best question the data allows, answered by both models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpcompile.data.samples import Sample
from tpcompile.errors import InputError, UsageError
from tpcompile.proof.answers import ENDS, answer_text, score_answer
from tpcompile.proof.scores import METRICS, Metric, Values, drop_interval, mcnemar, mean
from tpcompile.timing.stats import Interval

EMBEDDINGS = ("sentence_embedding", "pooler_output")
LOGITS = "logits"
HIDDEN = "last_hidden_state"
TOP = 5
CONFIDENCE = 0.95

Outputs = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Task:
    """How well dense and pruned do on the data.

    Attributes:
        name: ``recall@1`` (retrieval pairs), ``accuracy``, ``f1`` or ``matthews`` (labels), ``pearson`` (numbers), ``span f1`` (answers),
            ``top-1 agreement`` (logits), ``correlation`` (one logit), ``token agreement`` (logits of every token), ``span agreement``
            (both ends of an answer), ``token cosine`` (hidden states) or ``cosine`` (embeddings).
        count: queries, labelled samples, samples or tokens behind it.
        dense: the dense model's score; None where the metric compares the two models directly.
        pruned: the pruned engine's.
        agreement: share of cases in which both give the same answer (the mean cosine for ``cosine`` and ``token cosine``; where the answer
            is a number, how the two correlate).
        interval: of the drop, by a paired bootstrap; None where there are too few cases.
        lost: cases that only dense has right; None where cases are not right or wrong.
        gained: cases that only pruned has right.
        p_value: of an exact McNemar test on these two.
        more: further figures by name, such as ``top-5 agreement`` and ``kl`` (nats, of pruned from dense).
    """

    name: str
    count: int
    dense: float | None
    pruned: float | None
    agreement: float
    interval: Interval | None = None
    lost: int | None = None
    gained: int | None = None
    p_value: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def drop(self) -> float | None:
        """Dense minus pruned."""
        return None if self.dense is None or self.pruned is None else self.dense - self.pruned

    def __str__(self) -> str:
        agree = f"agreement {self.agreement:.4f} on {self.count}"
        known = "".join(f", {name} {value:.4g}" for name, value in self.more.items())
        if self.dense is None or self.pruned is None:
            return f"{self.name}, {agree}{known}"
        text = f"{self.name} {self.pruned:.4f}, dense {self.dense:.4f}, {agree}{known}"
        if self.interval is not None:
            text += f"; falls by {self.interval.low:.4f} to {self.interval.high:.4f} ({self.interval.confidence:.0%})"
        if self.p_value is not None:
            text += f"; {self.lost} lost, {self.gained} gained, McNemar p = {self.p_value:.3g}"
        return text


def measure(samples: Sequence[Sample], dense: Outputs, pruned: Outputs, confidence: float = CONFIDENCE) -> Task:
    """Dense against pruned on the best question the data allows: recall@1 of pairs, the score of labels or answers, else agreement.

    Args:
        samples: the data; a token whose ``attention_mask`` is 0 does not count.
        dense: outputs of the dense model, one mapping per sample: an embedding ``[1, C]``, ``logits [1, L]`` or ``[1, N, L]``,
            ``start_logits`` and ``end_logits [1, N]``, or ``last_hidden_state [1, N, C]``.
        pruned: outputs of the pruned engine.
        confidence: of the interval of the drop.

    Raises:
        UsageError: the two models share no output.
        InputError: a label that the model has no class for.
    """
    shared = [name for name in dense[0] if name in pruned[0]]
    embedding = next((name for name in EMBEDDINGS if name in shared), None)
    roles = [sample.role for sample in samples]
    if embedding and "query" in roles and roles.count("target") > 1:  # among one target every query finds its own
        return _retrieval(samples, dense, pruned, embedding, confidence)
    if LOGITS in shared:
        if dense[0][LOGITS].ndim == 3:
            return _tag(samples, dense, pruned)
        return _classify(samples, dense, pruned, confidence)
    if all(name in shared for name in ENDS):
        return _answer(samples, dense, pruned, confidence)
    if not shared:
        raise UsageError("dense and pruned share no output", fix="export both with the same head")
    if embedding is None and HIDDEN in shared and dense[0][HIDDEN].ndim == 3:
        alike = all(a[HIDDEN].shape == b[HIDDEN].shape for a, b in zip(dense, pruned, strict=True))
        return _align(samples, dense, pruned) if alike else _remember(dense, pruned)
    name = embedding or shared[0]
    cosines = [cosine(a[name], b[name]) for a, b in zip(dense, pruned, strict=True)]
    return Task("cosine", len(cosines), None, None, float(np.mean(cosines)))


def _scored(
    name: str,
    metric: Metric,
    answers: tuple[Values, Values],
    right: Values,
    agreement: float,
    confidence: float,
    binary: bool = True,
) -> Task:
    """A task with right answers: both scores, the interval of the drop and, where a case is right or wrong, McNemar's test."""
    dense, pruned = answers
    task = Task(
        name, len(right), float(metric(dense, right)), float(metric(pruned, right)), agreement,
        drop_interval(metric, dense, pruned, right, confidence),
    )  # fmt: skip
    if not binary:
        return task
    hit, still = dense == right, pruned == right
    lost, gained = int((hit & ~still).sum()), int((~hit & still).sum())
    return replace(task, lost=lost, gained=gained, p_value=mcnemar(lost, gained))


def _retrieval(samples: Sequence[Sample], dense: Outputs, pruned: Outputs, name: str, confidence: float) -> Task:
    queries, targets = ([i for i, sample in enumerate(samples) if sample.role == role] for role in ("query", "target"))
    pairs = np.array([samples[i].pair for i in targets], dtype=np.float64)
    wanted = np.array([samples[i].pair for i in queries], dtype=np.float64)
    a, b = (pairs[retrieve(_rows(outputs, queries, name), _rows(outputs, targets, name))] for outputs in (dense, pruned))
    return _scored("recall@1", METRICS["accuracy"], (a, b), wanted, _share(a == b), confidence)


def _classify(samples: Sequence[Sample], dense: Outputs, pruned: Outputs, confidence: float) -> Task:
    left, right = (np.stack([outputs[LOGITS].astype(np.float64).ravel() for outputs in side]) for side in (dense, pruned))
    if left.shape[1] == 1:
        return _regress(samples, left[:, 0], right[:, 0], confidence)
    a, b = (side.argmax(axis=1).astype(np.float64) for side in (left, right))
    labels = np.array([-1 if sample.label is None else sample.label for sample in samples], dtype=np.float64)
    if (high := int(labels.max())) >= left.shape[1]:
        raise InputError(f"a label is {high}, the model has classes 0 to {left.shape[1] - 1}", fix="use the model's label numbers")
    known, more = labels >= 0, _closeness(left, right)
    if not known.any():
        return Task("top-1 agreement", len(samples), None, None, _share(a == b), more=more)
    name = samples[0].metric or "accuracy"
    task = _scored(name, METRICS[name], (a[known], b[known]), labels[known], _share(a == b), confidence)
    return replace(task, more=more | (_top5(left, right, labels) if left.shape[1] > TOP else {}))


def _regress(samples: Sequence[Sample], dense: Values, pruned: Values, confidence: float) -> Task:
    """One logit is a number: it has no classes to agree on, and labels are the right numbers."""
    alike = float(METRICS["pearson"](dense, pruned))
    wanted = [sample.label if sample.number is None else sample.number for sample in samples]
    if any(number is None for number in wanted):
        return Task("correlation", len(samples), None, None, alike)
    right = np.array(wanted, dtype=np.float64)
    return _scored("pearson", METRICS["pearson"], (dense, pruned), right, alike, confidence, binary=False)


def _closeness(dense: Values, pruned: Values) -> dict[str, float]:
    """How near two sets of logits ``[n, L]`` are as distributions, and in their first five classes."""
    p, q = (side - np.logaddexp.reduce(side, axis=1, keepdims=True) for side in (dense, pruned))
    found = {"kl": max(0.0, float((np.exp(p) * (p - q)).sum(axis=1).mean()))}
    if dense.shape[1] > TOP:
        first = pruned.argmax(axis=1)[:, None]
        found["top-5 agreement"] = _share((np.argsort(-dense, axis=1, kind="stable")[:, :TOP] == first).any(axis=1))
    return found


def _top5(dense: Values, pruned: Values, labels: Values) -> dict[str, float]:
    """Share of labels among the first five classes."""
    known = labels >= 0
    best = {
        name: np.argsort(-side[known], axis=1, kind="stable")[:, :TOP] for name, side in (("dense", dense), ("pruned", pruned))
    }
    return {f"top-5 {name}": _share((rows == labels[known][:, None]).any(axis=1)) for name, rows in best.items()}


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


def _answer(samples: Sequence[Sample], dense: Outputs, pruned: Outputs, confidence: float) -> Task:
    """The span of an answer: SQuAD's F1 and exact match where right answers are known."""
    a, b = (_spans(samples, side) for side in (dense, pruned))
    agreement = _share((a == b).all(axis=1))
    if any(sample.answers is None for sample in samples):
        return Task("span agreement", len(samples), None, None, agreement)
    nothing = any(not sample.answers for sample in samples)
    texts = [[answer_text(s, o, nothing) for s, o in zip(samples, side, strict=True)] for side in (dense, pruned)]
    rows = [[score_answer(text, sample.answers or ()) for text, sample in zip(side, samples, strict=True)] for side in texts]
    exact, overlap = ([np.array([row[k] for row in side], dtype=np.float64) for side in rows] for k in (0, 1))
    task = _scored("span f1", mean, (overlap[0], overlap[1]), np.ones(len(samples)), agreement, confidence, binary=False)
    lost, gained = (int((x > y).sum()) for x, y in ((exact[0], exact[1]), (exact[1], exact[0])))
    more = {"exact match": float(exact[1].mean()), "exact match dense": float(exact[0].mean())}
    return replace(task, lost=lost, gained=gained, p_value=mcnemar(lost, gained), more=more)


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
