"""Every measure of a model has its interval by groups where images have some."""

import json

import numpy as np
import pytest
from labelled import FAST, GREYS, PALETTE, SIZE, make

from igpt_fast import intervals
from igpt_fast import probe as probing
from igpt_fast.checkpoint import load_checkpoint, save_checkpoint
from igpt_fast.data import tokenize
from igpt_fast.errors import InputError
from igpt_fast.evaluate import evaluate
from igpt_fast.finetune import finetune
from igpt_fast.labels import choose_labelled, draw_validation
from igpt_fast.predict import predict
from igpt_fast.probe import probe
from igpt_fast.regression import draw_folds

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """120 images of two classes: twelve of a group are nearly the same one, and of one class."""
    folder, random = tmp_path_factory.mktemp("grouped"), np.random.default_rng(0)
    groups, labels = np.arange(120) // 12, np.arange(120) // 12 % 2
    greys = random.integers(0, 9, (10, *SIZE))[groups]
    greys = np.where(random.random(greys.shape) < 0.05, random.integers(0, 9, greys.shape), greys)
    images = np.repeat(GREYS[greys][..., None], 3, axis=-1)
    np.savez(folder / "images.npz", images=images, labels=labels, groups=groups)
    return tokenize(folder / "images.npz", PALETTE, folder / "tokens", SIZE, resize="none", workers=0)


def test_likelihoods(grouped):
    model = make()
    model.wtet.data.normal_(0, 0.3)
    found = evaluate(model, grouped)
    each = np.arange(120) // 12
    assert found.high - found.nats_per_pixel == pytest.approx(intervals.margin_of_mean(found.per_image, each))
    assert intervals.margin_of_mean(found.per_image, each) > 1.5 * intervals.margin_of_mean(found.per_image)
    assert evaluate(model, grouped, np.arange(12)).low is None  # of one group nothing follows for others


def test_the_most_frequent_class(grouped):
    found = probe(make(), grouped, layers=[0], test_fraction=0.4)
    groups, labels = found.chosen.groups[found.chosen.test], found.chosen.labels[found.chosen.test]
    right = labels == np.bincount(labels).argmax()
    assert (found.majority.low, found.majority.high) == intervals.of_share(right, groups) != intervals.of_share(right)


def test_a_probe_takes_groups_as_independent_and_keeps_them_whole_in_validation(grouped, monkeypatch):
    drawn, folds = [], []
    monkeypatch.setattr(probing, "draw_folds", lambda *given: folds.append(draw_folds(*given)) or folds[-1])
    monkeypatch.setattr(intervals, "of_share", lambda *given: drawn.append(given) or (0.0, 1.0))
    found = probe(make(), grouped, layers=[0, 1], test_fraction=0.4)
    groups = found.chosen.groups
    assert len(drawn) == 4 and all(np.array_equal(given[1], groups[found.chosen.test]) for given in drawn)
    assert found.test_groups == len(np.unique(groups[found.chosen.test])) < found.test
    assert all(len(np.unique(folds[0][groups == group])) == 1 for group in np.unique(groups))
    learn = np.flatnonzero(~found.chosen.test)
    ways = {tuple(draw_folds(found.chosen.labels, found.chosen.test, seed, groups)[learn]) for seed in range(9)}
    assert len(ways) > 1, "the seed draws them"


def test_fine_tuned_and_classified(grouped, igpt, tmp_path):
    result = finetune(make(), grouped, tmp_path / "run", **{**FAST, "test_fraction": 0.4}, device="cpu")
    test = result.chosen.indices[result.chosen.test]
    right = predict(result.model, grouped, test).best == result.chosen.labels[result.chosen.test]
    low, high = intervals.of_share(right, test // 12)
    assert (result.test.low, result.test.high) == (low, high) != intervals.of_share(right)
    code, printed, _ = igpt("classify", tmp_path / "run", grouped.path, "-o", tmp_path / "a.csv", "--json")
    found = json.loads(printed)
    right = predict(result.model, grouped).best == grouped.labels
    assert code == 0 and (found["low"], found["high"]) == intervals.of_share(right, np.arange(120) // 12)


def test_validation_that_would_change_ends_a_resumed_run(grouped, tmp_path, monkeypatch):
    options = {**FAST, "steps": 7, "val_fraction": 0.3}
    finetune(make(), grouped, tmp_path / "run", **options, device="cpu")
    state = load_checkpoint(tmp_path / "run").state["fixed"]
    assert len(state["validation images"]) == 16
    monkeypatch.setattr(
        "igpt_fast.finetune.draw_validation", lambda chosen, *rest: np.roll(draw_validation(chosen, *rest), 1)
    )
    with pytest.raises(InputError, match="--resume with another validation images"):
        finetune(None, grouped, tmp_path / "run", resume=True, **{**options, "steps": 9}, device="cpu")


def test_groups_of_the_test_alone_leave_validation_as_it_is(grouped):
    chosen = choose_labelled(grouped, 0.4)
    alone = np.where(chosen.test, chosen.groups, 1000 + np.arange(len(chosen.groups)))
    plain, only = (type(chosen)(**{**vars(chosen), "groups": groups}) for groups in (None, alone))
    assert np.array_equal(draw_validation(plain, 0.3, 0), draw_validation(only, 0.3, 0))
    assert not np.array_equal(draw_validation(plain, 0.3, 0), draw_validation(chosen, 0.3, 0))


def test_the_share_that_was_held_out_is_in_the_json(grouped, igpt, tmp_path):
    save_checkpoint(tmp_path / "run", 3, make(), PALETTE)
    for words, wanted in (((), None), (("--split", "val"), 0.1), (("--split", "train", "--val-fraction", "0.4"), 0.4)):
        found = json.loads(igpt("eval", tmp_path / "run", grouped.path, "--json", *words)[1])
        assert found["val_fraction"] == wanted
