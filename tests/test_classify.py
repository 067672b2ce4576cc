"""The classifier on features: parts dealt out evenly, a penalty that the test cannot influence, an honest interval."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from igpt_fast import classify as classifier
from igpt_fast.classify import classify, draw_folds, score


@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 9))
def test_every_class_is_dealt_out_evenly(count, classes, seed):
    labels, test = np.arange(count * classes) % classes, np.arange(count * classes) < classes
    folds = draw_folds(labels, test, seed)
    assert (folds[test] == -1).all()
    for label in range(classes):
        sizes = np.bincount(folds[(labels == label) & ~test], minlength=5)
        assert sizes.sum() == count - 1 and sizes.max() - sizes.min() <= 1


def test_few_images_are_all_validated_on_and_many_in_part(monkeypatch):
    asked = []
    monkeypatch.setattr(
        classifier, "_right", lambda x, y, fit, ask, c: (asked.append((fit.sum(), ask.sum())) or int(c == 0.1), True)
    )
    folds = np.array([-1] * 10 + [0, 1, 2, 3, 4] * 8)
    found = classify("x", np.zeros((50, 1)), np.arange(50) % 2, folds)
    assert asked == [(32, 8)] * 5 * len(classifier.STRENGTHS) + [(40, 10)]
    assert found.strength == 0.1 and found.validation == 5 / 40
    asked.clear()
    monkeypatch.setattr(classifier, "FEW", 39)
    assert classify("x", np.zeros((50, 1)), np.arange(50) % 2, folds).validation == 1 / 8
    assert asked == [(32, 8)] * len(classifier.STRENGTHS) + [(40, 10)]


def test_the_test_images_have_no_say_in_the_penalty():
    random = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = (np.eye(3)[labels] + random.normal(size=(90, 3))).astype(np.float32)
    test = np.arange(90) >= 70
    folds = draw_folds(labels, test, 0)
    found = classify("x", features, labels, folds)
    features[test], labels[test] = -features[test], 0
    other = classify("x", features, labels, folds)
    assert (found.strength, found.validation) == (other.strength, other.validation)
    assert found.accuracy != other.accuracy and found.converged


def test_wilsons_interval():
    found = score("x", 8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_accuracy_and_narrows(count, data):
    right = data.draw(st.integers(0, count))
    found, more = score("x", right, count), score("x", 4 * right, 4 * count)
    assert 0 <= found.low <= found.accuracy <= found.high <= 1
    assert more.high - more.low < found.high - found.low


def test_small_problems_keep_to_one_thread_and_give_the_others_back(monkeypatch):
    def threads():
        return {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}

    seen = []
    monkeypatch.setattr(classifier, "_right", lambda *_: (seen.append(threads()) or 1, True))
    before = threads()
    for small in (True, False):
        monkeypatch.setattr(classifier, "SMALL", 10**9 if small else 0)
        classify("x", np.zeros((50, 1)), np.arange(50) % 2, np.arange(50) % 6 - 1)
        assert all(found == (dict.fromkeys(before, 1) if small else before) for found in seen) and seen
        seen.clear()
    assert threads() == before
