"""Who learns, who is held out and who is tested: no image twice, every class on each side, the same for a seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled import write_tokens

from igpt_fast.errors import InputError
from igpt_fast.labels import Labelled, choose_labelled, draw_validation, warn_of_few


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    labels = np.r_[np.arange(200) * 7 % 4, [-1] * 6, [4, 5, 5]]
    return write_tokens(tmp_path_factory.mktemp("labels"), labels)


def chosen_from(labels: np.ndarray, test: np.ndarray, classes: int, groups: np.ndarray | None = None) -> Labelled:
    return Labelled(np.arange(len(labels)), labels, test, tuple(map(str, range(classes))), {}, 0, groups)


@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_validation_takes_its_share_of_every_class(counts, fraction, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    chosen = chosen_from(labels, np.zeros(len(labels), bool), len(counts))
    held_out = draw_validation(chosen, fraction, seed)
    for label, count in enumerate(counts):
        mine = held_out[labels == label].sum()
        assert 1 <= mine < count and abs(mine - fraction * count) <= 1
    assert np.array_equal(held_out, draw_validation(chosen, fraction, seed))


def test_validation_never_takes_a_test_image_and_none_for_a_fraction_of_0():
    labels, test = np.arange(60) % 2, np.arange(60) % 3 == 0
    chosen = chosen_from(labels, test, 2)
    held_out = draw_validation(chosen, 0.5, 1)
    assert held_out.sum() == 20 and not (held_out & test).any()
    assert not np.array_equal(held_out, draw_validation(chosen, 0.5, 2))
    assert not draw_validation(chosen, 0.0, 1).any()


def test_classes_are_numbered_without_gaps_and_small_ones_named(dataset):
    chosen = choose_labelled(dataset, 0.2)
    assert chosen.classes == tuple(dataset.classes[:4]) and set(chosen.left_out) == set(dataset.classes[4:])
    assert chosen.unlabelled == 6 and np.array_equal(chosen.labels, dataset.labels[chosen.indices])
    assert np.array_equal(chosen.indices[chosen.test], np.intersect1d(dataset.split("val", 0.2), np.arange(200)))
    untested = choose_labelled(dataset, 0.0, tests=False)
    assert untested.classes == (*dataset.classes[:4], dataset.classes[5]) and not untested.test.any()
    assert untested.labels[-2:].tolist() == [4, 4], "class 5 follows class 3 where class 4 is left out"


@pytest.mark.parametrize("few", [2, 5, 1000])
def test_few_of_each_class_are_drawn_by_the_seed(dataset, few):
    some, again, other = (choose_labelled(dataset, 0.2, per_class=few, seed=seed) for seed in (1, 1, 2))
    everyone = choose_labelled(dataset, 0.2)
    counts, there = (np.bincount(chosen.labels[~chosen.test]) for chosen in (some, everyone))
    assert np.array_equal(counts, np.minimum(few, there))
    assert np.array_equal(some.indices, again.indices)
    assert few == 1000 or not np.array_equal(some.indices, other.indices)
    assert np.array_equal(some.indices[some.test], other.indices[other.test]), "all are tested on the same images"


def test_a_limit_draws_by_the_seed(dataset):
    some, again, other = (choose_labelled(dataset, 0.2, limit=40, seed=seed).indices for seed in (1, 1, 2))
    assert np.array_equal(some, again) and not np.array_equal(some, other)


def test_one_class_is_too_few(tmp_path):
    one = write_tokens(tmp_path, [0] * 9)
    with pytest.raises(InputError, match="only one class has images among 9; it takes two classes"):
        choose_labelled(one, 0.2)
    two = write_tokens(tmp_path, [0] * 9 + [1], name="two")
    with pytest.raises(InputError, match=r"of 2 classes 1 have enough images among 10; it takes two"):
        choose_labelled(two, 0.0, tests=False)


def test_classes_with_fewer_labels_than_were_asked_for_are_named(dataset, caplog):
    chosen = choose_labelled(dataset, 0.2, per_class=42)
    warn_of_few(chosen, 42)
    learned = np.bincount(chosen.labels[~chosen.test])
    short = [f"{chosen.classes[k]} has {count}" for k, count in enumerate(learned) if count < 42]
    assert 0 < len(short) < len(learned) and f"to learn from: {', '.join(short)}; all are used" in caplog.text
    caplog.clear()
    warn_of_few(choose_labelled(dataset, 0.2, per_class=2), 2)
    warn_of_few(choose_labelled(dataset, 0.2), None)
    assert not caplog.text
