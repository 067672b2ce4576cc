"""A run's options and records: what makes no sense, or would change a run midway, is refused by name."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, FAST, write_tokens

from igpt_fast import train as module
from igpt_fast.checkpoint import load_checkpoint, save_checkpoint
from igpt_fast.config import Config
from igpt_fast.errors import InputError
from igpt_fast.metrics import read_metrics
from igpt_fast.model import ImageGPT
from igpt_fast.options import Options
from igpt_fast.run import (
    check_run,
    circumstances,
    diverged,
    drop_later_pictures,
    locked,
    picture_of,
    read_options,
    say_differences,
)
from igpt_fast.tokens import TokenDataset
from igpt_fast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_tokens(tmp_path_factory.mktemp("data"))


@given(steps=st.integers(2, 500), data=st.data())
def test_the_learning_rate_warms_up_and_falls_to_zero(steps, data):
    warmup = data.draw(st.integers(0, steps))
    options = Options(steps=steps, warmup=warmup, lr=2.0)
    rates = [options.rate(step, 32) for step in range(steps + 1)]
    assert np.allclose(rates[:warmup], [2.0 * (step + 1) / max(1, warmup) for step in range(warmup)])
    assert rates[warmup] == 2.0 if warmup < steps else rates[-1] == 2.0
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert warmup == steps or abs(rates[steps]) < 1e-12


def test_the_standard_learning_rate_is_the_papers_and_less_for_noise_and_width():
    assert Options(batch=128).peak_lr(512) == Options(batch=512).peak_lr(64) == 3e-3
    assert Options(batch=32).peak_lr(512) == 1.5e-3 == Options(batch=128).peak_lr(1024)
    assert Options(batch=1, lr=0.5).peak_lr(9999) == 0.5


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"batch": -1}, "--batch is -1"),
        ({"batch": 6, "accumulate": 4}, "--accumulate is 4; use a divisor of the batch"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"warmup": 2000}, "--warmup is 2000"),
        ({"clip": -1.0}, "--clip is -1.0"),
        ({"precision": "fp16"}, "--precision is fp16; use bf16 or fp32"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**64}, "--seed is 18446744073709551616; use at most 18,446,744,073,709,551,615"),
        ({"batch": 10**20}, "--batch is 100000000000000000000; use at most 1,000,000"),
        ({"steps": 10**400}, "use at most 1,000,000,000,000"),
        ({"steps": "10"}, "--steps is '10'; use a whole number"),
        ({"lr": 10**400}, "use a smaller number"),
        ({"lr": "abc"}, "--lr is 'abc'; use a number"),
        ({"flip": 1}, "--flip is 1; use true or false"),
        ({"precision": None}, "--precision is None; use a word"),
        ({"save_every": -5}, "--save-every is -5"),
    ],
)
def test_options_that_make_no_sense(options, what):
    with pytest.raises(InputError) as caught:
        Options(**options)
    assert what in str(caught.value)


def test_numbers_of_numpy_are_numbers(dataset, tmp_path):
    given = {"steps": np.int64(1), "seed": np.int32(3), "lr": np.float32(0.01), "clip": 1}
    train(dataset, tmp_path, CONFIG, **{**FAST, **given})
    saved = read_options(tmp_path)["options"]
    assert [saved[name] for name in given] == [1, 3, float(np.float32(0.01)), 1.0] and type(saved["lr"]) is float


def test_a_loss_that_is_not_finite_names_step_and_remedy_and_keeps_the_last_good_checkpoint(dataset, tmp_path):
    with pytest.raises(InputError) as caught:
        train(dataset, tmp_path, CONFIG, **{**FAST, "lr": 1e30, "warmup": 0, "save_every": 1})
    message = str(caught.value)
    assert re.search(r"at step \d+ \(learning rate \S+e\+(29|30), bf16\)", message), message
    assert "--lr" in message and "step-0000000" in message and "--resume" in message
    assert all(torch.isfinite(p).all() for p in load_checkpoint(tmp_path).model.parameters())
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path) if "loss" in row)


def test_a_loss_that_is_not_finite_is_told_with_the_rate_of_the_step_that_made_it(tmp_path):
    options = Options(steps=10, warmup=4, lr=4.0)
    assert "(learning rate 1, bf16)" in str(diverged(tmp_path, "the loss is nan", options, 32, step=1))


def test_a_checkpoint_that_does_not_say_so_is_of_one_process(capsys):
    assert circumstances(Options(), torch.device("cpu"), 3)["processes"] == 3
    say_differences({}, {"processes": 1})
    assert not capsys.readouterr().err
    say_differences({}, {"processes": 2})
    assert capsys.readouterr().err == "changed since the checkpoint: processes 1 → 2\n"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("layers", {"config": {"layers": 3}}),
        ("width", {"config": {"width": 64, "mlp_width": 256}}),
        ("objective", {"config": {"objective": "bert"}}),
        ("seed", {"options": {"seed": 1}}),
        ("batch", {"options": {"batch": 12}}),
        ("flip", {"options": {"flip": True}}),
        ("pattern", {"config": {"pattern": ["row", "dense"]}}),
        ("ema", {"options": {"ema": 0.5}}),
        ("val_fraction", {"options": {"val_fraction": 0.2}}),
        ("tokens", {"data": {"seed": 9}}),
        ("images", {"data": {"count": 41}}),
        ("palette", {"data": {"palette": True}}),
        ("size", {"data": {"size": (6, 4)}, "config": {"size": (6, 4)}}),
    ],
)
def test_resuming_with_something_else_names_it(dataset, tmp_path, field, change):
    train(dataset, tmp_path / "run", CONFIG, **{**FAST, "steps": 1})
    before = sorted((tmp_path / "run").rglob("*"))
    other, data = dataset, dict(change.get("data", {}))
    if data.pop("palette", False):
        shutil.copytree(dataset.path, tmp_path / "tokens")
        np.save(tmp_path / "tokens/palette.npy", dataset.palette.centers.numpy() * 0.5)
        other = TokenDataset(tmp_path / "tokens")
    elif data:
        other = write_tokens(tmp_path / "other", **data)
    config = Config.from_dict({**CONFIG.to_dict(), **change.get("config", {})})
    with pytest.raises(InputError, match=f"--resume with another {field}: .* was trained with"):
        train(other, tmp_path / "run", config, resume=True, **{**FAST, "steps": 2, **change.get("options", {})})
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_model_that_does_not_fit_the_data(dataset, tmp_path):
    for fields in ({"colors": 32}, {"size": (6, 4)}):
        with pytest.raises(InputError, match="the images are 4x6 in 16 colours, the model is made for"):
            train(dataset, tmp_path / "run", Config.from_dict({**CONFIG.to_dict(), **fields}), **FAST)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="needs a config"):
        train(dataset, tmp_path / "run", **FAST)


def test_runs_that_cannot_be_started_or_resumed(dataset, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint to go on from"):
        train(dataset, tmp_path, CONFIG, resume=True, **FAST)
    save_checkpoint(tmp_path / "weights", 3, ImageGPT(CONFIG), dataset.palette)
    with pytest.raises(InputError, match=r"step-00000003 holds weights alone: begin a run with them, as --init"):
        train(dataset, tmp_path / "weights", CONFIG, resume=True, **FAST)
    train(dataset, tmp_path, CONFIG, **{**FAST, "steps": 1})
    with pytest.raises(InputError, match="already holds step-00000001: add --resume"):
        train(dataset, tmp_path, CONFIG, **FAST)
    with locked(tmp_path), pytest.raises(InputError, match="another process is training"):
        train(dataset, tmp_path, CONFIG, resume=True, **FAST)
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(InputError, match="cannot write into"):
        check_run(tmp_path / "file/run", resume=False)
    check_run(tmp_path / "a/b/c", resume=False)
    assert not (tmp_path / "a").exists(), "asking leaves no trace"
    for device in ("abacus", "meta"):
        with pytest.raises(InputError, match=f"device '{device}' is not supported: use auto, cpu or cuda"):
            train(dataset, tmp_path / "new", CONFIG, device=device, **FAST)
    assert not (tmp_path / "new").exists()


def test_damaged_records_are_named(dataset, tmp_path):
    train(dataset, tmp_path, CONFIG, **{**FAST, "log_every": 1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "garbage", *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        train(dataset, tmp_path, CONFIG, resume=True, **{**FAST, "steps": 13})
    for content in ("{", json.dumps({"config": {}})):
        (tmp_path / "train.json").write_text(content)
        with pytest.raises(InputError, match=r"train\.json is damaged"):
            read_options(tmp_path)
    (tmp_path / "train.json").unlink()
    with pytest.raises(InputError, match=r"train\.json is missing"):
        read_options(tmp_path)


@pytest.mark.parametrize("resume", [False, True])
def test_what_another_process_saves_before_the_lock_is_not_lost(dataset, tmp_path, monkeypatch, resume):
    """It ends between the look at the run and the lock."""
    if resume:
        train(dataset, tmp_path, CONFIG, **{**FAST, "steps": 2})

    def other(*_):
        save_checkpoint(tmp_path, 3, ImageGPT(CONFIG), dataset.palette)

    monkeypatch.setattr(module, "refuse_unequal_shares", other)
    config = None if resume else CONFIG
    with pytest.raises(InputError, match=r"another process has trained into .* meanwhile: start again"):
        train(dataset, tmp_path, config, resume=resume, **{**FAST, "steps": 9})
    assert load_checkpoint(tmp_path).step == 3


def test_pictures_of_the_steps_behind_go(tmp_path):
    for step in (2, 4, 6):
        picture_of(tmp_path, step).parent.mkdir(exist_ok=True)
        picture_of(tmp_path, step).touch()
    drop_later_pictures(tmp_path, 4)
    assert [picture_of(tmp_path, step).exists() for step in (2, 4, 6)] == [True, True, False]
