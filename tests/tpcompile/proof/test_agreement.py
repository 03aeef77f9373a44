"""Dense against pruned where every token has an answer."""

from dataclasses import replace

import numpy as np
import pytest

from tpcompile.data.samples import Sample
from tpcompile.errors import InputError
from tpcompile.proof.agreement import measure


def sample(*mask):
    return Sample("", {"input_ids": np.ones((1, len(mask)), dtype=np.int64), "attention_mask": np.array([mask])})


def one_hot(*classes):
    return np.eye(3)[list(classes)][None]


def test_tokens_with_padding_left_out():
    samples = [sample(1, 1, 1, 0), sample(1, 1)]
    dense = [{"logits": one_hot(0, 1, 2, 0)}, {"logits": one_hot(1, 1)}]
    pruned = [{"logits": one_hot(0, 1, 0, 2)}, {"logits": one_hot(1, 1)}]
    task = measure(samples, dense, pruned)
    assert (task.name, task.count, task.agreement) == ("token agreement", 5, 0.8)
    assert (task.dense, task.pruned, task.drop) == (None, None, None)


def test_tokens_without_a_mask_all_count():
    image = Sample("", {"pixel_values": np.ones((1, 1, 4, 4))}, tokens=3)
    task = measure([image], [{"logits": one_hot(0, 1, 2)}], [{"logits": one_hot(0, 1, 0)}])
    assert (task.count, task.agreement) == (3, pytest.approx(2 / 3))


def test_a_span_agrees_with_both_ends():
    samples = [sample(1, 1, 1, 0)] * 3

    def ends(first, last):
        return {"start_logits": np.eye(4)[[first]], "end_logits": np.eye(4)[[last]]}

    dense = [ends(0, 1), ends(0, 2), ends(1, 1)]
    pruned = [ends(0, 1), ends(0, 1), ends(2, 1)]
    task = measure(samples, dense, pruned)
    assert (task.name, task.count, task.agreement) == ("span agreement", 3, pytest.approx(1 / 3))
    padded = [{name: value + 5 * np.eye(4)[[3]] for name, value in row.items()} for row in dense]
    assert measure(samples, dense, padded).agreement == 1.0


def test_one_logit_is_a_number_and_no_class():
    dense, pruned = ([{"logits": np.array([[value]])} for value in side] for side in ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0)))
    task = measure([sample(1)] * 3, dense, pruned)
    assert (task.name, task.dense, task.agreement) == ("correlation", None, pytest.approx(-1))
    task = measure([replace(sample(1), label=i) for i in range(3)], dense, pruned)
    assert (task.name, task.drop, task.lost) == ("pearson", pytest.approx(2), None)


def test_a_label_that_the_model_has_no_class_for():
    outputs = [{"logits": np.array([[0.0, 1.0]])}]
    with pytest.raises(InputError, match="a label is 2, the model has classes 0 to 1"):
        measure([replace(sample(1), label=2)], outputs, outputs)


def test_hidden_states_by_token():
    samples = [sample(1, 1, 0)]
    dense = [{"last_hidden_state": np.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])}]
    pruned = [{"last_hidden_state": np.array([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])}]
    task = measure(samples, dense, pruned)
    assert (task.name, task.count, task.agreement) == ("token cosine", 2, 0.5)


def test_a_sentence_comes_before_its_tokens():
    outputs = [{"last_hidden_state": np.ones((1, 2, 2)), "pooler_output": np.ones((1, 2))}]
    assert measure([sample(1, 1)], outputs, outputs).name == "cosine"
