"""`igpt-fast probe`: one object on stdout, the figure where it was asked for, nothing else left, one-line refusals."""

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from labelled import PALETTE, SIZE, make, write_tokens
from PIL import Image

from igpt_fast.batches import fingerprint
from igpt_fast.checkpoint import load_checkpoint, save_checkpoint
from igpt_fast.cli.probe import _row, parse_layers, show
from igpt_fast.errors import InputError
from igpt_fast.probe import probe


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("probe"), np.arange(240) * 7 % 3)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def result(model, dataset):
    return probe(model, dataset)


def timeless(result) -> dict:
    return {key: value for key, value in result.to_dict().items() if key != "seconds"}


@pytest.mark.parametrize(
    ("text", "layers"), [("all", [0, 1, 2, 3]), ("3,5", [3, 5]), (" 2-4, 0", [2, 3, 4, 0]), ("7", [7])]
)
def test_layers_are_read(text, layers):
    assert parse_layers(text, 3) == layers


@pytest.mark.parametrize("text", ["", "3,", "-1", "a", "1-2-3", "1.5"])
def test_layers_that_mean_nothing(text):
    with pytest.raises(InputError, match="is not understood; give all, or layers from 0 to 3"):
        parse_layers(text, 3)


@pytest.fixture
def run(tmp_path, model):
    save_checkpoint(tmp_path / "run", 3, model, PALETTE)
    return tmp_path / "run"


def test_the_command_prints_one_object_and_writes_the_figure(igpt, run, dataset, result, tmp_path):
    out = tmp_path / "figures" / "probe.png"
    code, printed, said = igpt("probe", run, dataset.path, "--out", out, "--json")
    assert code == 0 and Image.open(out).size == (960, 600)
    found = json.loads(printed)
    assert found["step"] == 3 and found["figure"] == str(out)
    wanted = json.loads(json.dumps(timeless(result)))
    assert {key: found[key] for key in wanted} == wanted
    assert "raw pixels" in said and "majority class" in said and f"layer {result.best.layer} *" in said


def test_what_the_intervals_leave_out_is_told_where_few_labels_are_drawn(igpt, run, dataset, tmp_path):
    for words, told in (((), False), (("--per-class", "4"), True)):
        code, printed, _ = igpt("probe", run, dataset.path, "--layers", "0", "-o", tmp_path / "p.png", *words)
        assert code == 0 and ("intervals are for the choice of test images" in printed) is told


def test_the_answers_to_each_test_image_are_those_that_were_counted(igpt, run, dataset, tmp_path):
    words = ("--layers", "0,2", "--joined", "-o", tmp_path / "p.png", "--answers", tmp_path / "a.csv", "--json")
    code, printed, said = igpt("probe", run, dataset.path, *words)
    found = json.loads(printed)
    head, *rows = csv.reader((tmp_path / "a.csv").read_text().splitlines())
    assert code == 0 and found["answers"] == str(tmp_path / "a.csv") and f"wrote {tmp_path / 'a.csv'}" in said
    assert head == ["image", "class", "layer 0", "layer 2", "layers joined", "raw pixels", "majority class"]
    tested = dataset.split("val", 0.2)
    assert [row[0] for row in rows] == [dataset.names[image] for image in tested]
    assert [row[1] for row in rows] == [dataset.classes[dataset.labels[image]] for image in tested]
    scores = [*found["layers"], found["joined"], found["pixels"], found["majority"]]
    for column, score in enumerate(scores, 2):
        assert score["name"] == head[column] and "answers" not in score
        assert sum(row[column] == row[1] for row in rows) == pytest.approx(score["accuracy"] * len(rows))
    assert {row[-1] for row in rows} < set(dataset.classes)


def test_neither_file_takes_the_other_along(igpt, run, dataset, tmp_path, monkeypatch):
    replace = os.replace
    for broken, other in (("p.png", "a.csv"), ("a.csv", "p.png")):

        def fails(source, target, broken=broken):
            if Path(target).name == broken:
                raise OSError(28, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", fails)
            words = ("--layers", "0", "-o", tmp_path / "p.png", "--answers", tmp_path / "a.csv")
            code, printed, _ = igpt("probe", run, dataset.path, *words)
        assert code == 2 and "majority class" in printed
        assert (tmp_path / other).is_file() and not (tmp_path / broken).exists()
        (tmp_path / other).unlink()


def test_the_figures_are_told_before_the_picture_fails(igpt, run, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, printed, said = igpt("probe", run, dataset.path, "--layers", "0", "--out", tmp_path / "p.png", "--json")
    assert code == 2 and json.loads(printed)["test"] > 0 and "raw pixels" in said
    assert said.endswith(f"error: No space left on device: {tmp_path / 'p.png'}\n")


def test_images_are_tokenised_for_the_probe_and_leave_nothing(igpt, run, dataset, result, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    (run / "train.json").write_text(
        json.dumps({"config": {}, "options": {}, "data": {}, "command": {"images": {"resize": "none"}}})
    )
    images = dataset.path.with_suffix(".npz")
    code, printed, _ = igpt("probe", run, images, "--layers", "1", "--json", "-o", tmp_path / "p.png")
    assert code == 0 and not list(scratch.iterdir())
    assert json.loads(printed)["layers"][0]["accuracy"] == result.layers[1].accuracy


def test_the_answer_is_on_stdout_and_all_else_on_stderr(igpt, run, dataset, tmp_path):
    code, printed, said = igpt("probe", run, dataset.path, "--layers", "0", "--out", tmp_path / "p.png")
    assert (
        code == 0
        and "raw pixels" in printed
        and "joined" not in printed
        and "* the layer that validation prefers" in printed
    )
    assert "raw pixels" not in said and "wrote" in said and "wrote" not in printed
    code, printed, said = igpt("eval", run, dataset.path)
    assert code == 0 and "nats per pixel" in printed and "nats per pixel" not in said


def test_layers_joined_have_a_line(igpt, run, dataset, tmp_path):
    words = ("probe", run, dataset.path, "--layers", "0,2", "--joined", "--out", tmp_path / "p.png")
    code, printed, _ = igpt(*words)
    assert code == 0 and "layers joined" in printed
    found = json.loads(igpt(*words, "--json")[1])
    assert found["joined"]["accuracy"] > 0.4 and found["joined"]["layer"] is None and len(found["layers"]) == 2


def say_learned(run, dataset):
    """Makes the run one that has learned from nine tenths of a dataset."""
    saved = {"config": {}, "options": {"val_fraction": 0.1}, "data": fingerprint(dataset), "command": {}}
    (run / "train.json").write_text(json.dumps(saved))


def test_what_the_model_had_seen_is_said(igpt, run, dataset, tmp_path):
    out = ("--layers", "0", "--per-class", "4", "--json", "-o", tmp_path / "p.png")
    assert json.loads(igpt("probe", run, dataset.path, *out)[1])["seen"] is None
    say_learned(run, dataset)
    wanted = len(dataset.split("val", 0.2)) - len(dataset.split("val", 0.1))
    _, printed, said = igpt("probe", run, dataset.path, *out)
    assert json.loads(printed)["seen"] == wanted > 0 and json.loads(printed)["train"] == 12
    assert f"the model itself had learned from {wanted} of the images held out here, without their labels" in said
    few = json.loads(igpt("probe", run, dataset.path, *out, "--limit", "24")[1])
    assert 0 < few["seen"] <= few["test"] < wanted + len(dataset.split("val", 0.1))
    _, printed, said = igpt("probe", run, dataset.path, *out, "--test-fraction", "0.1")
    assert json.loads(printed)["seen"] == 0 and "had learned" not in said


def test_what_the_model_had_seen_of_images_given_to_test_on(igpt, run, dataset, tmp_path):
    say_learned(run, dataset)
    others = write_tokens(tmp_path, np.arange(60) % 3, seed=1)
    words = ("probe", run, others.path, "--test", dataset.path, "--layers", "0", "--json", "-o", tmp_path / "p.png")
    assert json.loads(igpt(*words)[1])["seen"] == len(dataset.split("train", 0.1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "9"), "layers 9 were asked for; this model has layers 0 to 2"),
        (("--layers", "x"), "--layers 'x' is not understood"),
        (("--test-fraction", "2"), "test fraction is 2.0"),
        (("--test-fraction", "0.2", "--test", "elsewhere"), "--test-fraction changes nothing with --test"),
        (("--test", "DATA"), "holds the images that are learned from; give others to test on"),
        (("--out", "probe.txt"), "a name ending in .png"),
        (("--device", "nonsense"), "device 'nonsense' is not supported"),
    ],
)
def test_the_command_refuses_in_one_line(igpt, run, dataset, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = [{"DATA": dataset.path}.get(word, word) for word in words]
    code, printed, said = igpt("probe", run, dataset.path, *words)
    assert code == 2 and not printed
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not list(tmp_path.glob("*.png"))


def test_images_of_one_class_are_named(igpt, run, tmp_path):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "photos" / "cats" / "1.png")
    code, _, said = igpt("probe", run, tmp_path / "photos", "-o", tmp_path / "p.png")
    assert code == 2 and f"{tmp_path / 'photos'}: no image has a label, or all are of one class; put each" in said


def test_without_a_palette_only_tokens_can_be_probed(igpt, model, dataset, tmp_path):
    save_checkpoint(tmp_path / "bare", 1, model)
    code, _, said = igpt("probe", tmp_path / "bare", dataset.path.with_suffix(".npz"), "-o", tmp_path / "p.png")
    assert code == 2 and "has no palette to read images with" in said
    assert igpt("probe", tmp_path / "bare", dataset.path, "--layers", "0", "-o", tmp_path / "p.png")[0] == 0


def test_a_probe_by_sgd(igpt, run, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)  # which it does not ask for
    words = ("probe", run, dataset.path, "--layers", "0", "--out", tmp_path / "p.png")
    code, printed, _ = igpt(*words, "--solver", "sgd", "--epochs", "5")
    assert code == 0 and "rate" in printed and " C " not in printed
    found = json.loads(igpt(*words, "--solver", "sgd", "--json")[1])
    assert (found["solver"], found["epochs"]) == ("sgd", 100) and found["layers"][0]["rate"] > 0
    code, _, said = igpt(*words, "--epochs", "5")
    assert code == 2 and "--epochs is for --solver sgd" in said


def test_the_picture_is_there_though_nobody_reads_the_figures(igpt, run, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "igpt_fast.cli.probe.show", lambda *_: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe"))
    )
    code, _, _ = igpt("probe", run, dataset.path, "--layers", "0", "--out", tmp_path / "p.png")
    assert code != 0 and Image.open(tmp_path / "p.png").size == (960, 600)


def test_what_stands_beside_the_figures_of_sgd(run, dataset, capsys):
    found = probe(load_checkpoint(run).model, dataset, layers=[1], solver="sgd", epochs=1)
    assert _row(found.pixels, False)[3] == f"{found.pixels.rate:g}"
    show(replace(found, test_groups=7, pixels=replace(found.pixels, converged=False)), False)
    said = " ".join(capsys.readouterr().out.split())
    assert "SGD became infinite for raw pixels" in said and "L-BFGS" not in said
    assert "the images to test on are of 7 groups: intervals are by groups" in said
