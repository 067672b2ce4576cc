"""The classifier by SGD: as good as L-BFGS where both can be asked, chosen without the test, never all in memory."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import make, write_tokens

from igpt_fast import probe as module
from igpt_fast import regression, sgd
from igpt_fast.errors import InputError
from igpt_fast.probe import probe
from igpt_fast.regression import draw_folds


def clouds(count: int, classes: int, width: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of classes that lie around different centres; the test is every fourth image."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    centres = random.normal(0, 1, (classes, width))
    return (centres[labels] + random.normal(0, spread, (count, width))).astype(np.float32), labels


def folds_of(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    return draw_folds(labels, np.arange(len(labels)) % 4 == 0, seed)


@pytest.mark.parametrize(("classes", "spread"), [(2, 3.0), (7, 1.5)])
def test_as_good_as_lbfgs(classes, spread):
    features, labels = clouds(2400, classes, 20, spread)
    features[:, 3] = 7.0  # never changes
    features[:, 5] = features[:, 5] * 100 + 3000  # in other units
    folds = folds_of(labels)
    ours = sgd.classify("x", features.__getitem__, labels, folds, epochs=30)
    theirs = regression.classify("x", features, labels, folds)
    assert abs(ours.validation - theirs.validation) < 0.03
    assert 1 / classes + 0.2 < theirs.accuracy < 0.98
    assert abs(ours.accuracy - theirs.accuracy) < 0.02 and ours.rate in sgd.RATES and ours.strength is None
    assert ours.converged and ours.low < ours.accuracy < ours.high


def test_it_learns_what_torch_learns(monkeypatch):
    """The last classifier is that of torch's own loop with the rate that was chosen."""
    features, labels = clouds(1600, 7, 6, 2.0)
    folds = folds_of(labels)
    monkeypatch.setattr(sgd, "RATES", (0.3,))  # with which momentum matters
    found = sgd.classify("x", features.__getitem__, labels, folds, epochs=3, seed=5)
    learned, asked = np.flatnonzero(folds >= 0), np.flatnonzero(folds < 0)
    x = torch.from_numpy(features)
    x = (x - x[learned].mean(0)) / x[learned].std(0, correction=0)
    head = torch.nn.Linear(6, 7)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), found.rate, momentum=0.9)
    random, step, batches = np.random.default_rng([5, 4]), 0, -(-len(learned) // 256)
    for _ in range(3):
        for rows in np.array_split(random.permutation(learned), batches):
            optimizer.param_groups[0]["lr"] = found.rate * (1 + np.cos(np.pi * step / (3 * batches))) / 2
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[rows]), torch.from_numpy(labels[rows])).backward()
            optimizer.step()
            step += 1
    assert found.accuracy == (head(x[asked]).argmax(1).numpy() == labels[asked]).mean()


def test_the_test_has_no_say_and_the_seed_decides():
    features, labels = clouds(900, 3, 8, 2.0)
    folds, state = folds_of(labels), torch.get_rng_state()
    found, again, other = (sgd.classify("x", features.__getitem__, labels, folds, epochs=4, seed=s) for s in (0, 0, 1))
    assert found == again and (found.accuracy, found.validation) != (other.accuracy, other.validation)
    assert torch.equal(state, torch.get_rng_state())
    test = folds < 0
    features[test], labels[test] = -features[test], 0
    turned = sgd.classify("x", features.__getitem__, labels, folds, epochs=4)
    assert (found.rate, found.validation) == (turned.rate, turned.validation) and found.accuracy != turned.accuracy


def test_a_rate_that_is_too_high_is_not_taken_and_said_where_nothing_else_is_tried(monkeypatch):
    base, labels = clouds(600, 2, 1, 0.5)
    features = base.repeat(200, 1) + np.random.default_rng(1).normal(0, 1e-3, (600, 200)).astype(np.float32)
    folds = folds_of(labels)
    monkeypatch.setattr(sgd, "RATES", (0.01, 1e38))
    found = sgd.classify("x", features.__getitem__, labels, folds, epochs=3)
    assert found.rate == 0.01 and found.converged
    monkeypatch.setattr(sgd, "RATES", (1e38,))
    lost = sgd.classify("x", features.__getitem__, labels, folds, epochs=3)
    assert not lost.converged and lost.accuracy == 0


@settings(deadline=None, max_examples=15)
@given(st.integers(12, 700), st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_each_image_is_learned_from_once_an_epoch_and_never_many_at_once(count, width, epochs, seed):
    labels = np.arange(count) % 2
    features = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    folds, asked, passes = draw_folds(labels, np.arange(count) % 5 == 0, seed), [], []

    def fetch(rows):
        asked.append(rows)
        return features[rows]

    sgd.classify("x", fetch, labels, folds, epochs=epochs, seed=seed, fitted=lambda: passes.append(1))
    assert len(passes) == 2 * epochs and max(map(len, asked)) <= max(256, sgd.AT_ONCE)
    times = np.bincount(np.concatenate(asked), minlength=count)
    # Each fit looks at all once for the mean, and at the first again.
    learned = np.flatnonzero(folds >= 0)
    assert (times[folds < 0] == 1).all()
    firsts = np.bincount([learned[0], np.flatnonzero(folds > 0)[0]], minlength=count)
    assert ((times - firsts)[folds > 0] == 2 * (epochs + 1)).all()
    assert ((times - firsts)[folds == 0] == epochs + 2).all()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("sgd"), np.arange(240) * 7 % 3)


@pytest.fixture(scope="module")
def model():
    return make()


def test_a_probe_by_sgd(model, dataset):
    exact, found = (probe(model, dataset, joined=True, solver=solver, epochs=20) for solver in ("lbfgs", "sgd"))
    assert (found.solver, found.epochs, exact.solver, exact.epochs) == ("sgd", 20, "lbfgs", None)
    for ours, theirs in zip((*found.layers, found.joined), (*exact.layers, exact.joined), strict=True):
        assert abs(ours.accuracy - theirs.accuracy) <= 0.1 and ours.accuracy > found.majority.high
    assert found.majority == exact.majority and found.pixels.rate is not None
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "adam"}, "solver is 'adam'; use lbfgs or sgd"),
        ({"solver": "sgd", "epochs": 0}, "epochs is 0; use at least 1"),
    ],
)
def test_bad_options(model, dataset, options, message):
    with pytest.raises(InputError, match=message):
        probe(model, dataset, **options)


def test_one_image_that_is_not_finite_is_enough_to_say_so(monkeypatch):
    features, labels = clouds(600, 2, 3, 0.5)
    folds = folds_of(labels)
    features[0] = np.inf  # which is tested, in the first of two parts
    monkeypatch.setattr(sgd, "AT_ONCE", 149)
    assert not sgd.classify("x", features.__getitem__, labels, folds, epochs=1).converged


def test_batches_have_at_most_so_many(monkeypatch):
    (features, labels), lengths = clouds(600, 2, 3, 0.5), []
    monkeypatch.setattr(sgd, "AT_ONCE", 256)
    sgd.classify("x", lambda rows: lengths.append(len(rows)) or features[rows], labels, folds_of(labels), epochs=1)
    assert max(lengths) <= 256


def test_groups_widen_the_interval():
    features, labels = clouds(300, 3, 6, 1.5)
    folds = folds_of(labels)
    groups = np.flatnonzero(folds < 0) // 30
    alone, by = (sgd.classify("x", features.__getitem__, labels, folds, groups=g, epochs=3) for g in (None, groups))
    assert alone.accuracy == by.accuracy and by.high - by.low > alone.high - alone.low


def test_moments_are_summed_in_double():
    values = np.random.default_rng(0).normal(0, 1e25, (5000, 1)).astype(np.float32)
    assert sgd._moments(values.__getitem__, np.arange(5000))[1] == pytest.approx(values.astype(float).std(), rel=1e-5)


def test_what_a_probe_asks_of_it(model, dataset, monkeypatch, capsys):
    """No scikit-learn, no room for what L-BFGS reads, its own seed, and twice as many epochs."""
    monkeypatch.setattr(module, "load_sklearn", None)
    monkeypatch.setattr(module, "memory_of", lambda device: 240 * 4 * 24)
    real, seeds = sgd.classify, []
    monkeypatch.setattr(sgd, "classify", lambda *a, seed=0, **k: seeds.append(seed) or real(*a, seed=seed, **k))
    probe(model, dataset, layers=[1], solver="sgd", epochs=1, seed=7)
    assert seeds == [7, 7] and "4/4 epochs" in capsys.readouterr().err


def test_who_learns_nothing_answers_the_most_frequent_class():
    """Though the caller has turned gradients off."""
    labels = (np.arange(200) % 5 == 0).astype(np.int64)
    folds = draw_folds(labels, np.arange(200) < 60, 0)
    with torch.no_grad():
        found = sgd.classify("x", np.zeros((200, 3), np.float32).__getitem__, labels, folds, layer=2, epochs=3)
    assert (found.accuracy, found.balanced, found.layer) == (0.8, 0.5, 2)


def test_a_class_may_be_in_one_part_alone():
    """As where whole groups are dealt out: while the rate is chosen, nobody has learned it."""
    labels, folds = np.arange(90) % 3, np.arange(90) // 3 % 6 - 1
    folds[(labels == 0) & (folds > 0)] = 0
    found = sgd.classify("x", np.eye(3, dtype=np.float32)[labels].__getitem__, labels, folds, epochs=5)
    assert found.accuracy == 1 and found.validation < 0.5
