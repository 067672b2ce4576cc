"""Commands say which images a model has learned from, also where they lie among others, and where nobody can know."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_fast.checkpoint import load_checkpoint
from igpt_fast.cli.seen import say_seen
from igpt_fast.data import tokenize
from igpt_fast.tokens import TokenDataset, split_hash
from igpt_fast.train import train
from igpt_fast.weights import open_model

SHAPE = ("--layers", "1", "--width", "16", "--heads", "2", "--size", "6", "--resize", "none", "--colors", "8")


@pytest.fixture
def learned(igpt, tmp_path):
    """A run on 40 images, and which of them it learns from."""
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    options = (*SHAPE, "--steps", "1", "--val-fraction", "0.4")
    code, _, said = igpt("train", tmp_path / "images.npy", "--out", tmp_path / "run", *options)
    assert code == 0, said
    return images, TokenDataset(tmp_path / "run" / "tokens").split("train", 0.4)


def test_images_among_others_are_found(igpt, tmp_path, learned):
    images, indices = learned
    others = np.random.default_rng(1).integers(0, 256, (7, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "more.npy", np.concatenate([others, images[::-1][:25]]))
    code, printed, said = igpt("eval", tmp_path / "run", tmp_path / "more.npy", "--json")
    wanted = int((indices >= 15).sum())
    assert code == 0 and json.loads(printed)["seen"] == wanted > 0
    assert f"had learned from {wanted} of these images" in said
    np.save(tmp_path / "others.npy", others)
    code, printed, said = igpt("eval", tmp_path / "run", tmp_path / "others.npy", "--json")
    assert code == 0 and json.loads(printed)["seen"] == 0 and "learned from" not in said


@pytest.mark.parametrize("older", [False, True])
def test_the_same_images_by_other_names_are_split_otherwise(igpt, tmp_path, older):
    for k, image in enumerate(np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)):
        (tmp_path / "all/photos").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"all/photos/{k:02d}.png")
    options = (*SHAPE, "--steps", "1", "--val-fraction", "0.4")
    code, _, said = igpt("train", tmp_path / "all/photos", "--out", tmp_path / "run", *options)
    assert code == 0, said
    if older:
        saved = json.loads((tmp_path / "run/train.json").read_text())
        del saved["data"]["names"]
        (tmp_path / "run/train.json").write_text(json.dumps(saved))
    learned = TokenDataset(tmp_path / "run/tokens")
    names = {learned.names[i] for i in learned.split("train", 0.4)}
    for folder in ("all/photos", "all"):
        code, printed, said = igpt("eval", tmp_path / "run", tmp_path / folder, "--split", "val", "--json")
        prefix = "photos/" if folder == "all" else ""
        held_out = [f"{k:02d}.png" for k in range(40) if split_hash(f"{prefix}{k:02d}.png") < int(0.4 * 2**64)]
        found = json.loads(printed)
        assert code == 0 and found["images"] == len(held_out) and found["seen"] == len(names & {*held_out}), said
    assert found["seen"] > 0


def test_what_nobody_can_know_is_said(igpt, tmp_path, learned):
    np.save(tmp_path / "some.npy", learned[0][:5])
    tokens = tmp_path / "run" / "tokens"
    (tokens / "palette.npy").write_bytes(b"")  # which is no reason to end
    code, printed, said = igpt("eval", tmp_path / "run", tmp_path / "some.npy", "--json")
    assert code == 0 and json.loads(printed)["seen"] is None and "is not known" in said
    shutil.rmtree(tokens)
    code, printed, said = igpt("eval", tmp_path / "run", tmp_path / "some.npy", "--json")
    assert code == 0 and json.loads(printed)["seen"] is None and "is not known" in said


def test_a_checkpoint_belongs_to_its_run_by_whatever_way_it_is_given(igpt, tmp_path, learned, monkeypatch):
    images, run = tmp_path / "images.npy", tmp_path / "run"
    (checkpoint,) = (run / "checkpoints").iterdir()
    (tmp_path / "best").symlink_to(checkpoint)
    for folder, model in ((tmp_path, "best"), (checkpoint, "."), (checkpoint.parent, checkpoint.name)):
        monkeypatch.chdir(folder)
        code, printed, said = igpt("eval", model, images, "--json")
        assert code == 0 and json.loads(printed)["seen"] == len(learned[1]), said
        code, printed, said = igpt("eval", model, images, "--split", "val", "--json")
        assert code == 0 and json.loads(printed)["images"] == 40 - len(learned[1]), said


def test_what_a_copied_or_linked_checkpoint_had_learned_from_goes_on(igpt, tmp_path, learned):
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "link").symlink_to(checkpoint)
    others = np.random.default_rng(1).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "others.npy", others)
    for way, wanted in (("copy", None), ("link", len(learned[1]))):
        options = ("--init", tmp_path / way, "--steps", "1", "--resize", "none")
        code, _, said = igpt("train", tmp_path / "others.npy", "--out", tmp_path / f"on-{way}", *options)
        assert code == 0, said
        code, printed, said = igpt("eval", tmp_path / f"on-{way}", tmp_path / "images.npy", "--json")
        assert code == 0 and json.loads(printed)["seen"] == wanted, said
        assert wanted or "is not known" in said
    code, printed, said = igpt("eval", tmp_path / "copy", tmp_path / "images.npy", "--json")
    assert code == 0 and json.loads(printed)["seen"] is None and "is not known" in said


def test_a_run_that_a_model_was_given_to_in_python_does_not_know(igpt, tmp_path, learned):
    model = open_model(tmp_path / "run").model
    others = np.random.default_rng(1).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "others.npy", others)
    tokens = tokenize(tmp_path / "others.npy", model.palette, tmp_path / "tokens", (6, 6), resize="none", workers=0)
    (tmp_path / "on").mkdir()
    stale = json.loads((tmp_path / "run/train.json").read_text())  # of a run that ended before it saved: not this one's
    stale["command"]["init"] = "openai/imagegpt-small"
    (tmp_path / "on/train.json").write_text(json.dumps(stale))
    train(tokens, tmp_path / "on", init=model, steps=1, batch=4, val_fraction=0.4)
    train(tokens, tmp_path / "on", resume=True, steps=2, batch=4, val_fraction=0.4)
    code, printed, said = igpt("eval", tmp_path / "on", tmp_path / "tokens", "--split", "val", "--json")
    assert code == 0 and json.loads(printed)["seen"] is None and "is not known" in said


def test_a_name_on_the_hub_is_no_place_around_here(igpt, tmp_path, learned, monkeypatch):
    saved = json.loads((tmp_path / "run/train.json").read_text())
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    saved["command"]["init"] = "openai/imagegpt-small"
    (tmp_path / "other/train.json").write_text(json.dumps(saved))
    others = np.random.default_rng(1).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "others.npy", others)
    monkeypatch.chdir(tmp_path / "run")
    code, printed, said = igpt("eval", "../other", "../others.npy", "--json")
    assert code == 0 and json.loads(printed)["seen"] == 0, said


def test_nothing_is_said_of_published_weights(tmp_path, learned, monkeypatch):
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    shutil.copytree(checkpoint, tmp_path / "copy")
    heard = []
    monkeypatch.setattr("igpt_fast.cli.seen.say", heard.append)
    for path in ("openai/imagegpt-small", tmp_path / "copy"):
        say_seen(replace(load_checkpoint(checkpoint), path=Path(path)), None, "some")
    assert len(heard) == 1 and "is not known" in heard[0]


def test_images_that_are_read_in_another_way_are_known_by_their_names_or_not_at_all(igpt, tmp_path, learned):
    images, indices = learned
    code, printed, said = igpt("eval", tmp_path / "run", tmp_path / "images.npy", "--bands", "3,2,1", "--json")
    assert code == 0 and json.loads(printed)["seen"] == len(indices) and f"from {len(indices)} of these" in said
    np.save(tmp_path / "copy.npy", images[1:])
    code, printed, said = igpt("eval", tmp_path / "run", tmp_path / "copy.npy", "--bands", "3,2,1", "--json")
    assert code == 0 and json.loads(printed)["seen"] is None and "is not known" in said
    crops = ("--palette", tmp_path / "run/tokens/palette.npy", "--size", "6", "--views", "2", "-o", tmp_path / "crops")
    assert igpt("tokenize", tmp_path / "images.npy", *crops)[0] == 0
    code, printed, _ = igpt("eval", tmp_path / "run", tmp_path / "crops", "--json")
    assert code == 0 and json.loads(printed)["seen"] == 2 * len(indices)
    shutil.copytree(tmp_path / "crops", tmp_path / "others")
    meta = json.loads((tmp_path / "others/meta.json").read_text())
    (tmp_path / "others/meta.json").write_text(json.dumps({**meta, "source_stamp": "other", "resize": "none"}))
    code, printed, _ = igpt("eval", tmp_path / "run", tmp_path / "others", "--json")
    assert code == 0 and json.loads(printed)["seen"] is None


def go_on(igpt, folder, out, init, data="others.npy", *more):
    if not (folder / "others.npy").exists():
        others = np.random.default_rng(1).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
        np.save(folder / "others.npy", others)
    options = ("--init", init, "--steps", "1", "--resize", "none", *more)
    code, _, said = igpt("train", folder / data, "--out", folder / out, *options)
    assert code == 0, said
    return TokenDataset(folder / out / "tokens")


def seen(igpt, model, data, *more):
    code, printed, said = igpt("eval", model, data, "--json", *more)
    assert code == 0, said
    return json.loads(printed)["seen"]


def change(run, **command):
    """What the run's train.json says of its command; None: nothing."""
    saved = json.loads((run / "train.json").read_text())
    saved["command"] = {k: v for k, v in {**saved["command"], **command}.items() if v is not None}
    (run / "train.json").write_text(json.dumps(saved))


def test_all_that_a_line_of_runs_has_learned_from_counts(igpt, tmp_path, learned):
    images, indices = learned
    tokens = go_on(igpt, tmp_path, "on", tmp_path / "run", "others.npy", "--val-fraction", "0.3")
    last = tokens.split("train", 0.3)
    assert seen(igpt, tmp_path / "on", tmp_path / "others.npy") == len(last)
    assert seen(igpt, tmp_path / "on", tmp_path / "images.npy") == len(indices)
    np.save(tmp_path / "all.npy", np.concatenate([np.load(tmp_path / "others.npy"), images]))
    assert seen(igpt, tmp_path / "on", tmp_path / "all.npy") == len(last) + len(indices)
    go_on(igpt, tmp_path, "more", tmp_path / "run", "images.npy", "--val-fraction", "0.1")
    more = TokenDataset(tmp_path / "run/tokens").split("train", 0.1)
    assert seen(igpt, tmp_path / "more", tmp_path / "images.npy") == len(more)


def test_what_is_known_counts_though_not_all_is(igpt, tmp_path, learned):
    shutil.copytree(next((tmp_path / "run/checkpoints").iterdir()), tmp_path / "copy")
    tokens = go_on(igpt, tmp_path, "on", tmp_path / "copy")
    assert seen(igpt, tmp_path / "on", tmp_path / "others.npy") == len(tokens.split("train", 0.1))


def test_images_of_another_size_are_not_known(igpt, tmp_path, learned):
    go_on(igpt, tmp_path, "on", tmp_path / "run", "others.npy", "--size", "5", "--resize", "paper")
    np.save(tmp_path / "new.npy", np.random.default_rng(2).integers(0, 256, (5, 5, 5, 3), dtype=np.uint8))
    assert seen(igpt, tmp_path / "on", tmp_path / "new.npy") is None


def test_a_run_that_says_it_began_with_itself_ends(igpt, tmp_path, learned):
    change(tmp_path / "run", init=str(tmp_path / "run"))
    assert seen(igpt, tmp_path / "run", tmp_path / "images.npy") == len(learned[1])


def test_what_a_run_began_with_is_gone_or_says_nothing(igpt, tmp_path, learned):
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    open_model(tmp_path / "run").model.save_pretrained(tmp_path / "exported")
    shutil.copytree(tmp_path / "run", tmp_path / "bare")
    (tmp_path / "bare/train.json").unlink()
    shutil.copytree(checkpoint, tmp_path / "gone")
    for init in ("exported", "bare", "gone"):
        go_on(igpt, tmp_path, f"on-{init}", tmp_path / init)
    shutil.rmtree(tmp_path / "gone")
    for init in ("exported", "bare", "gone"):
        assert seen(igpt, tmp_path / f"on-{init}", tmp_path / "images.npy") is None, init


def test_a_run_is_found_from_all_that_lies_in_it(igpt, tmp_path, learned, monkeypatch):
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    elsewhere = tmp_path / "disk" / "a" / checkpoint.name
    shutil.copytree(checkpoint, elsewhere)
    ways = {"run": tmp_path / "run", "folder": tmp_path / "run/checkpoints", "itself": checkpoint}
    for name, init in ways.items():
        go_on(igpt, tmp_path, name + "-on", init)
        assert seen(igpt, tmp_path / f"{name}-on", tmp_path / "images.npy") == len(learned[1]), name
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(elsewhere)  # on another disk
    assert seen(igpt, tmp_path / "itself-on", tmp_path / "images.npy") == len(learned[1])
    change(tmp_path / "run-on", init="run", from_tokens=None)  # an older run notes what was typed
    monkeypatch.chdir(tmp_path)
    assert seen(igpt, "run-on", "images.npy") == len(learned[1])


def test_published_weights_have_seen_nothing_of_ours(igpt, tmp_path, learned, monkeypatch):
    go_on(igpt, tmp_path, "on", tmp_path / "run")
    change(tmp_path / "on", init="openai/imagegpt-small")
    for folder in (tmp_path / "run", tmp_path):  # a run of other images, and none
        monkeypatch.chdir(folder)
        assert seen(igpt, tmp_path / "on", tmp_path / "images.npy") == 0
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf/model.ckpt-1000000.index").touch()
    change(tmp_path / "on", init=str(tmp_path / "tf/model.ckpt-1000000"))
    assert seen(igpt, tmp_path / "on", tmp_path / "images.npy") == 0
    (tmp_path / "hf").mkdir()
    for text in ('{"model_type": "imagegpt"}', "{"):
        (tmp_path / "hf/config.json").write_text(text)
        change(tmp_path / "on", init=str(tmp_path / "hf"))
        assert seen(igpt, tmp_path / "on", tmp_path / "images.npy") == 0
