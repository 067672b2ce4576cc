"""Two token directories as one: classes go by their names, and a fingerprint knows both."""

import numpy as np
import pytest
from labelled import write_tokens

from igpt_fast.batches import fingerprint
from igpt_fast.joined import JoinedTokens


@pytest.fixture
def three(tmp_path):
    """Images of the classes 0 to 2, and two others to test on, of the classes 1 and 2."""
    labels = np.arange(12) % 3, np.r_[1 + np.arange(8) % 2, -1], 1 + np.arange(9) % 2
    return [write_tokens(tmp_path, part, seed, f"part-{seed}") for seed, part in enumerate(labels)]


def test_labels_are_those_of_the_classes_to_learn_from(three):
    train, test, _ = three
    assert test.classes == train.classes[1:] and test.labels.tolist() == [0, 1] * 4 + [-1]
    joined = JoinedTokens(train, test)
    assert joined.classes == train.classes and np.array_equal(joined.labels[:12], train.labels)
    assert joined.labels[12:].tolist() == [1, 2] * 4 + [-1]


def test_other_images_to_test_on_are_other_data(three):
    train, *tests = three
    found = [fingerprint(JoinedTokens(train, test)) for test in tests]
    assert found[0] != found[1] and [each["test"] for each in found] == [fingerprint(t)["tokens"] for t in tests]
    assert {**found[0], "test": None} == {**fingerprint(train), "test": None}
