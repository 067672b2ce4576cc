"""Two token directories as one: classes go by their names, and a fingerprint knows both."""

import logging
import os
import shutil

import numpy as np
import pytest
import torch
from labelled import COLORS, PALETTE, SIZE, write_tokens

from igpt_fast import Config, ImageGPT, InputError, Palette
from igpt_fast.batches import fingerprint
from igpt_fast.data import tokenize
from igpt_fast.evaluate import evaluate
from igpt_fast.finetune import finetune as fit
from igpt_fast.joined import JoinedTokens
from igpt_fast.predict import predict
from igpt_fast.probe import probe
from igpt_fast.train import train as teach


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


def test_tokens_of_other_colours_are_refused(three, tmp_path):
    """By all who read them with a model whose palette is known."""
    train, test, _ = three
    torch.manual_seed(0)
    model = ImageGPT(Config(layers=1, width=8, heads=1, colors=COLORS, size=SIZE, classes=3))
    headless = ImageGPT(Config(layers=1, width=8, heads=1, colors=COLORS, size=SIZE))
    calls = [
        lambda: evaluate(headless, test),
        lambda: predict(model, test),
        lambda: probe(headless, JoinedTokens(train, test), layers=[0]),
        lambda: fit(headless, train, tmp_path / "ft", steps=1, batch=4, val_fraction=0.2),
        lambda: teach(train, tmp_path / "run", init=headless, steps=1, batch=4),
    ]
    for each in (model, headless):
        each.palette = Palette(np.asarray(PALETTE.centers)[::-1].copy())
    for call in calls:
        with pytest.raises(InputError, match="its colours are others than the model's"):
            call()
    for known in (PALETTE, None):
        model.palette = headless.palette = known
        assert all(call() for call in calls[:3])


def test_tokens_of_two_palettes_are_not_joined(three, tmp_path):
    other = Palette(np.asarray(PALETTE.centers)[::-1].copy())
    test = tokenize(tmp_path / "part-1.npz", other, tmp_path / "other", SIZE, resize="none", workers=0)
    with pytest.raises(InputError, match="another size or palette"):
        JoinedTokens(three[0], test)


def test_the_same_images_are_found_by_what_they_are(three, tmp_path, caplog):
    train, test, _ = three
    shutil.copy(tmp_path / "part-0.npz", tmp_path / "again.npz")
    os.utime(tmp_path / "again.npz", (1, 1))
    again = tokenize(tmp_path / "again.npz", PALETTE, tmp_path / "again", SIZE, resize="none", workers=0)
    with pytest.raises(InputError, match="holds the images that are learned from"):
        JoinedTokens(train, again)
    with np.load(tmp_path / "part-0.npz") as learned, np.load(tmp_path / "part-1.npz") as others:
        images = np.concatenate([others["images"], learned["images"][:2]])
    np.savez(tmp_path / "some.npz", images=images, labels=np.arange(len(images)) % 2 + 1)
    some = tokenize(tmp_path / "some.npz", PALETTE, tmp_path / "some", SIZE, resize="none", workers=0)
    with caplog.at_level(logging.WARNING, "igpt_fast"):
        JoinedTokens(train, test)
        assert not caplog.records
        JoinedTokens(train, some)
    assert "2 of 11 images are learned from too" in caplog.text


def test_images_that_were_read_in_another_way_are_told(three, tmp_path, caplog):
    other = tokenize(tmp_path / "part-1.npz", PALETTE, tmp_path / "other", SIZE, resize="hf", workers=0)
    with caplog.at_level(logging.WARNING, "igpt_fast"):
        JoinedTokens(three[0], other)
    assert f"was made with --resize hf, {three[0].origin} with none" in caplog.text
