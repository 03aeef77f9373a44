"""The operating point: the factor that meets a FLOPs ratio, by the manifest's own count, and why there may be none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tpcompile
from tpcompile import build, models
from tpcompile.data.samples import Sample
from tpcompile.errors import UsageError
from tpcompile.flops import Counts, saving
from tpcompile.kept import compose
from tpcompile.manifest import Flops
from tpcompile.models.sources import DIGITS
from tpcompile.operating import FURTHEST, HALVINGS, fit, ratio_on, search
from tpcompile.passes.cost import polynomial
from tpcompile.recipe import Recipe
from tpcompile.subject import Subject, subject_of

FIX = "ask for a ratio within that, or give other values to start from"


def texts(count: int) -> list[Sample]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(4, 100, (1, length)) for length in range(14, 14 + 3 * count, 3)]
    return [Sample("", {"input_ids": row, "attention_mask": np.ones_like(row)}) for row in rows]


def images(count: int) -> list[Sample]:
    generator = np.random.default_rng(0)
    return [Sample("", {"pixel_values": generator.random((1, 1, 8, 8), dtype=np.float32)}, tokens=65) for _ in range(count)]


def manifest_ratio(subject: Subject, rows: list[Sample]) -> float | None:
    """What a bundle of this subject says, from its formulas and the tokens that the compiled model keeps."""
    compiled = build.compile_subject(subject)
    paper = polynomial(compiled.placed)
    dense = compiled.work or tuple((work, ("t0",) * len(names)) for work, names in paper)
    counts = []
    for row in rows:
        trace = compiled.placed.trace(**{name: torch.from_numpy(value) for name, value in row.inputs.items()})
        kept = compose({name: tap.numpy() for name, tap in trace.taps.items()}, len(trace.keep), row.length)
        counts.append(Counts(row.length, kept.counts, kept.stored))
    names = ("t0", *(site.tokens.name for site in compiled.compact.sites))
    return saving(Flops(tokens=names, paper=paper, dense=dense), counts).paper


@pytest.mark.parametrize(
    ("method", "parameters", "batch"),
    [
        ("cls-attention", {"thresholds": [0.0, 0.001, 0.001, 0.002, 0.0, 0.002]}, "one"),
        ("ltmp", {"merge_thresholds": [0.9] * 6, "prune_thresholds": [0.004] * 6}, "one"),
        ("evit", {"base_keep_rate": 0.7, "drop_loc": [1, 3]}, "ragged"),
    ],
)
def test_what_is_reached_is_what_the_manifest_says(method: str, parameters: dict[str, Any], batch: str) -> None:
    rows = images(2)
    found = fit(subject_of(DIGITS, None, None, method, parameters, batch=batch), 1.4, rows, "noise")
    assert found.fitted is not None
    assert 1.4 <= found.fitted.reached < 1.45
    assert found.fitted.reached == pytest.approx(manifest_ratio(found, rows), rel=1e-9)


def test_sites_that_are_left_masked_count_as_the_manifest_counts_them() -> None:
    rows = images(2)
    subject = subject_of(DIGITS, None, None, "cls-attention", {"thresholds": [0.008, 0.008, 0.01, 0.012, 0.014, 0.016]})
    skipping = replace(subject, skip_below=0.1)
    counted = [ratio_on(one, rows)(one.pruned) for one in (subject, skipping)]
    assert counted == pytest.approx([manifest_ratio(subject, rows), manifest_ratio(skipping, rows)], rel=1e-9)
    assert 1 < counted[1] < counted[0]


def test_a_text_model_reaches_its_ratio_within_a_token(bert_folder: Path) -> None:
    rows = texts(3)
    shape = [0.3, 0.0, 1.0]
    found = fit(subject_of(bert_folder, None, None, "ltp", {"thresholds": shape}), 1.3, rows, "noise")
    facts = found.fitted
    assert facts is not None
    assert facts.moves == ("thresholds",)
    assert (facts.samples, facts.data, facts.target) == (3, "noise", 1.3)
    thresholds = found.pruned.method_parameters["thresholds"]
    assert thresholds == pytest.approx([facts.factor * part for part in shape], rel=1e-5)
    assert found.method is not None
    assert found.method.parameters == found.pruned.method_parameters
    tokens = sum(row.length for row in rows) * 3
    assert 1.3 <= facts.reached < 1.3 * (1 + 3 / tokens)
    assert facts.text() == (
        f"thresholds by {facts.factor:.4g}: FLOPs /{facts.reached:.3f} on 3 samples of noise (asked for /1.3)"
    )


def test_padding_and_what_the_caller_leaves_unsaid_do_not_count(bert_folder: Path) -> None:
    subject = subject_of(bert_folder, None, None, "ltp", {"thresholds": [0.1, 0.1, 0.1]})
    rows = texts(2)
    padded = [Sample("", {name: np.pad(value, ((0, 0), (0, 6))) for name, value in row.inputs.items()}) for row in rows]
    assert fit(subject, 1.2, padded, "noise").fitted == fit(subject, 1.2, rows, "noise").fitted
    subject = subject_of(DIGITS, None, None, "cls-attention", {"thresholds": [0.0, 0.01, 0.0, 0.0, 0.0, 0.0]})
    unsaid = [Sample("", row.inputs) for row in images(1)]
    assert fit(subject, 1.2, unsaid, "noise").fitted == fit(subject, 1.2, images(1), "noise").fitted


def test_progress_is_told_and_ends_below_its_total(bert_folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    subject = subject_of(bert_folder, None, None, "ltp", {"thresholds": [0.1, 0.1, 0.1]})
    fit(subject, 1.2, texts(2), "noise", lambda *row: told.append(row))
    assert {what for what, _, _ in told} == {"fit FLOPs /1.2 on 2 samples"}
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert {total for _, _, total in told} == {1 + FURTHEST + HALVINGS}
    assert len(told) <= 1 + FURTHEST + HALVINGS


def test_the_longest_search_ends_with_its_bar() -> None:
    ran: list[float] = []

    def ratio(factor: float) -> float:
        ran.append(factor)
        return steps(0.9 * 4.0**FURTHEST)(factor)

    search(ratio, 1.5, "ltp")
    assert len(ran) == 1 + FURTHEST + HALVINGS


def steps(*edges: float) -> Callable[[float], float]:
    """A ratio that is 1 and rises by 1 at every edge."""
    return lambda factor: 1.0 + sum(factor >= edge for edge in edges)


@pytest.mark.parametrize(("edge", "target"), [(0.001, 1.5), (0.7, 2.0), (1.0, 1.2), (3.7, 1.5), (900.0, 1.5)])
def test_the_least_factor_is_found_from_both_sides(edge: float, target: float) -> None:
    factor, reached = search(steps(edge), target, "ltp")
    assert factor == pytest.approx(edge, rel=1e-3)
    assert factor >= edge
    assert reached == 2.0


def test_a_ratio_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    with pytest.raises(UsageError) as caught:
        search(steps(2.0, 3.0), 9.0, "ltp")
    assert str(caught.value) == (
        f"method ltp cannot cost FLOPs /9 on this data: the most that its dial gives is /3\n  fix     {FIX}"
    )
    with pytest.raises(UsageError) as caught:
        search(lambda factor: 2.0 + factor, 1.5, "ats")
    assert str(caught.value) == (
        f"method ats cannot cost FLOPs /1.5 on this data: the least that its dial gives is /2\n  fix     {FIX}"
    )


@pytest.mark.parametrize("target", [1.0, 0.5, -2.0, float("nan"), float("inf")])
def test_what_saves_nothing_is_refused(target: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        tpcompile.export("nowhere", out=tmp_path / "out", method="ltp", flops=target)
    assert str(caught.value) == (
        f"the FLOPs ratio asked for is {target:g}\n  fix     give dense over pruned, above 1: 2 for half the FLOPs"
    )


def test_a_model_that_prunes_by_itself_is_refused() -> None:
    subject = subject_of(torch.nn.Linear(3, 3).eval(), {"input": torch.ones(1, 3)}, None, None, None)
    with pytest.raises(UsageError) as caught:
        fit(subject, 2.0, images(1), "noise")
    assert str(caught.value) == (
        "the model drops tokens by itself: no parameter of ours moves how many\n"
        "  fix     leave the FLOPs ratio out, or pass a dense model and a method"
    )


def test_a_recipe_is_fitted_from_python() -> None:
    data = [dict(row.inputs) for row in images(2)]
    found = tpcompile.fit(DIGITS, 1.5, data, method="evit", parameters={"base_keep_rate": 0.7, "drop_loc": [1, 2, 4]})
    assert isinstance(found, Recipe)
    assert (found.method, found.model, found.flops) == ("evit", "tpcompile/digits-vit", None)
    assert found.note is not None
    assert found.note.startswith("Fitted, not learned: base_keep_rate by ")
    assert found.note.endswith(" on 2 samples of the caller (asked for /1.5).")
    pruned = models.prune(models.load(DIGITS).model, found.method, **found.parameters)
    assert pruned.method_parameters == found.parameters
