"""`igpt-fast convert` and `eval`, and published weights as the MODEL of every command."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from openai_checkpoint import PREFIX
from PIL import Image
from published import make, same
from tiny import CONFIG, FAST, write_tokens

from igpt_fast import ImageGPT, Palette, checkpoint
from igpt_fast.checkpoint import load_checkpoint, save_checkpoint
from igpt_fast.evaluate import evaluate
from igpt_fast.train import train


@pytest.fixture
def dataset(tmp_path):
    return write_tokens(tmp_path / "data")


@pytest.fixture
def weights(tmp_path, dataset):
    make(colors=16, size=(4, 6)).save_pretrained(tmp_path / "weights", dataset.palette)
    return tmp_path / "weights"


def test_openais_checkpoint_becomes_theirs_and_ours(igpt, tmp_path):
    palette = Palette(torch.linspace(-1, 1, 21).reshape(7, 3))
    palette.save(tmp_path / "kmeans_centers.npy")
    words = ("convert", PREFIX, tmp_path / "w", "--size", "2x3", "--palette", tmp_path / "kmeans_centers.npy", "--json")
    code, printed, _ = igpt(*words)
    facts = json.loads(printed)
    assert code == 0 and facts["layout"] == "hf" and facts["palette"] and facts["dtype"] == "float32"
    original = ImageGPT.from_pretrained(PREFIX, size=(2, 3))
    assert facts["parameters"] == original.num_parameters() and facts["config"] == original.config.to_dict()
    found = ImageGPT.from_pretrained(tmp_path / "w")
    assert same(found, original) and torch.equal(found.palette.centers, palette.centers)
    code, _, said = igpt("convert", f"{PREFIX}.index", tmp_path / "run", "--to", "run", "--size", "2x3")
    assert code == 0 and "without a palette" in said
    checkpoint = load_checkpoint(tmp_path / "run")
    assert same(checkpoint.model, original) and checkpoint.step == 131000


def test_runs_become_directories_that_transformers_loads(igpt, tmp_path, dataset):
    run = train(dataset, tmp_path / "run", CONFIG, **{**FAST, "steps": 2}).run
    code, _, said = igpt("convert", run, tmp_path / "w", "--dtype", "bfloat16")
    assert code == 0 and "ar model of" in said
    found = ImageGPT.from_pretrained(tmp_path / "w")
    assert same(found, load_checkpoint(run).model.bfloat16()) and len(found.palette) == 16
    code, _, said = igpt("convert", run, tmp_path / "w")
    assert code == 2 and "holds weights already" in said
    assert igpt("convert", run, tmp_path / "w", "--overwrite")[0] == 0
    assert ImageGPT.from_pretrained(tmp_path / "w").wte.dtype == torch.float32


def test_a_converted_run_takes_nothings_place(igpt, tmp_path, dataset, weights, monkeypatch):
    run = train(dataset, tmp_path / "run", CONFIG, **{**FAST, "steps": 2, "save_every": 1}).run
    before = sorted(run.rglob("*"))
    for more in ((), ("--overwrite",)):
        code, _, said = igpt("convert", weights, run, "--to", "run", *more)
        assert code == 2 and "which would be lost; choose another place" in said
    assert sorted(run.rglob("*")) == before
    assert igpt("convert", run, tmp_path / "new", "--to", "run")[0] == 0
    code, _, said = igpt("convert", weights, tmp_path / "new", "--to", "run")
    assert code == 2 and "holds weights already; choose another place, or replace them with --overwrite" in said
    assert igpt("convert", weights, tmp_path / "new", "--to", "run", "--overwrite")[0] == 0
    found = load_checkpoint(tmp_path / "new")
    assert found.step == 0 and same(found.model, ImageGPT.from_pretrained(weights))
    assert os.listdir(tmp_path / "new" / "checkpoints") == ["step-00000000"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for more in ((), ("--overwrite",)):  # into a directory that is there, and that others may hold
        assert igpt("convert", weights, tmp_path / "link", "--to", "run", *more)[0] == 0
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["checkpoints"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert igpt("convert", weights, ".", "--to", "run")[0] == 0 and os.listdir(tmp_path / "here") == ["checkpoints"]


def test_a_run_that_cannot_be_written_is_called_as_it_was_typed(igpt, tmp_path, weights, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, said = igpt("convert", weights, tmp_path / "new", "--to", "run")
    assert code == 2 and f"cannot save step 0 in {tmp_path / 'new' / 'checkpoints'}: No space left" in said
    assert not (tmp_path / "new").exists()


def test_the_step_of_a_checkpoint_counts_more_than_its_name(igpt, tmp_path, dataset):
    save_checkpoint(tmp_path / "run-7", 0, make(colors=16, size=(4, 6)), dataset.palette)
    assert igpt("convert", tmp_path / "run-7", tmp_path / "new", "--to", "run")[0] == 0
    assert os.listdir(tmp_path / "new" / "checkpoints") == ["step-00000000"]


def test_bert_weights_are_converted_and_probed(igpt, tmp_path, dataset):
    save_checkpoint(tmp_path / "run", 1, make(colors=16, size=(4, 6), objective="bert"), dataset.palette)
    code, _, said = igpt("convert", tmp_path / "run", tmp_path / "w")
    assert code == 0 and "transformers has no BERT mode" in said
    code, _, said = igpt("eval", tmp_path / "w", dataset.path)
    assert code == 2 and "gives whole images no likelihood" in said
    code, _, said = igpt("sample", tmp_path / "w", "-o", tmp_path / "s.png")
    assert code == 2 and "cannot be sampled from" in said


def test_eval_of_weights_and_of_runs(igpt, tmp_path, dataset, weights):
    want = evaluate(ImageGPT.from_pretrained(weights), dataset)
    code, printed, said = igpt("eval", weights, dataset.path, "--json")
    facts = json.loads(printed)
    assert code == 0 and facts["nats_per_pixel"] == want.nats_per_pixel and facts["step"] is None
    assert f"{want.nats_per_pixel:.4f} nats per pixel (95 % interval {want.low:.4f} – {want.high:.4f})" in said
    images = tmp_path / "data" / "images.npy"
    code, printed, _ = igpt("eval", weights, images, "--resize", "none", "--json", "--limit", 9)
    facts = json.loads(printed)
    assert code == 0 and facts["images"] == 9 and facts["seen"] is None
    run = train(dataset, tmp_path / "run", CONFIG, **{**FAST, "steps": 2}).run
    _, printed, said = igpt("eval", run, dataset.path, "--json")
    held_out = len(dataset.split("val"))
    assert json.loads(printed)["seen"] == 40 - held_out and "--split val leaves them out" in said
    _, printed, said = igpt("eval", run, dataset.path, "--json", "--split", "val")
    assert json.loads(printed)["images"] == held_out and "had learned" not in said
    few = train(dataset, tmp_path / "few", CONFIG, **{**FAST, "steps": 2, "val_fraction": 0.05}).run
    _, printed, said = igpt("eval", few, dataset.path, "--json", "--split", "val")  # what this run has held out
    assert 0 < json.loads(printed)["images"] == len(dataset.split("val", 0.05)) < held_out and "learned" not in said
    _, _, said = igpt("eval", few, dataset.path, "--val-fraction", "0.5")  # whose val the run has learned from, too
    assert "had learned from" in said and "leaves them out" not in said


def test_eval_skips_what_is_broken_and_names_no_place_that_goes_away(igpt, tmp_path, weights):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((4, 6, 3), 40, np.uint8)).save(tmp_path / name)
    (tmp_path / "photos").mkdir()
    os.rename(tmp_path / "a.png", tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"")
    code, _, said = igpt("eval", weights, tmp_path / "photos")
    assert code == 2 and "mend or remove the file, or leave such files out with --on-error skip" in said
    code, printed, said = igpt("eval", weights, tmp_path / "photos", "--on-error", "skip", "--json")
    assert code == 0 and json.loads(printed)["images"] == 1 and "skipped 1 image that could not be read" in said
    assert "tokenised 1 images, 4x6, 16 colours" in said and "igpt-fast-" not in said
    (tmp_path / "photos" / "bad.png").unlink()
    code, _, said = igpt("eval", weights, tmp_path / "photos", "--split", "val", "--val-fraction", "0")
    assert code == 2 and f"{tmp_path / 'photos'}: no image is left to score" in said
    (tmp_path / "b.png").write_bytes(b"")
    code, _, said = igpt("complete", weights, tmp_path / "b.png", "-o", tmp_path / "c.png")
    assert code == 2 and said.endswith("(0 bytes); mend or remove the file\n")


def test_float16_is_refused_where_it_overflows_and_measured_in_float32(igpt, tmp_path, dataset):
    model = make(colors=16, size=(4, 6))
    with torch.no_grad():
        model.blocks[0].mlp.proj.weight.mul_(3e4 / model.blocks[0].mlp.proj.weight.abs().max())  # activations overflow
    model.save_pretrained(tmp_path / "wide", dataset.palette)
    assert igpt("convert", tmp_path / "wide", tmp_path / "half", "--dtype", "float16")[0] == 0
    code, printed, _ = igpt("eval", tmp_path / "half", dataset.path, "--json")
    assert code == 0 and np.isfinite(json.loads(printed)["nats_per_pixel"])
    model.wpe.data[3, 4] = 1e5
    model.save_pretrained(tmp_path / "wide", dataset.palette, overwrite=True)
    code, _, said = igpt("convert", tmp_path / "wide", tmp_path / "deep" / "half", "--dtype", "float16")
    assert code == 2 and "error: wpe has numbers beyond 6.55e+04, the most of torch.float16" in said
    assert not (tmp_path / "deep").exists()


def test_published_weights_sample_and_complete(igpt, tmp_path, weights):
    code, printed, said = igpt("sample", weights, "-n", 2, "-o", tmp_path / "s.png", "--json")
    assert code == 0 and json.loads(printed)["step"] is None and f"from {weights}" in said
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(photo)
    assert igpt("complete", weights, photo, "-n", 2, "-o", tmp_path / "c.png")[0] == 0
    assert Image.open(tmp_path / "s.png").size[0] > 100 and Image.open(tmp_path / "c.png").size[0] > 100


def test_published_weights_are_probed_with_a_test_set_of_its_own(igpt, tmp_path):
    pytest.importorskip("sklearn", reason="the probe needs the [probe] extra")
    from labelled import COLORS, PALETTE, SIZE
    from labelled import write_tokens as write_labelled

    make(colors=COLORS, size=SIZE).save_pretrained(tmp_path / "w", PALETTE)
    learn = write_labelled(tmp_path / "a", np.arange(60) % 3)
    other = write_labelled(tmp_path / "b", np.arange(30) % 2, seed=1)
    words = ("--layers", "1,2", "--json", "-o", tmp_path / "p.png")
    code, printed, _ = igpt("probe", tmp_path / "w", learn.path, "--test", other.path, *words)
    facts = json.loads(printed)
    assert code == 0 and (facts["train"], facts["test"], facts["step"]) == (60, 30, None)
    # A class that is not tested on stays an answer, and may be a wrong one.
    assert not facts["left_out"] and len(facts["classes"]) == 3 and facts["test_fraction"] == pytest.approx(1 / 3)
    images = (tmp_path / "a" / "images.npz", "--test", tmp_path / "b" / "images.npz", "--resize", "none")
    again = json.loads(igpt("probe", tmp_path / "w", *images, *words)[1])
    assert [layer["accuracy"] for layer in again["layers"]] == [layer["accuracy"] for layer in facts["layers"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "WEIGHTS", "TOKENS", "--resize", "none"), "holds tokens, which are read already; leave out --resize"),
        (("eval", "WEIGHTS", "TOKENS", "--on-error", "skip"), "which are read already; leave out --on-error"),
        (("eval", "WEIGHTS", "TOKENS", "--val-fraction", "2"), "--val-fraction is 2.0"),
        (("eval", "nowhere", "TOKENS"), "nowhere is not there; give a directory with config.json"),
        (("convert", "nowhere", "out"), "nowhere is not there"),
        (("convert", "WEIGHTS", "out", "--size", "0x5"), "--size '0x5' is not a size"),
        (
            ("convert", "WEIGHTS", "out", "--size", "99999"),
            "of 99999x99999 pixels and 24 channels do not fit into memory",
        ),
        (("convert", "WEIGHTS", "out", "--heads", "7"), "heads changes nothing, for its config.json says how many"),
        (("convert", "WEIGHTS", "out", "--palette", "nowhere.npy"), "there is no palette nowhere.npy"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(igpt, tmp_path, dataset, weights, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, printed, said = igpt(*({"WEIGHTS": weights, "TOKENS": dataset.path}.get(word, word) for word in words))
    assert code == 2 and not printed and message in said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_in_bf16_commands_find_nearly_the_same(igpt, tmp_path):
    from labelled import PALETTE, make
    from labelled import write_tokens as write_labelled

    dataset, model = write_labelled(tmp_path, np.arange(20) % 2), make(classes=2)
    with torch.no_grad():
        for weight in (model.wtet, model.wclf):
            weight.normal_(0, 0.3)
    save_checkpoint(tmp_path / "run", 1, model, PALETTE)
    found = {}
    for precision in ("fp32", "bf16"):
        how, out = ("--precision", precision), tmp_path / f"{precision}.csv"
        code, printed, _ = igpt("eval", tmp_path / "run", dataset.path, "--json", *how)
        assert code == 0 and igpt("classify", tmp_path / "run", dataset.path, "-o", out, *how)[0] == 0
        shares = [float(line.split(",")[2]) for line in out.read_text().splitlines()[1:]]
        found[precision] = np.array([json.loads(printed)["nats_per_pixel"], *shares])
    off = np.abs(found["fp32"] - found["bf16"])
    assert 0 < off[0] < 0.02 and 0 < off[1:].max() < 0.02
