"""The loop of a run: what it does around its steps, and what ends it."""

import math
import os
import signal

import pytest
import torch
from tiny import CONFIG, FAST, write_tokens

from igpt_fast import loop
from igpt_fast.checkpoint import list_checkpoints, load_checkpoint, update_state
from igpt_fast.errors import InputError
from igpt_fast.metrics import read_metrics
from igpt_fast.optimizer import adam, restore, state_tensors
from igpt_fast.task import PixelTask
from igpt_fast.tokens import TokenDataset
from igpt_fast.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return write_tokens(tmp_path_factory.mktemp("data"))


def test_validation_has_the_precision_of_training(dataset, tmp_path, monkeypatch):
    seen, real = [], PixelTask.measure
    monkeypatch.setattr(
        PixelTask, "measure", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or real(*args)
    )
    for precision in ("bf16", "fp32"):
        seen.clear()
        train(dataset, tmp_path / precision, CONFIG, **{**FAST, "steps": 1, "precision": precision})
        assert seen and set(seen) == {precision == "bf16"}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_activation_checkpointing_is_that_of_the_model_that_learns(dataset, tmp_path, monkeypatch, ema):
    seen, real = [], loop.Loop._learn
    monkeypatch.setattr(
        loop.Loop, "_learn", lambda self, *rest: seen.append(self.model.activation_checkpointing) or real(self, *rest)
    )
    for on in (True, False):
        options = {**FAST, "steps": 1, "activation_checkpointing": on, "ema": ema}
        train(dataset, tmp_path / str(on), CONFIG, **options)
    assert seen == [True, False]


def test_the_step_whose_loss_is_not_finite_is_named(dataset, tmp_path, monkeypatch):
    real = loop.Loop._learn
    monkeypatch.setattr(loop.Loop, "_learn", lambda self, *rest: tuple(v / (self.step != 5) for v in real(self, *rest)))
    with pytest.raises(InputError, match=r"the loss is inf at step 6 \("):
        train(dataset, tmp_path, CONFIG, **FAST)


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_is_not_written(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(PixelTask, "measure", lambda *_: (torch.tensor(math.nan),))
    with pytest.raises(InputError, match=r"the validation loss is nan at step 5 \("):
        train(dataset, tmp_path, CONFIG, **FAST)
    assert [row["step"] for row in read_metrics(tmp_path)] == [4]


def test_a_signal_cuts_the_drawing_of_samples_short(dataset, tmp_path, monkeypatch):
    options = {**FAST, "steps": 4, "sample_every": 2, "save_every": 100}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            loop, "sample", lambda *_, progress, **__: os.kill(os.getpid(), signal.SIGINT) or progress(1, 9)
        )
        train(dataset, tmp_path, CONFIG, **options)
    assert load_checkpoint(tmp_path).step == 2 and not list(tmp_path.glob("samples/*"))
    train(dataset, tmp_path, resume=True, **options)
    assert sorted(path.name for path in tmp_path.glob("samples/*")) == ["step-000002.png", "step-000004.png"]


def test_a_checkpoint_that_notes_less_of_its_images_and_options_goes_on(dataset, tmp_path):
    train(dataset, tmp_path, CONFIG, **{**FAST, "steps": 2})
    (checkpoint,) = list_checkpoints(tmp_path)
    fixed = load_checkpoint(tmp_path).state["fixed"]
    older = {name: value for name, value in fixed.items() if name not in ("shift", "names")}
    assert older.keys() != fixed.keys()
    update_state(checkpoint, {"fixed": older}, None)
    with pytest.raises(InputError, match="--resume with another shift"):
        train(dataset, tmp_path, resume=True, **{**FAST, "steps": 3, "shift": 1})
    assert train(dataset, tmp_path, resume=True, **{**FAST, "steps": 3}).step == 3


def test_moments_of_another_shape_are_no_way_to_go_on():
    named = {"w": torch.nn.Parameter(torch.ones(2, 3))}
    optimizer = adam(named)
    named["w"].sum().backward()
    optimizer.step()
    tensors = state_tensors(optimizer, named)
    restore(adam(named), named, tensors, 1)
    with pytest.raises(InputError, match=r"the checkpoint lacks exp_avg_sq\.w as \[2, 3\]"):
        restore(adam(named), named, tensors | {"exp_avg_sq.w": tensors["exp_avg_sq.w"].T}, 1)
