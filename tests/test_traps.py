"""What makes a test too easy, or an accuracy mean less than it seems to: it is told, or kept apart."""

import json
import logging

import numpy as np
import pytest
import torch
from labelled import PALETTE, make, write_tokens
from PIL import Image

from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.classes import by_folder
from igpt_fast.joined import warn_of_twins
from igpt_fast.labels import choose_labelled
from igpt_fast.predict import Answers
from igpt_fast.regression import score
from igpt_fast.sources import open_source
from igpt_fast.tokens import MOST
from igpt_fast.weights import open_model


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        Image.new("RGB", (5, 4), (9, 9, 9)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("head", "groups", "told"),
    [
        ("File_Name,LABEL,Group", True, []),
        ("file_name,label,patient_id", False, ["`patient_id`"]),
        ("file_name,label,Scene", False, ["`Scene`"]),
        ("file_name,label,text", False, []),
        ("file_name,label,group,subject", True, []),
    ],
)
def test_a_column_of_patients_is_used_or_told(folder, caplog, head, groups, told):
    rows = [f"{name}.png,{'xy'[k % 2]},p{k // 2},1" for k, name in enumerate("abcd")]
    (folder / "metadata.csv").write_text(
        "\n".join([head, *(row[: None if head.count(",") > 2 else -2] for row in rows)])
    )
    source = open_source(folder)
    assert source.classes == ["x", "y"] and (source.groups == [f"group p{k // 2}" for k in range(4)]) == groups
    assert [word in record.getMessage() for record, word in zip(caplog.records, told, strict=True)] == [True] * len(
        told
    )


def test_scans_of_patients_that_nobody_groups_are_told(tmp_path, caplog):
    for name in ("a/1.dcm", "b/2.DICOM"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    open_source(tmp_path)
    assert "may be of fewer patients; `group` in a metadata.csv" in caplog.text
    caplog.clear()
    (tmp_path / "metadata.csv").write_text("file_name,label,group\na/1.dcm,a,p\nb/2.DICOM,b,p\n")
    open_source(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,group\na/1.dcm,p\n")
    assert open_source(tmp_path).groups == ["group p", "image b/2.DICOM"]
    (tmp_path / "metadata.csv").unlink()
    open_source(tmp_path / "a")
    assert "fewer patients" not in caplog.text


@pytest.mark.parametrize(
    ("names", "classes", "labels", "told"),
    [
        (["train/cat/1", "train/dog/2", "Test/cat/3", "val/dog/4"], ["cat", "dog"], [0, 1, 0, 1], "Test, train, val"),
        (["x/train/1", "x/test/2"], None, None, "test, train"),
        (["train/cat/1", "test/2"], None, None, "test, train"),
        (["train/1", "plane/2"], ["plane", "train"], [1, 0], None),
    ],
)
def test_parts_of_a_data_set_are_no_classes(caplog, names, classes, labels, told):
    found, called = by_folder(names, "here")
    assert called == classes and (None if found is None else found.tolist()) == labels
    assert told is None or f"here: the folders {told} are taken for parts" in caplog.text
    assert bool(told) == bool(caplog.records)


def test_images_on_both_sides_of_a_split_are_told(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING, "igpt_fast")
    dataset = write_tokens(tmp_path, np.arange(60) % 3)
    chosen = choose_labelled(dataset, 0.3)
    warn_of_twins(dataset, chosen.learned, chosen.tested, " to test on")
    assert not caplog.records, "all differ"
    tests, learned = chosen.indices[chosen.test], chosen.indices[~chosen.test]
    shard = np.load(dataset.path / "shard-00000.npy")
    shard[tests[:2]] = shard[learned[:2]]
    np.save(dataset.path / "shard-00000.npy", shard)
    dataset = type(dataset)(dataset.path)
    warn_of_twins(dataset, chosen.learned, chosen.tested, " to test on")
    assert f"2 of {len(tests)} images to test on are learned from too" in caplog.text
    caplog.clear()
    monkeypatch.setattr("igpt_fast.joined.MOST", 60 * 20 - 1)
    warn_of_twins(dataset, chosen.learned, chosen.tested, " to test on")
    assert MOST > 60 * 20 and not caplog.records, "of too many it is not asked"


def test_probe_and_finetune_tell_of_them(igpt, tmp_path):
    dataset = write_tokens(tmp_path, np.arange(60) % 3)
    shard = np.load(dataset.path / "shard-00000.npy")
    shard[:] = shard[0]
    np.save(dataset.path / "shard-00000.npy", shard)
    save_checkpoint(tmp_path / "run", 3, make(), PALETTE)
    code, _, said = igpt("finetune", tmp_path / "run", dataset.path, "--out", tmp_path / "tuned", "--steps", "1")
    assert code == 0 and "images to test on are learned from too" in said
    pytest.importorskip("sklearn", reason="the probe needs the [probe] extra")
    code, _, said = igpt("probe", tmp_path / "run", dataset.path, "--layers", "1", "-o", tmp_path / "p.png")
    assert code == 0 and "images to test on are learned from too" in said


def test_train_tells_of_them_once(igpt, tmp_path):
    dataset = write_tokens(tmp_path, np.arange(60) % 3)
    learned, held_out = dataset.split("train"), dataset.split("val")
    shard = np.load(dataset.path / "shard-00000.npy")
    shard[held_out[0]] = shard[learned[0]]
    np.save(dataset.path / "shard-00000.npy", shard)
    options = dataset.path, "--out", tmp_path / "run", "--layers", "1", "--width", "8", "--heads", "1", "--batch", "2"
    code, _, said = igpt("train", *options, "--steps", "1")
    assert code == 0 and f"1 of {len(held_out)} images held out are learned from too" in said
    code, _, said = igpt("train", *options, "--steps", "2", "--resume")
    assert code == 0 and "learned from too" not in said


def test_a_rare_class_weighs_as_much_as_a_frequent_one():
    labels = np.array([0] * 8 + [2] * 2)
    right = np.array([True] * 8 + [False, True])
    found = score("x", right, labels=labels)
    assert (found.accuracy, found.balanced) == (pytest.approx(0.9), pytest.approx(0.75))
    assert score("x", right).balanced is None
    answers = Answers(np.arange(10), np.eye(3, dtype=np.float32)[np.where(right, labels, 1)], ("a", "b", "c"))
    of_each = {"a": {"images": 8, "right": 8}, "b": {"images": 0, "right": 0}, "c": {"images": 2, "right": 1}}
    assert answers.recall(labels) == of_each


@pytest.fixture
def one(tmp_path):
    """A model, its images of two classes, and others that a metadata.csv says are all of one."""
    dataset, model = write_tokens(tmp_path, np.arange(60) % 2), make()
    torch.nn.init.normal_(model.wtet)  # a fresh one finds all images equally likely
    save_checkpoint(tmp_path / "run", 3, model, PALETTE)
    (tmp_path / "one").mkdir()
    images = np.load(tmp_path / "images.npz")["images"][:, ::-1]  # others, by what they show
    for k in range(4):
        Image.fromarray(images[k]).save(tmp_path / f"one/{k}.png")
    (tmp_path / "one/metadata.csv").write_text("file_name,label\n" + "".join(f"{k}.png,1\n" for k in range(4)))
    return tmp_path, dataset


def test_a_test_set_of_one_class(igpt, one):
    """As of healthy people alone: which share of them is taken for ill."""
    folder, dataset = one
    words = ("--test", folder / "one", "--resize", "none", "--json")
    tokens = igpt(
        "tokenize", folder / "one", "--palette", dataset.path / "palette.npy", "--size", "4x5", "-o", folder / "t"
    )
    assert tokens[0] == 0 and "4 images in 1 class: 1" in tokens[2]
    out = ("--out", folder / "tuned", "--steps", "2")
    code, printed, said = igpt("finetune", folder / "run", folder / "images.npz", *out, *words)
    assert code == 0, said
    facts = json.loads(printed)
    assert facts["classes"] == ["0", "1"] and facts["images"]["test"] == 4
    right = facts["recall"]["1"]["right"]
    assert facts["recall"] == {"0": {"images": 0, "right": 0}, "1": {"images": 4, "right": right}}
    assert facts["test"]["balanced"] == facts["test"]["accuracy"] == right / 4
    assert f"balanced accuracy {25 * right:.1f} %" in said
    code, printed, said = igpt("classify", folder / "tuned", folder / "one", "-o", folder / "c.csv", "--json")
    answer = json.loads(printed)
    assert code == 0 and (answer["accuracy"], answer["balanced"], answer["labelled"]) == (right / 4, right / 4, 4)
    assert answer["recall"] == facts["recall"] and "balanced accuracy" in said
    code, _, said = igpt("finetune", folder / "run", folder / "one", "--out", folder / "no")
    assert code == 2 and "no image has a label, or all are of one class" in said and not (folder / "no").exists()
    pytest.importorskip("sklearn", reason="the probe needs the [probe] extra")
    code, printed, said = igpt(
        "probe", folder / "run", folder / "images.npz", "--layers", "1", *words, "-o", folder / "p.png"
    )
    facts = json.loads(printed)
    assert code == 0 and facts["classes"] == ["0", "1"] and not facts["left_out"], said
    assert "4 to test on, 2 classes, of which 1 are tested on: 0, 1" in said


def test_one_class_is_too_few_to_learn_whatever_is_tested_on(igpt, one):
    pytest.importorskip("sklearn", reason="the probe needs the [probe] extra")
    folder, _ = one
    other = ("--test", folder / "images.npz", "--resize", "none", "-o", folder / "p.png")
    code, _, said = igpt("probe", folder / "run", folder / "one", *other)
    assert code == 2 and "has classes that" in said
    np.savez(folder / "few.npz", images=np.load(folder / "images.npz")["images"][:3, ::-1], labels=[0, 1, 0])
    code, _, said = igpt("probe", folder / "run", folder / "few.npz", "--test", folder / "one", *other[2:])
    assert code == 2 and "each with at least 2 images to learn from: give more images" in said
    assert "fraction" not in said


def test_the_unlikeliest_images_can_be_found(igpt, one):
    folder, dataset = one
    words = (folder / "run", dataset.path, "--limit", "7", "--json", "-o", folder / "s.csv")
    code, printed, said = igpt("eval", *words)
    facts, lines = json.loads(printed), (folder / "s.csv").read_text().splitlines()
    assert code == 0 and facts["out"] == str(folder / "s.csv") and f"wrote {folder / 's.csv'}" in said
    head, *rows = (line.split(",") for line in lines)
    assert head == ["image", "nats_per_pixel", "bits_per_pixel"] and len(rows) == 7
    model = open_model(folder / "run").model
    for name, nats, bits in rows:
        loss = model.loss(dataset.batch(np.array([dataset.names.index(name)]))).item()
        assert (float(nats), float(bits)) == (pytest.approx(loss, abs=1e-5), pytest.approx(loss / np.log(2), abs=1e-5))
    assert np.mean([float(row[1]) for row in rows]) == pytest.approx(facts["nats_per_pixel"], abs=1e-6)
    code, _, said = igpt("eval", folder / "run", dataset.path, "-o", folder / "s.txt")
    assert code == 2 and "is written as a .csv file" in said
