"""Parity: the law, kept sets, agreement with dense, gates. The engines here are a few lines of numpy."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpcompile.data.load import Sample
from tpcompile.errors import InputError, UsageError
from tpcompile.proof.agreement import cosine, measure, retrieve
from tpcompile.proof.difference import Tolerances, compare_outputs
from tpcompile.proof.keptsets import compare_kept, margins
from tpcompile.proof.parity import validate


@dataclass(frozen=True)
class Kept:
    masks: tuple
    scores: tuple
    lost: tuple = ()

    @property
    def counts(self):
        return tuple(int(mask.sum()) for mask in self.masks)

    @property
    def stored(self):
        return self.counts


def one_site(scores, threshold):
    scores = np.asarray(scores, dtype=np.float64)
    return Kept((scores >= threshold,), (scores,))


class Model:
    """Tokens are scored by their value and kept from 0.5 upwards; the embedding is the kept values' sum and count."""

    def __init__(self, shift=0.0, wobble=0.0, output="sentence_embedding", threshold=0.5):
        self.shift, self.wobble, self.output, self.threshold = shift, wobble, output, threshold

    def kept_each(self, **inputs):
        scores = inputs["input_ids"][0] / 100 + self.wobble
        kept = one_site(scores, self.threshold)
        alive = inputs["input_ids"][0] * kept.masks[0]
        values = [alive.sum() / 100, kept.counts[0] / 10, alive.max() / 100]
        return {self.output: np.array([values], dtype=np.float32) + np.float32(self.shift)}, (kept,)

    def __call__(self, **inputs):
        return self.kept_each(**inputs)[0]


def sample(ids, **fields):
    return Sample(text="", inputs={"input_ids": np.array([ids], dtype=np.int64)}, **fields)


DATA = [sample([10, 60, 90]), sample([20, 80, 70, 30]), sample([99])]
RIGHT = Model()


def run(engine, data=DATA, dense=None, **options):
    return validate(engine, RIGHT.kept_each, dense, data, **options)


def test_equal_passes():
    parity = run(Model())
    assert (parity.verdict, parity.exit_code, parity.flipped) == ("PASSED", 0, 0)
    assert [record.alive for record in parity.samples] == [(2,), (2,), (1,)]
    assert parity.outputs["sentence_embedding"].required == 0
    assert parity.task is None


def test_a_difference_beyond_the_law_fails_with_the_worst_input():
    parity = run(Model(shift=1e-3))
    assert (parity.verdict, parity.exit_code) == ("FAILED", 5)
    assert "3 of 3 samples differ; sample 0: sentence_embedding needs a tolerance of" in parity.reason
    assert parity.worst_inputs["input_ids"] == DATA[parity.worst].inputs["input_ids"].tolist()
    assert run(Model(shift=1e-3), tolerance=2e-3).verdict == "PASSED"


def test_an_output_may_have_a_tolerance_of_its_own():
    parity = run(Model(shift=1e-3), tolerance=Tolerances.of(1e-5, {"sentence_*": 2e-3}))
    assert (parity.verdict, parity.tolerances["sentence_embedding"].atol, parity.tolerance) == ("PASSED", 2e-3, 1e-5)
    with pytest.raises(UsageError, match="no output is called 'logits'"):
        run(Model(), tolerance=Tolerances.of(1e-5, {"logits": 1e-3}))


def test_probes_are_judged_and_count_for_nothing_else():
    odd = sample([60, 70, 80])

    class Odd(Model):
        def kept_each(self, **inputs):
            outputs, kept = super().kept_each(**inputs)
            return {name: value + (inputs["input_ids"].sum() == 210) for name, value in outputs.items()}, kept

    parity = run(Odd(), probes=[[odd], DATA[:1]], dense=RIGHT)
    assert (parity.verdict, len(parity.samples), [record.verdict for record in parity.probes]) == ("FAILED", 3, ["failed", "equal"])
    assert parity.reason.startswith("1 of 2 probes differ; probe 0: sentence_embedding needs")
    assert parity.task.count == 3
    seen = []
    run(Model(), probes=[[odd]], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_margin_of_a_site_is_the_gap_between_kept_and_dropped():
    assert margins(one_site([0.1, 0.5, 0.8], 0.4)) == pytest.approx((0.4 / 0.8,))
    protected = Kept((np.array([True, False, True]),), (np.array([0.1, 0.5, 0.8]),))
    assert np.isnan([*margins(protected), *margins(one_site([0.5, 0.8], 0.4))]).all()
    assert run(Model()).margins == pytest.approx((0.5,))  # the second sample: 0.7 and 0.3, of 0.8


def test_the_law_is_relative_to_large_outputs_only():
    big, small = np.array([[2000.0]]), np.array([[0.001]])
    assert compare_outputs({"y": big + 0.01}, {"y": big})["y"].required == pytest.approx(5e-6)
    assert compare_outputs({"y": small + 1e-4}, {"y": small})["y"].required == pytest.approx(1e-4)
    assert compare_outputs({"y": small + 1e-4}, {"y": small})["y"].max_rel == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [np.array([[math.nan]]), np.array([[math.inf]]), np.zeros((1, 2))])
def test_not_a_number_or_shape_never_passes(bad):
    assert compare_outputs({"y": bad}, {"y": np.zeros((1, 1))})["y"].required == math.inf
    assert compare_outputs({"y": np.zeros((1, 1))}, {"y": bad})["y"].required == math.inf


def test_a_missing_output_fails():
    parity = run(Model(output="other"))
    assert parity.verdict == "FAILED"
    assert "missing" in parity.reason


def test_flip_inside_noise_is_counted_and_left_out():
    parity = run(Model(wobble=-1e-8), [sample([10, 50, 90]), *DATA])
    assert (parity.verdict, parity.flipped) == ("PASSED", 1)
    assert parity.samples[0].verdict == "noise"
    assert [(flip.position, flip.kept_by) for flip in parity.samples[0].flips] == [(1, "reference")]
    assert parity.samples[0].outputs["sentence_embedding"].required > 1e-2  # recorded, though not judged
    assert parity.reason.endswith("left out: 1 with a token within float noise of its threshold")


def test_flip_outside_noise_fails():
    parity = run(Model(wobble=-1e-3), [sample([10, 50, 90]), *DATA])
    assert (parity.verdict, parity.exit_code) == ("FAILED", 5)
    assert "site 0: the engine dropped token 1" in parity.reason


@pytest.mark.parametrize(("free", "verdict", "code"), [(0, "overflow", 0), (1, "failed", 5)])
def test_a_token_is_crowded_out_only_where_no_row_is_free(free, verdict, code):
    class Static(Model):
        def kept_each(self, **inputs):
            outputs, (kept,) = super().kept_each(**inputs)
            if kept.counts[0] < 3:
                return outputs, (Stored(kept.masks, kept.scores, (0,), rows=2),)
            mask = kept.masks[0].copy()
            mask[np.flatnonzero(mask)[0]] = False
            return outputs, (Stored((mask,), kept.scores, (1,), rows=2 + free),)

    @dataclass(frozen=True)
    class Stored(Kept):
        rows: int = 0

        @property
        def stored(self):
            return (self.rows,)

    parity = run(Static(), [*DATA, sample([60, 70, 80])], static=True)
    assert [record.verdict for record in parity.samples] == ["equal", "equal", "equal", verdict]
    assert (parity.overflow, parity.exit_code) == (int(not free), code)


def test_only_flips_is_inconclusive():
    parity = run(Model(wobble=-1e-8), [sample([10, 50, 90])])
    assert (parity.verdict, parity.exit_code) == ("INCONCLUSIVE", 10)


def test_same_scores_and_other_sets_are_no_noise():
    """An engine that drops on a tie where the reference keeps compares differently: that is a bug, however close the score."""
    scores = np.array([0.1, 0.5, 0.9])
    flips, _ = compare_kept(Kept((scores > 0.5,), (scores,)), one_site(scores, 0.5), 3)
    assert [flip.margin for flip in flips] == [math.inf]


def test_unknown_scores_are_no_noise():
    nothing = np.full(3, np.nan)
    truth = Kept((np.array([True, True, False]),), (nothing,))
    flips, heard = compare_kept(Kept((np.array([True, False, False]),), (nothing,)), truth, 3)
    assert [flip.margin for flip in flips] == [math.inf]
    assert heard == 0


def test_only_the_first_differing_site_is_compared():
    low, high = np.array([0.4, 0.6, 0.8]), np.array([0.1, 0.2, 0.3])
    truth = Kept((low >= 0.4, high >= 0.0), (low, high))
    got = Kept((low - 1e-9 >= 0.4, high >= 0.25), (low - 1e-9, high))
    flips, _ = compare_kept(got, truth, 3)
    assert {flip.site for flip in flips} == {0}


@pytest.mark.parametrize(("wrong", "margin"), [(0.49, 0.01 / 0.9), (0.2, 0.3 / 0.9), (np.nan, np.inf)])
def test_a_flip_far_off_is_not_excused_by_a_neighbour_near_the_threshold(wrong, margin):
    truth, got = one_site([0.4999999, 0.5, 0.9], 0.5), one_site([0.4999999, wrong, 0.9], 0.5)
    (flip,), _ = compare_kept(got, truth, 3)
    assert flip.margin == pytest.approx(margin, rel=1e-5)


scores = hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0, 1, width=32))


@settings(deadline=None)
@given(scores, st.floats(0.01, 0.99), st.floats(1e-9, 1e-3), st.integers(0, 2**16))
def test_margin_bounds_the_true_distance(values, threshold, noise, seed):
    """For any scores and noise: equal sets give no flips, a flip's margin is at least its distance to the hidden threshold."""
    noisy = values + np.random.default_rng(seed).uniform(-noise, noise, len(values))
    truth, got = one_site(values, threshold), one_site(noisy, threshold)
    flips, heard = compare_kept(got, truth, len(values))
    scale = values.max() or 1.0
    assert {flip.position for flip in flips} == set(np.flatnonzero((values >= threshold) != (noisy >= threshold)))
    for flip in flips:
        assert abs(values[flip.position] - threshold) / scale <= flip.margin * (1 + 1e-12)
        assert flip.margin <= noise / scale * (1 + 1e-12)
    assert heard <= noise / scale * (1 + 1e-12)


@settings(deadline=None)
@given(scores, st.integers(0, 2**16))
def test_a_random_set_is_not_excused(values, seed):
    """Kept sets that no threshold explains fail unless they are equal."""
    mask = np.random.default_rng(seed).random(len(values)) < 0.5
    assume(mask.any() and not mask.all() and values[mask].min() <= values[~mask].max())
    flips, _ = compare_kept(Kept((mask,), (values,)), one_site(values, 0.5), len(values))
    assert all(flip.margin == math.inf for flip in flips)


def pair_data(*vectors):
    """Queries and targets whose embeddings are given."""
    data, outputs = [], []
    for number, (query, target) in enumerate(vectors):
        for role, vector in (("query", query), ("target", target)):
            data.append(sample([1], pair=number, role=role))
            outputs.append({"sentence_embedding": np.array([vector], dtype=np.float32)})
    return data, outputs


def test_recall_of_pairs():
    data, dense = pair_data(([1, 0], [2, 0.1]), ([0, 1], [0.1, 9]))
    _, pruned = pair_data(([1, 0], [2, 0.1]), ([1, 0.1], [0.1, 9]))
    task = measure(data, dense, pruned)
    assert (task.name, task.count) == ("recall@1", 2)
    assert (task.dense, task.pruned, task.agreement, task.drop) == (1.0, 0.5, 0.5, 0.5)


def test_one_target_is_no_retrieval():
    data, dense = pair_data(([1, 0], [2, 0.1]))
    assert (measure(data, dense, dense).name, measure(data, dense, dense).drop) == ("cosine", None)


def test_accuracy_of_labels_and_agreement_of_logits():
    logits = [{"logits": np.array([row])} for row in ([2.0, 1.0], [0.0, 1.0])]
    flipped = [{"logits": np.array([[2.0, 1.0]])}] * 2
    task = measure([sample([1], label=0), sample([1], label=1)], logits, flipped)
    assert (task.name, task.dense, task.pruned, task.agreement) == ("accuracy", 1.0, 0.5, 0.5)
    task = measure([sample([1]), sample([1])], logits, flipped)
    assert (task.name, task.dense, task.agreement) == ("top-1 agreement", None, 0.5)


def test_no_shared_output_is_usage():
    with pytest.raises(UsageError, match="share no output"):
        measure([sample([1])], [{"a": np.ones((1, 1))}], [{"b": np.ones((1, 1))}])


@settings(deadline=None)
@given(hnp.arrays(np.float64, (7, 4), elements=st.floats(-5, 5)))
def test_everything_retrieves_itself(vectors):
    assume(min(np.linalg.norm(vectors, axis=1)) > 0.1)
    found = retrieve(vectors, vectors * 3)
    assert all(cosine(vectors[i], vectors[j]) == pytest.approx(1) for i, j in enumerate(found))


def test_cosine_of_zero_vectors():
    assert cosine(np.zeros(3), np.zeros(3)) == 1.0
    assert cosine(np.zeros(3), np.ones(3)) == 0.0


def test_gates_against_dense():
    data = [sample(ids, pair=i // 2, role=role) for i, (ids, role) in enumerate([([60], "query"), ([61, 1], "target")] * 2)]
    dense = Model(threshold=0.0)
    parity = run(Model(), data, dense, min_agreement=1.01)
    assert (parity.verdict, parity.exit_code) == ("FAILED", 6)
    assert "agreement with dense (recall@1)" in parity.reason
    assert run(Model(), data, dense, max_drop=0.0).verdict == "PASSED"
    assert run(Model(), data, dense, max_drop=0.0, confidence=0.9).exit_code == 10  # too few cases for an interval
    assert run(Model(), data, dense, max_drop=-0.1).exit_code == 6
    assert run(Model(shift=1), data, dense, max_drop=-0.1).exit_code == 5  # parity first


def test_a_dense_model_that_gives_nan_answers_no_gate():
    dense = Model(shift=math.nan)
    assert run(Model(), dense=dense).verdict == "PASSED"
    parity = run(Model(), dense=dense, min_agreement=0.5)
    assert (parity.verdict, parity.exit_code, parity.task) == ("INCONCLUSIVE", 10, None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": []}, InputError, "no samples"),
        ({"tolerance": 0.0}, UsageError, "tolerance"),
        ({"tolerance": math.nan}, UsageError, "tolerance"),
        ({"tolerance": math.inf}, UsageError, "tolerance"),
        ({"noise": math.inf}, UsageError, "noise"),
        ({"min_agreement": math.nan, "dense": RIGHT}, UsageError, "min_agreement is no number"),
        ({"confidence": math.nan}, UsageError, "confidence"),
        ({"min_agreement": 0.9}, UsageError, "there is none"),
        ({"max_drop": 0.1, "dense": RIGHT}, UsageError, "right answers"),
    ],
)
def test_bad_calls(options, error, message):
    with pytest.raises(error, match=message) as caught:
        run(Model(), **options)
    assert caught.value.fix


def test_json_is_strict():
    document = json.loads(json.dumps(run(Model(output="other"), dense=RIGHT).to_json(), allow_nan=False))
    assert document["outputs"]["sentence_embedding"]["required"] is None
    assert document["verdict"] == "FAILED"


def test_text_has_the_law_and_the_task():
    text = run(Model(), dense=RIGHT).text()
    assert "sentence_embedding" in text
    assert "samples 3: 3 equal, 0 with a token inside float noise of its threshold" in text
    assert "pruned vs dense: cosine, agreement 1.0000 on 3" in text
