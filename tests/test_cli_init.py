"""`igpt-fast train --init`: fine-tuning begins with other weights, at another size too, and refuses what cannot fit."""

import numpy as np
import pytest
import torch
from definition import opinionated
from test_cli_train import FAST, MODEL, call
from tiny import CONFIG, same, weights, write_tokens
from tiny import FAST as OPTIONS

from igpt_fast.checkpoint import load_checkpoint, save_checkpoint
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.model import ImageGPT
from igpt_fast.positions import resized
from igpt_fast.run import read_options
from igpt_fast.tokens import TokenDataset
from igpt_fast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> TokenDataset:
    """The same kind of images in the same colours, of another size."""
    return write_tokens(tmp_path_factory.mktemp("larger"), size=(6, 8))


def make(**fields) -> ImageGPT:
    return opinionated(ImageGPT(Config.from_dict({**CONFIG.to_dict(), **fields})), std=0.2)


@pytest.mark.parametrize("fields", [{}, {"positions": "axial", "pattern": "row", "bias": True, "classes": 3}], ids=str)
def test_the_first_step_has_the_given_weights(dataset, larger, tmp_path, fields):
    model = make(**fields)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = train(larger, tmp_path / "run", init=model, **{**OPTIONS, "steps": 1, "warmup": 1, "lr": 1e-30})
    assert result.model.config == Config.from_dict({**model.config.to_dict(), "size": (6, 8), "classes": 0})
    want = resized(before, model.config.size, (6, 8))
    assert all(torch.equal(p, want[name]) for name, p in result.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the given model stays as it is"
    with pytest.raises(InputError, match="init changes nothing when resuming"):
        train(larger, tmp_path / "run", resume=True, init=model, **OPTIONS)
    other = Config.from_dict({**model.config.to_dict(), "layers": 3, "size": (6, 8), "classes": 0})
    with pytest.raises(InputError, match="the weights to begin with have layers 2, not 3"):
        train(larger, tmp_path / "other", other, init=model, **OPTIONS)
    assert not (tmp_path / "other").exists()


def test_it_says_what_it_begins_with(dataset, larger, tmp_path, monkeypatch, capsys, caplog):
    first, run = tmp_path / "first", tmp_path / "run"
    assert call(monkeypatch, capsys, dataset.path, "--out", first, *MODEL, *FAST)[0] == 0
    options = ["--init", first, "--pattern", "row|neighborhood(3)", "--size", "6x8"]
    code, _, err = call(monkeypatch, capsys, larger.path, "--out", run, *FAST, *options)
    assert code == 0 and f"beginning with the weights of step 9 of {first}" in err
    assert "position embeddings resampled from 4x6 to 6x8 pixels" in caplog.text
    saved = read_options(run)
    assert saved["command"]["init"] == str(first) and saved["config"]["layers"] == 2
    assert saved["config"]["pattern"] == "row | neighborhood(3)" and saved["config"]["size"] == [6, 8]
    assert call(monkeypatch, capsys, larger.path, "--out", run, "--resume", "--steps", "10")[0] == 0


def test_two_runs_are_equal_to_the_bit(dataset, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "first", 3, make(), dataset.palette)
    for name in "ab":
        words = (
            dataset.path,
            "--out",
            tmp_path / name,
            *FAST,
            "--init",
            tmp_path / "first",
            "--pattern",
            "row / dense",
        )
        assert call(monkeypatch, capsys, *words)[0] == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_images_are_read_in_the_weights_colours(dataset, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    make().save_pretrained(tmp_path / "weights", dataset.palette)
    words = [tmp_path / "images.npy", "--resize", "none", "--size", "8", "--workers", "0", *FAST]
    run = tmp_path / "run"
    code, _, err = call(monkeypatch, capsys, *words, "--out", run, "--init", tmp_path / "weights")
    assert code == 0, err
    assert torch.equal(load_checkpoint(run).palette.centers, dataset.palette.centers)
    words = [tmp_path / "images.npy", "--out", run, "--resume", "--steps", "10"]
    assert call(monkeypatch, capsys, *words)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "nowhere"], "nowhere is not there"),
        (["--init", "FIRST", "--layers", "3"], "the weights to begin with have layers 2, not 3"),
        (["--init", "FIRST", "--objective", "bert"], "have objective ar, not bert"),
        (["--init", "FIRST", "--positions", "axial"], "have positions learned, not axial"),
        (["--init", "FIRST", "--pattern", "rwo"], "no pattern named 'rwo'"),
        (["--init", "FIRST", "--resume"], "holds no checkpoint to go on from"),
        (["--init", "FIRST", "--palette", "PALETTE"], "--palette changes nothing with --init"),
        (["--init", "FIRST", "--size", "5"], "size is [4, 6], not [5, 5]"),
        (["--init", "OTHER"], "palette"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(dataset, tmp_path, monkeypatch, capsys, arguments, message):
    save_checkpoint(tmp_path / "FIRST", 3, make(), dataset.palette)
    other = type(dataset.palette)(dataset.palette.centers * 0.5)
    save_checkpoint(tmp_path / "OTHER", 3, make(), other)
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, dataset.path, "--out", tmp_path / "run", *arguments)
    assert code == 2 and out == "" and message in err
    assert [line.startswith("error: ") for line in err.splitlines() if "beginning with" not in line] == [True]
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_its_own_weights(dataset, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "first", 3, make(), dataset.palette)
    words = (dataset.path, "--out", tmp_path / "run", "--init", tmp_path / "first")
    assert call(monkeypatch, capsys, *words, *FAST)[0] == 0
    code, _, err = call(monkeypatch, capsys, *words, "--resume")
    assert code == 2 and "--init changes nothing with --resume" in err
    save_checkpoint(tmp_path / "gray", 3, make())
    np.save(tmp_path / "images.npy", np.zeros((30, 4, 6, 3), np.uint8))
    words = (tmp_path / "images.npy", "--out", tmp_path / "new", "--init", tmp_path / "gray")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "has no palette: give --palette" in err and not (tmp_path / "new").exists()
