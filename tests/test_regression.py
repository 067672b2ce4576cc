"""The classifier on features: parts dealt out evenly, a penalty that the test cannot influence, an honest interval."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info

from igpt_fast import regression
from igpt_fast.regression import classify, count_fits, draw_folds


@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 9))
def test_every_class_is_dealt_out_evenly(count, classes, seed):
    labels, test = np.arange(count * classes) % classes, np.arange(count * classes) < classes
    folds = draw_folds(labels, test, seed)
    assert (folds[test] == -1).all()
    for label in range(classes):
        sizes = np.bincount(folds[(labels == label) & ~test], minlength=5)
        assert sizes.sum() == count - 1 and sizes.max() - sizes.min() <= 1


def test_few_images_are_all_validated_on_and_many_in_part(monkeypatch):
    folds, labels = np.array([-1] * 10 + [0, 1, 2, 3, 4] * 8), np.arange(50) % 2
    features = (2.0 * labels - 1)[:, None]
    features[[10, 15, 21]] *= -1  # two of part 0 and one of part 1 look like the other class
    fits = []
    for few, validation, parts in ((40, 37 / 40, 5), (39, 6 / 8, 1)):
        fits.clear()
        monkeypatch.setattr(regression, "FEW", few)
        found = classify("x", features, labels, folds, fitted=lambda: fits.append(1))
        assert found.validation == validation and found.accuracy == 1
        assert len(fits) == len(regression.STRENGTHS) * parts + 1 == count_fits(folds)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_accuracy_is_that_of_scikit_learns_regression_with_the_strength_that_validates_best(classes):
    random = np.random.default_rng(classes)
    labels = np.arange(240) % classes
    features = (np.eye(classes, 8)[labels] + random.normal(size=(240, 8))).astype(np.float32) * np.float32(30) + 7
    folds = draw_folds(labels, np.arange(240) >= 180, 0)

    def accuracy(learn, ask, strength):
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        return regression.fit(features[learn], labels[learn]).score(features[ask], labels[ask])

    before = features.copy()
    found = classify("x", features, labels, folds)
    parts = [[(folds >= 0) & (folds != part), folds == part] for part in range(5)]
    sizes = [ask.sum() for _, ask in parts]
    validated = [
        np.average([accuracy(*part, strength) for part in parts], weights=sizes) for strength in regression.STRENGTHS
    ]
    assert found.strength == regression.STRENGTHS[int(np.argmax(validated))]
    assert found.validation == pytest.approx(max(validated), abs=1e-9)
    assert found.accuracy == accuracy(folds >= 0, folds < 0, found.strength)
    np.testing.assert_array_equal(features, before)  # standardised in copies


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


def test_small_problems_keep_to_one_thread_and_give_the_others_back(monkeypatch):
    def threads():
        return {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}

    seen = []
    before = threads()
    for small in (True, False):
        monkeypatch.setattr(regression, "SMALL", 10**9 if small else 0)
        features = np.zeros((50, 1), np.float32)
        classify("x", features, np.arange(50) % 2, np.arange(50) % 6 - 1, fitted=lambda: seen.append(threads()))
        assert all(found == (dict.fromkeys(before, 1) if small else before) for found in seen) and seen
        seen.clear()
    assert threads() == before


def test_who_learns_nothing_answers_the_most_frequent_class():
    labels = (np.arange(200) % 5 == 0).astype(np.int64)
    folds = draw_folds(labels, np.arange(200) < 60, 0)
    found = classify("x", np.zeros((200, 3), np.float32), labels, folds, layer=2)
    assert (found.accuracy, found.balanced, found.layer) == (0.8, 0.5, 2)
    assert str(found) == f"80.0 % (95 % interval {100 * found.low:.1f} – {100 * found.high:.1f} %)"


def test_groups_that_hold_a_class_alone_are_not_kept_whole(caplog):
    """Without the one group of a class there would be nothing to tell apart."""
    groups, random = np.arange(120) // 10, np.random.default_rng(0)
    labels = (groups == 7).astype(np.int64)
    features = (labels[:, None] + random.normal(0, 0.1, (120, 2))).astype(np.float32)
    folds = draw_folds(labels, groups == 0, 0, groups)
    assert "there are too few groups to choose the penalty by whole ones" in caplog.text
    assert (folds[groups == 0] == -1).all() and set(folds[labels == 1]) == {0, 1, 2, 3, 4}
    assert classify("x", features, labels, folds).validation == 1
