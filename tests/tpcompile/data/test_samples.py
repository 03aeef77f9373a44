"""Samples gathered into batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcompile.data.samples import Sample, batches, collate
from tpcompile.errors import UsageError


def text(length):
    return Sample("", {"input_ids": np.arange(1, length + 1)[None], "attention_mask": np.ones((1, length), dtype=np.int64)})


def image(value, side=2):
    return Sample("", {"pixel_values": np.full((1, 3, side, side), value, dtype=np.float32)}, tokens=17)


def test_lengths():
    assert (text(5).length, image(0).length) == (5, 17)


def test_texts_are_padded_to_the_longest():
    batch = collate([text(2), text(4)], {"input_ids": 9})
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].dtype == np.int64


def test_images_are_stacked():
    batch = collate([image(0), image(1)])
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((2, 3, 2, 2), np.float32)
    assert batch["pixel_values"][1].min() == 1


@pytest.mark.parametrize(
    ("samples", "message", "fix"),
    [
        ([], "a batch needs a sample", "pass one or more samples"),
        (
            [text(2), image(0)],
            "a batch of samples with inputs input_ids, attention_mask and pixel_values",
            "batch samples of one kind",
        ),
        ([image(0), image(0, 3)], "pixel_values has samples of shape [3, 2, 2] and [3, 3, 3]", "batch samples of one shape"),
    ],
)
def test_what_does_not_belong_together(samples, message, fix):
    with pytest.raises(UsageError) as caught:
        collate(samples)
    assert (caught.value.message, caught.value.fix) == (message, fix)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9), st.booleans())
def test_batches_hold_every_sample_once(lengths, size, by_length):
    samples = [text(length) for length in lengths]
    groups = list(batches(samples, size, by_length=by_length))
    order = [index for group in groups for index in group]
    assert sorted(order) == list(range(len(samples)))
    assert all(len(group) == size for group in groups[:-1])
    assert order == (sorted(order, key=lambda index: (lengths[index], index)) if by_length else sorted(order))


def test_a_batch_of_nothing():
    with pytest.raises(UsageError) as caught:
        batches([text(1)], 0)
    assert (caught.value.message, caught.value.fix) == ("the batch size is 0", "give 1 or more")
