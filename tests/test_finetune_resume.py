"""Fine-tuning that is stopped, killed, robbed of files or told to go on: it takes the steps of one that never was."""

import os
import shutil
import signal

import numpy as np
import pytest
from labelled import FAST, make, write_tokens
from tiny import raise_at, rows, same, weights

from igpt_fast import loop
from igpt_fast.checkpoint import find_best, list_checkpoints, load_checkpoint
from igpt_fast.errors import InputError
from igpt_fast.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("classes"), np.r_[np.arange(240) * 7 % 3, [-1] * 5])


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "accumulate": 2, "shift": 1, "keep": 1}])
@pytest.mark.parametrize("at", [6, 14, 22])
def test_a_killed_run_goes_on_as_if_nothing_had_been(dataset, tmp_path, monkeypatch, at, more):
    options = {**FAST, **more, "lr": 3e-3}
    straight = finetune(make(), dataset, tmp_path / "straight", **options)
    run = tmp_path / "killed"
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        raise_at(patched, at, lambda: 1 / 0)
        finetune(make(), dataset, run, **options)
    again = finetune(None, dataset, run, resume=True, **options)
    assert rows(run) == rows(tmp_path / "straight") and same(weights(run), weights(tmp_path / "straight"))
    assert again.step == straight.step and again.test == straight.test
    assert np.array_equal(again.answers.probabilities, straight.answers.probabilities)
    kept = [[path.name for path in list_checkpoints(tmp_path / name)] for name in ("straight", "killed")]
    assert kept[0] == kept[1] and len(kept[0]) <= options.get("keep", 2) + 1


def test_it_ends_when_validation_becomes_no_better_and_goes_on_with_more_patience(dataset, tmp_path):
    still = {**FAST, "lr": 1e-12, "warmup": 0, "val_every": 2, "precision": "fp32"}
    result = finetune(make(), dataset, tmp_path, **{**still, "steps": 400, "patience": 3})
    measured = [row["step"] for row in result.rows if "val_accuracy" in row]
    assert result.last_step == measured[-1] < 400 and measured[-1] - result.step == 6
    assert result.rows[-1]["step"] == result.last_step, "what was learned last stands in metrics.jsonl"
    assert sum("loss" in row for row in result.rows) == -(-result.last_step // 5)
    again = finetune(None, dataset, tmp_path, resume=True, **{**still, "steps": 400, "patience": 3})
    assert again.last_step == result.last_step and again.step == result.step
    more = finetune(None, dataset, tmp_path, resume=True, **{**still, "steps": 400, "patience": 5})
    assert more.last_step > result.last_step


@pytest.mark.parametrize("at", [4, 8, 12])
def test_a_signal_during_validation_loses_no_validation(dataset, tmp_path, monkeypatch, at):
    options = {**FAST, "steps": 12, "lr": 3e-3, "save_every": 100, "batch": 4}  # several batches of validation
    straight = finetune(make(), dataset, tmp_path / "straight", **options)
    run, real = tmp_path / "stopped", loop.Loop._validate

    def stopped(self, bar):
        if self.step == at:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, bar)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.Loop, "_validate", stopped)
        finetune(make(), dataset, run, **options)
    assert load_checkpoint(run).step == at and not [r for r in rows(run) if r["step"] == at and "val_accuracy" in r]
    with (
        monkeypatch.context() as patched,
        pytest.raises(ZeroDivisionError),
    ):  # after the validation, before a checkpoint
        raise_at(patched, at + 2, lambda: 1 / 0)
        finetune(None, dataset, run, resume=True, **options)
        1 / 0  # noqa: B018  at the last step there is none to be killed in
    again = finetune(None, dataset, run, resume=True, **options)
    assert (again.step, again.val_accuracy) == (straight.step, straight.val_accuracy)
    assert rows(run) == rows(tmp_path / "straight") and find_best(run).name == straight.checkpoint.name
    state = [load_checkpoint(tmp_path / name).state["task"] for name in ("stopped", "straight")]
    assert state[0] == state[1]


def test_lost_metrics_change_no_step(dataset, tmp_path):
    options = {**FAST, "lr": 3e-3, "steps": 8, "save_every": 8}
    straight = finetune(make(), dataset, tmp_path / "straight", **options)
    finetune(make(), dataset, tmp_path / "lost", **options)
    (tmp_path / "lost" / "metrics.jsonl").unlink()
    again = finetune(None, dataset, tmp_path / "lost", resume=True, **options)
    assert (again.step, again.val_accuracy) == (straight.step, straight.val_accuracy)
    states = [load_checkpoint(tmp_path / name).state["task"] for name in ("lost", "straight")]
    assert states[0] == states[1]


def test_a_validation_that_resuming_adds_counts(dataset, tmp_path):
    options = {**FAST, "lr": 3e-3, "steps": 10, "save_every": 5, "val_every": 100}
    finetune(make(), dataset, tmp_path, **{**options, "steps": 11})
    run = list_checkpoints(tmp_path)
    assert [path.name[-2:] for path in run] == ["05", "10", "11"][-len(run) :]
    shutil.rmtree(run[-1])
    again = finetune(None, dataset, tmp_path, resume=True, **{**options, "steps": 10})
    assert again.step == again.last_step == 10 and again.val_accuracy is not None
    assert load_checkpoint(tmp_path).state["task"]["judged"] == 10 and find_best(tmp_path).name == "step-00000010"


def test_an_ended_run_says_what_goes_on(dataset, tmp_path):
    still = {**FAST, "lr": 1e-12, "warmup": 0, "val_every": 2, "precision": "fp32", "steps": 400, "patience": 2}
    finetune(make(), dataset, tmp_path, **still)
    for new in ({"lr": 1e-3}, {"steps": 500}, {"clip": 2.0}):
        with pytest.raises(InputError, match=f"--{next(iter(new))} changes nothing: .* give more --patience"):
            finetune(None, dataset, tmp_path, resume=True, **{**still, **new})


def test_best_weights_that_are_gone_are_forgotten_aloud(dataset, tmp_path, capsys):
    still = {**FAST, "lr": 1e-12, "warmup": 0, "precision": "fp32", "keep": 1}
    result = finetune(make(), dataset, tmp_path, **still)
    shutil.rmtree(result.checkpoint)
    again = finetune(None, dataset, tmp_path, resume=True, **{**still, "steps": 28})
    assert f"the best weights so far, of step {result.step}, are gone" in capsys.readouterr().err
    assert again.step == 28 and again.val_accuracy is not None
