"""`igpt-fast finetune` and `classify` as people and programs meet them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from labelled import COLORS, GREYS, PALETTE, SIZE, write_tokens
from PIL import Image
from tiny import rows, same, weights

from igpt_fast.checkpoint import list_checkpoints, save_checkpoint
from igpt_fast.config import Config
from igpt_fast.finetune import finetune
from igpt_fast.metrics import read_metrics
from igpt_fast.model import ImageGPT
from igpt_fast.run import read_options
from igpt_fast.tokens import TokenDataset, is_token_directory
from igpt_fast.weights import open_model

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ["--steps", "12", "--batch", "8", "--val-every", "4", "--save-every", "5", "--log-every", "3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained model, and labelled images as tokens, as an array and as a folder."""
    folder = tmp_path_factory.mktemp("finetune")
    dataset = write_tokens(folder, np.arange(90) * 7 % 3)
    torch.manual_seed(0)
    model = ImageGPT(Config(layers=2, width=24, heads=3, colors=COLORS, size=SIZE))
    save_checkpoint(folder / "run", 3, model, PALETTE)
    for index in range(90):
        path = folder / "photos" / "abc"[int(dataset.labels[index])] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = GREYS[dataset.batch(np.array([index]))[0].numpy()]
        Image.fromarray(np.repeat(grey[..., None], 3, -1)).save(path)
    return folder


@pytest.fixture(scope="module")
def tuned(place):
    """A run of the command on the folder of photos, and what it printed."""
    words = [place / "run", place / "photos", "--out", place / "tuned", "--resize", "none", *FAST, "--json"]
    done = subprocess.run([sys.executable, "-m", "igpt_fast.cli", "finetune", *map(str, words)], capture_output=True)
    assert done.returncode == 0, done.stderr
    return place / "tuned", json.loads(done.stdout), done.stderr.decode()


def test_all_that_a_run_leaves(place, tuned):
    run, answer, said = tuned
    assert answer["run"] == str(run) and answer["classes"] == ["a", "b", "c"] and answer["last_step"] == 12
    assert answer["seen"] is None and answer["left_out"] == {}
    for name in ("loss.png", "accuracy.png", "confusion.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG" and f"{run / name}\n" in said
    for line in (
        "beginning with the weights of step 3 of",
        "3 classes: a, b, c",
        "loss of the classes + loss of the pixels; ends after 10 validations without a better one",
        f"validation likes step {answer['step']} of 12 best: accuracy {100 * answer['val_accuracy']:.1f} %",
        f"test: accuracy {100 * answer['test']['accuracy']:.1f} %",
        f"igpt-fast classify {run} {place / 'photos'}",
    ):
        assert line in said, line
    lines = list(csv.DictReader((run / "test.csv").read_text().splitlines()))
    assert len(lines) == answer["images"]["test"] and all(line["image"][0] == line["class"] for line in lines)
    right = np.mean([line["answer"] == line["class"] for line in lines])
    assert right == pytest.approx(answer["test"]["accuracy"])
    assert sum(answer["images"].values()) == 90 and is_token_directory(run / "tokens")
    assert read_options(run)["command"]["images"]["resize"] == "none"


def test_a_run_among_the_images_is_no_image(place, tuned, igpt, tmp_path):
    code, printed, _ = igpt("classify", place / "tuned", place, "-o", tmp_path / "c.csv", "--json")
    assert code == 0 and json.loads(printed)["images"] == 90, "its pictures are not among them"
    shutil.copytree(place / "tuned", tmp_path / "own")
    shutil.copytree(place / "photos", tmp_path / "own" / "photos")
    code, printed, _ = igpt("classify", place / "tuned", tmp_path / "own", "-o", tmp_path / "c.csv", "--json")
    assert code == 0 and json.loads(printed)["images"] == 90, "nor when the folder of images is the run's"


def test_resume_goes_on_and_refuses_what_is_another_run(place, tuned, igpt):
    run, _, _ = tuned
    code, printed, said = igpt(
        "finetune", place / "run", place / "photos", "--out", run, "--resume", "--steps", "13", "--json"
    )
    assert code == 0 and json.loads(printed)["last_step"] == 13, said
    assert "using the tokens at" in said and "changed since the checkpoint: steps 12 → 13" in said
    for words, message in (
        ([place / "other", place / "photos", "--out", run, "--resume"], "--resume with another MODEL"),
        ([place / "run", place / "photos", "--out", run], "already holds step-00000013: add --resume"),
        ([place / "run", place / "photos", "--out", run, "--resume", "--resize", "hf"], "resize is none, not hf"),
        ([place / "run", place / "photos", "--out", run, "--resume", "--flip"], "--resume with another flip"),
        ([place / "run", place / "photos", "--out", run, "--resume", "--per-class", "5"], "--resume with another"),
    ):
        code, printed, said = igpt("finetune", *words)
        assert code == 2 and not printed and message in said.splitlines()[-1], said
    code, _, said = igpt("train", place / "photos", "--out", run, "--resume")
    assert code == 2 and f"is a run of finetune; go on with: igpt-fast finetune {place / 'run'}" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps is 0; use at least 1"),
        (["--patience", "-1"], "--patience is -1; use 0 or more"),
        (["--test-fraction", "0.5", "--test", "x"], "--test-fraction changes nothing with --test"),
        (["--resize", "hf"], "holds tokens, which are read already; leave out --resize, or give the images"),
        (["--workers", "2"], "holds tokens, which are read already; leave out --workers"),
        (["--resume"], "holds no checkpoint to go on from"),
        (["--device", "abacus"], "device 'abacus' is not supported"),
        (["--patience", "3", "--val-fraction", "0"], "--patience changes nothing with --val-fraction 0"),
        (["--test", "TOKENS"], "holds the images that are learned from; give others to test on"),
    ],
)
def test_it_refuses_in_one_line(place, igpt, tmp_path, words, message):
    words = [{"TOKENS": place / "images"}.get(word, word) for word in words]
    code, printed, said = igpt("finetune", place / "run", place / "images", "--out", tmp_path / "new", *words)
    assert code == 2 and not printed and said.count("error: ") == 1 and message in said
    assert not (tmp_path / "new").exists()


def test_a_run_of_train_is_no_run_of_finetune(place, igpt, tmp_path):
    words = ["--layers", "1", "--width", "24", "--heads", "3", "--steps", "2", "--batch", "4", "--sample-every", "0"]
    assert igpt("train", place / "images", "--out", tmp_path / "t", *words)[0] == 0
    code, _, said = igpt("finetune", place / "run", place / "images", "--out", tmp_path / "t", "--resume")
    assert code == 2 and "is a run of train; go on with: igpt-fast train" in said


def test_test_images_of_their_own(place, igpt, tmp_path):
    test = write_tokens(tmp_path, np.arange(20) % 3, seed=4, name="test")
    words = [place / "run", place / "images", "--out", tmp_path / "run", "--test", test.path, *FAST, "--json"]
    code, printed, said = igpt("finetune", *words)
    assert code == 0, said
    assert json.loads(printed)["images"]["test"] == 20
    lines = (tmp_path / "run" / "test.csv").read_text().splitlines()
    assert len(lines) == 21 and lines[1].startswith("00000000,")
    code, printed, said = igpt("finetune", *words, "--resume")
    assert code == 0 and json.loads(printed)["images"]["test"] == 20, "the test is remembered"
    shown = igpt("classify", tmp_path / "run", place / "images", "-o", tmp_path / "c.csv")[2]
    assert "the model had learned from 90 of these images" in shown


def test_kill_9_loses_nothing(place, tmp_path, igpt):
    options = ["--patience", "0", "--batch", "8", "--val-every", "3", "--save-every", "2", "--warmup", "3"]
    words = [place / "run", place / "images", *options]
    start = [sys.executable, "-m", "igpt_fast.cli", "finetune", *map(str, words), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen([*start, "--steps", "100000", "--log-every", "1"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not any(row["step"] >= 5 for row in read_metrics(tmp_path / "killed")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    steps = str(read_metrics(tmp_path / "killed")[-1]["step"] + 2)
    for run, more in (("killed", ["--resume"]), ("straight", ["--log-every", "1"])):
        code, _, said = igpt("finetune", *words, "--out", tmp_path / run, "--steps", steps, *more)
        assert code == 0, said
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "straight"))


def test_classify_writes_a_line_an_image(place, tuned, igpt, tmp_path):
    run, answer, _ = tuned
    out, picture = tmp_path / "c.csv", tmp_path / "c.png"
    words = ["classify", run, place / "photos", "-o", out, "--confusion", picture, "--probabilities", "--json"]
    code, printed, said = igpt(*words)
    found = json.loads(printed)
    assert code == 0 and found["images"] == found["labelled"] == 90 and picture.read_bytes()[:4] == b"\x89PNG"
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert found["accuracy"] == np.mean([line["answer"] == line["class"] for line in lines])
    assert sum(found["answers"].values()) == 90 and f"wrote {out}" in said
    for line in lines:
        each = {name: float(line[f"p({name})"]) for name in "abc"}
        assert sum(each.values()) == pytest.approx(1, abs=1e-5) and each[line["answer"]] == max(each.values())
    assert found["seen"] == answer["images"]["train"] + answer["images"]["val"]
    assert f"the model had learned from {found['seen']} of these images" in said
    one = place / "photos" / lines[0]["image"]
    code, printed, said = igpt("classify", run, one, "-o", out, "--json")
    assert code == 0 and f"{one.name}: {lines[0]['answer']} " in said and "accuracy" not in json.loads(printed)
    assert out.read_text().splitlines()[0] == "image,answer,probability"


def test_classify_takes_what_convert_wrote(place, tuned, igpt, tmp_path):
    run, _, _ = tuned
    assert igpt("convert", run, tmp_path / "hf")[0] == 0
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    for model, out in ((run, ours), (tmp_path / "hf", theirs)):
        assert igpt("classify", model, place / "images", "-o", out)[0] == 0
    assert ours.read_bytes() == theirs.read_bytes()
    (tmp_path / "hf" / "config.json").write_text(
        (tmp_path / "hf" / "config.json").read_text().replace('"1": "b"', '"7": "b"')
    )
    assert igpt("classify", tmp_path / "hf", place / "images", "-o", theirs)[0] == 0
    assert "LABEL_" in theirs.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--out", "c.txt"], "c.txt: is written as a .csv file"),
        (["RUN", "--confusion", "c.jpg"], "c.jpg: is written as a .png file"),
        (["MODEL"], "no classifier head: igpt-fast finetune gives it one"),
        (["RUN", "--confusion", "c.png"], "has no labels that the model knows: --confusion needs"),
    ],
)
def test_classify_refuses_in_one_line(place, tuned, igpt, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "one.png")
    words = [{"RUN": tuned[0], "MODEL": place / "run"}.get(word, word) for word in words]
    code, printed, said = igpt("classify", words[0], tmp_path / "one.png", *words[1:])
    assert code == 2 and not printed and message in said and said.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("c*"))


def test_ctrl_c_saves_and_says_how_to_go_on(place, tmp_path):
    words = [str(w) for w in (place / "run", place / "images", "--out", tmp_path / "run", "--steps", "100000")]
    start = [sys.executable, "-m", "igpt_fast.cli", "finetune", *words, "--patience", "0", "--log-every", "1"]
    process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "saved in" in said
    assert (
        f"go on with: igpt-fast finetune {place / 'run'} {place / 'images'} --out {tmp_path / 'run'} --resume" in said
    )
    last = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row][-1]
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{last:08d}"


def test_what_the_model_and_the_run_have_seen(place, tuned, igpt, tmp_path):
    run, answer, _ = tuned
    again = [
        place / "photos",
        "--out",
        tmp_path / "again",
        "--resize",
        "none",
        *FAST,
        "--test-fraction",
        "0.5",
        "--json",
    ]
    code, printed, said = igpt("finetune", run, *again)
    tested = json.loads(printed)["images"]["test"]
    seen = json.loads(printed)["seen"]
    assert code == 0 and seen == tested - answer["images"]["test"] > 0
    assert f"the model that this began with had learned from {seen} of the test images" in said
    flat = np.load(place / "images.npz")["images"]
    np.save(tmp_path / "flat.npy", flat)
    words = [place / "run", place / "images.npz", "--out", tmp_path / "array", "--resize", "none", *FAST, "--json"]
    learned = json.loads(igpt("finetune", *words)[1])["images"]
    code, printed, said = igpt(
        "classify", tmp_path / "array", tmp_path / "flat.npy", "-o", tmp_path / "c.csv", "--json"
    )
    assert code == 0 and json.loads(printed)["seen"] in (learned["train"] + learned["val"], None), said
    assert "accuracy" not in json.loads(printed)


def test_a_run_that_python_began(place, igpt, tmp_path):
    dataset, model = TokenDataset(place / "images"), open_model(place / "run").model
    finetune(model, dataset, tmp_path / "run", steps=4, batch=8, val_every=2)
    words = [place / "run", place / "images", "--out", tmp_path / "run", "--resume", "--steps", "6", "--json"]
    code, printed, said = igpt("finetune", *words)
    assert code == 0 and json.loads(printed)["last_step"] == 6 and json.loads(printed)["seen"] is None
    assert "was begun in Python: with which model it does not say" in said


def test_images_without_labels_are_refused_before_anything_is_made(place, igpt, tmp_path):
    np.save(tmp_path / "flat.npy", np.load(place / "images.npz")["images"])
    new = ["--out", tmp_path / "run", "--resize", "none", *FAST]
    for words in ([tmp_path / "flat.npy"], [place / "images.npz", "--test", tmp_path / "flat.npy"]):
        code, _, said = igpt("finetune", place / "run", *words, *new)
        assert code == 2 and f"error: {tmp_path / 'flat.npy'}: no image has a label" in said
        assert not (tmp_path / "run").exists()
    other = write_tokens(tmp_path, [-1] * 9, name="other")
    code, _, said = igpt("finetune", place / "run", place / "images", "--test", other.path, *new[:2], *FAST)
    assert code == 2 and f"{other.path}: no image has a label of the classes of {place / 'images'}" in said


def test_a_remembered_test_leaves_no_fraction_to_choose(place, igpt, tmp_path):
    test = write_tokens(tmp_path, np.arange(12) % 3, seed=4, name="test")
    words = [place / "run", place / "images", "--out", tmp_path / "run"]
    assert igpt("finetune", *words, "--test", test.path, *FAST)[0] == 0
    code, _, said = igpt("finetune", *words, "--resume", "--test-fraction", "0.5")
    assert code == 2 and "--test-fraction changes nothing with --test" in said
