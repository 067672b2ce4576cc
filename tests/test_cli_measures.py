"""`igpt-fast eval` and `igpt-fast features`: which images, read how, and what is said and written of them."""

import csv
import json

import numpy as np
import pytest
import tiny
import torch
from labelled import FAST, PALETTE, SIZE, make, write_tokens

from igpt_fast import intervals
from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.data import tokenize
from igpt_fast.errors import InputError
from igpt_fast.evaluate import evaluate
from igpt_fast.finetune import finetune
from igpt_fast.train import train


@pytest.fixture
def place(tmp_path):
    """A folder with a model and tokens of 30 images, a third of them without a label."""
    dataset = write_tokens(tmp_path, np.arange(30) % 3 - 1)
    save_checkpoint(tmp_path / "run", 3, make(), PALETTE)
    return tmp_path, dataset


def test_the_interval_of_images_in_groups_is_that_of_the_groups(tmp_path):
    write_tokens(tmp_path, np.arange(40) % 3)
    images = np.load(tmp_path / "images.npz")["images"]
    np.savez(tmp_path / "grouped.npz", images=images, groups=np.arange(40) // 4)
    data = tokenize(tmp_path / "grouped.npz", PALETTE, tmp_path / "grouped", SIZE, resize="none", workers=0)
    model = make()
    torch.nn.init.normal_(model.wtet)
    chosen = np.random.default_rng(0).permutation(40)[:23]
    found = evaluate(model, data, chosen)
    reach = intervals.margin_of_mean(found.per_image, chosen // 4)
    assert (found.low, found.high) == pytest.approx((found.nats_per_pixel - reach, found.nats_per_pixel + reach))
    assert reach != pytest.approx(intervals.margin_of_mean(found.per_image), rel=1e-3)


def test_a_limit_draws_by_the_seed_and_labels_are_those_of_the_drawn(igpt, place):
    folder, dataset = place
    drawn = []
    for seed in (0, 1):
        words = ("--limit", 9, "--seed", seed, "-o", folder / "f.npz")
        assert igpt("features", folder / "run", dataset.path, *words)[0] == 0
        found = np.load(folder / "f.npz")
        drawn.append([dataset.names.index(name) for name in found["names"]])
        assert found["labels"].tolist() == dataset.labels[drawn[-1]].tolist()
    assert len(drawn[0]) == len(drawn[1]) == 9 and drawn[0] != drawn[1]


@pytest.mark.parametrize("command", ["features", "eval"])
def test_all_that_says_how_to_read_images_is_heard(igpt, place, monkeypatch, command):
    def tokens_for(checkpoint, data, given, *_):
        raise InputError(json.dumps(given))

    for name in ("features", "evaluate"):
        monkeypatch.setattr(f"igpt_fast.cli.{name}.tokens_for", tokens_for)
    given = {"resize": "none", "background": "red", "value_range": [0, 100], "bands": [3, 2, 1], "on_error": "skip"}
    words = ("--resize=none", "--background=red", "--value-range=0,100", "--bands=3,2,1", "--on-error=skip")
    code, _, said = igpt(command, place[0] / "run", place[0] / "images.npz", *words)
    assert code == 2 and json.loads(said.removeprefix("error: ")) == given


def test_tokens_in_fewer_colours_than_the_models_are_refused(igpt, place):
    folder, dataset = place
    save_checkpoint(folder / "more", 3, make(colors=12))
    code, _, said = igpt("features", folder / "more", dataset.path, "-o", folder / "f.npz")
    assert code == 2 and "the model is made for 4x5 in 12 colours" in said and not (folder / "f.npz").exists()


def test_a_write_that_fails_leaves_the_features_that_were_there(igpt, place, monkeypatch):
    folder, dataset = place
    words = ("features", folder / "run", dataset.path, "-o", folder / "f.npz")
    assert igpt(*words)[0] == 0
    before = (folder / "f.npz").read_bytes()

    def savez(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    assert igpt(*words)[0] != 0 and (folder / "f.npz").read_bytes() == before


def test_eval_writes_a_line_an_image_of_those_that_the_seed_draws(igpt, place):
    folder, dataset = place
    torch.nn.init.normal_((model := make()).wtet)  # a fresh one finds all images equally likely
    save_checkpoint(folder / "told", 3, model, PALETTE)
    want, drawn = evaluate(model, dataset).per_image, []
    for seed in (0, 1):
        words = ("--limit", 9, "--seed", seed, "-o", folder / "nats.csv")
        assert igpt("eval", folder / "told", dataset.path, *words)[0] == 0
        lines = list(csv.DictReader((folder / "nats.csv").open()))
        drawn.append([dataset.names.index(line["image"]) for line in lines])
        assert [float(line["nats_per_pixel"]) for line in lines] == pytest.approx(want[drawn[-1]], abs=1e-5)
        assert [float(line["bits_per_pixel"]) for line in lines] == pytest.approx(want[drawn[-1]] / np.log(2), abs=1e-5)
    assert len(drawn[0]) == len(drawn[1]) == 9 and drawn[0] != drawn[1]


def test_eval_writes_over_no_image_and_no_other_file_than_a_csv(igpt, place, monkeypatch):
    folder, _ = place
    monkeypatch.setattr("igpt_fast.cli.evaluate.open_to_measure", None)  # it is found before the work
    for out, said in (("f.txt", "is written as a .csv file"), ("photos/metadata.csv", "taken for their labels")):
        (folder / "photos").mkdir(exist_ok=True)
        found = igpt("eval", folder / "run", folder / "photos", "-o", folder / out)
        assert found[0] == 2 and said in found[2]


def test_eval_says_what_of_the_split_is_not_as_in_training(igpt, tmp_path):
    dataset = tiny.write_tokens(tmp_path / "data")
    run = train(dataset, tmp_path / "run", tiny.CONFIG, **{**tiny.FAST, "steps": 1}).run
    for words, wanted in (
        (("--split", "val", "--val-fraction", "0.6"), "what decides the split, names and fraction, is not as in"),
        (("--split", "train"), "--split val leaves them out"),
    ):
        code, printed, said = igpt("eval", run, dataset.path, "--json", *words)
        assert code == 0 and json.loads(printed)["seen"] > 0 and wanted in said


def test_eval_takes_no_share_from_fine_tuning_whose_validation_is_another(igpt, tmp_path):
    dataset = write_tokens(tmp_path, np.arange(90) % 3)
    run = finetune(make(), dataset, tmp_path / "run", **{**FAST, "steps": 1, "val_fraction": 0.4}).run
    found = json.loads(igpt("eval", run, dataset.path, "--split", "val", "--json")[1])
    assert (found["val_fraction"], found["images"]) == (0.1, len(dataset.split("val", 0.1)))
