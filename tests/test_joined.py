"""Two token directories as one: classes go by their names, and a fingerprint knows both."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from labelled import COLORS, PALETTE, SIZE, write_tokens

from igpt_fast import Config, ImageGPT, InputError, Palette
from igpt_fast import joined as module
from igpt_fast.batches import fingerprint
from igpt_fast.data import tokenize
from igpt_fast.evaluate import evaluate
from igpt_fast.finetune import finetune as fit
from igpt_fast.joined import JoinedTokens, refuse_misfit
from igpt_fast.predict import predict
from igpt_fast.probe import probe
from igpt_fast.tokens import TokenDataset
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


def test_tokens_of_two_sizes_are_not_joined(three, tmp_path):
    test = tokenize(tmp_path / "part-1.npz", PALETTE, tmp_path / "other", (5, 4), workers=0)
    with pytest.raises(InputError, match="another size or palette"):
        JoinedTokens(three[0], test)


def test_classes_that_nothing_was_learned_of_are_refused(three):
    train, test, _ = three
    with pytest.raises(InputError, match=r"has classes that .*part-1 lacks: 0"):
        JoinedTokens(test, train)


def joined_npz(tmp_path, name, images, labels, **more):
    np.savez(tmp_path / f"{name}.npz", images=images, labels=labels, **more)
    return tokenize(tmp_path / f"{name}.npz", PALETTE, tmp_path / name, SIZE, resize="none", workers=0)


def test_more_or_fewer_images_than_those_learned_from_are_told_not_refused(three, tmp_path, caplog):
    """Each image of the test counts, those that it holds twice too."""
    train = three[0]
    with np.load(tmp_path / "part-0.npz") as learned, np.load(tmp_path / "part-1.npz") as others:
        images, labels, more = learned["images"], learned["labels"], others["images"]
    few = joined_npz(tmp_path, "few", images[[3, 1, 3]], labels[[3, 1, 3]])
    many = joined_npz(tmp_path, "many", np.concatenate([more[:2], images]), np.r_[1, 2, labels])
    with caplog.at_level(logging.WARNING, "igpt_fast"):
        JoinedTokens(train, few)
        JoinedTokens(train, many)
    assert "few: 3 of 3 images are learned from too" in caplog.text
    assert "many: 12 of 14 images are learned from too" in caplog.text


def test_so_many_images_are_not_compared(three, tmp_path, monkeypatch):
    with np.load(tmp_path / "part-0.npz") as learned:
        few = joined_npz(tmp_path, "few", learned["images"][:4], learned["labels"][:4])
    monkeypatch.setattr(module, "MOST", 12 * SIZE[0] * SIZE[1] - 1)
    monkeypatch.setattr(module.TokenDataset, "digests", lambda *_: pytest.fail("they were"))
    JoinedTokens(three[0], few)


def test_what_a_joined_dataset_has(three, tmp_path):
    train, test, _ = three
    other = tokenize(tmp_path / "part-1.npz", PALETTE, tmp_path / "other", SIZE, resize="hf", workers=0)
    joined = JoinedTokens(train, other)
    assert joined.preprocessing == train.preprocessing != other.preprocessing and joined.origin == train.origin
    joined = JoinedTokens(train, test)
    assert joined.names == [*train.names, *test.names] and len(joined) == 21
    assert joined.split("train", 0.9).tolist() == [*range(12)] and joined.split("val", 0).tolist() == [*range(12, 21)]
    assert joined.split("all").tolist() == [*range(21)]
    order = np.array([20, 3, 12, 11, 3, 14])
    found = joined.batch(order)
    whole = torch.cat([train.batch(np.arange(12)), test.batch(np.arange(9))])
    assert torch.equal(found, whole[torch.from_numpy(order)])
    assert len(set(joined.groups)) == 21


def test_groups_of_the_two_are_apart(three, tmp_path, caplog):
    parts = []
    for k, part in enumerate(("part-0", "part-1")):
        with np.load(tmp_path / f"{part}.npz") as f:
            parts.append(
                joined_npz(
                    tmp_path, f"g-{part}", f["images"], f["labels"], groups=np.arange(len(f["labels"])) // 2 + 4 * k
                )
            )
    with caplog.at_level(logging.WARNING, "igpt_fast"):
        joined = JoinedTokens(*parts)
    assert "images of 2 groups (4, 5) are learned from too" in caplog.text
    assert len(set(joined.groups[:12])) == 6 and len(set(joined.groups[12:])) == 5
    assert not set(joined.groups[:12]) & set(joined.groups[12:])


@pytest.mark.parametrize(("change", "form"), [({"size": (5, 4)}, "5x4 in 9"), ({"colors": 8}, "4x5 in 8")])
def test_a_model_of_another_form_is_refused(three, change, form):
    config = Config(**{"layers": 1, "width": 8, "heads": 1, "colors": COLORS, "size": SIZE, **change})
    for dataset in (three[0], JoinedTokens(*three[:2])):
        with pytest.raises(InputError, match=f"part-0: the images are 4x5 in 9 colours, the model is made for {form}"):
            refuse_misfit(dataset, config)


@pytest.mark.parametrize("older", [0, 1, None])
def test_so_many_of_the_same_source_are_known_by_their_stamp(three, tmp_path, monkeypatch, older):
    """An older one too, on either side."""
    parts = [
        tokenize(tmp_path / "part-0.npz", PALETTE, tmp_path / f"again-{k}", SIZE, resize="none", workers=0)
        for k in range(2)
    ]
    if older is not None:
        path = parts[older].path / "meta.json"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({**meta, "source_stamp": meta["source_stamp"].rpartition("-")[0]}))
    monkeypatch.setattr(module, "MOST", 0)
    with pytest.raises(InputError, match="holds the images that are learned from"):
        JoinedTokens(*(TokenDataset(part.path) for part in parts))
    JoinedTokens(three[0], three[1])
