"""What a run learns: which weights are the best so far, and when more steps help no more."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled import FAST, make, write_tokens

from igpt_fast import task as module
from igpt_fast.batches import Batches
from igpt_fast.finetune import finetune
from igpt_fast.options import FinetuneOptions, Options
from igpt_fast.task import ClassTask, PixelTask


def judged(task, *steps):
    for step, accuracy, loss in steps:
        task.judge(step, {"val_accuracy": accuracy, "val_class_loss": loss})
    return task


def fresh(**options):
    return ClassTask(SimpleNamespace(options=FinetuneOptions(**options)), ("a", "b"))


def test_after_the_best_is_forgotten_the_next_is_the_best():
    task = judged(fresh(patience=3), (1, 0.9, 0.1), (2, 0.5, 0.3))
    task.forget_best()
    assert (task.best, task.since, task.judged) == (None, 1, 2)
    assert fresh().restore(task.state()) is None
    judged(task, (3, 0.2, 0.9))
    assert (task.best, task.since) == (3, 0)


def test_what_is_saved_of_a_task_goes_on():
    steps = (1, 0.5, 0.7), (2, 0.6, 0.5), (3, 0.6, 0.5), (4, 0.6, 0.6), (5, 0.6, 0.4)
    for at in range(len(steps)):
        straight = judged(fresh(patience=2), *steps[:at])
        task = fresh(patience=2)
        task.restore(json.loads(json.dumps(straight.state())))
        for step in steps[at:]:
            assert judged(task, step).state() == judged(straight, step).state() and task.done == straight.done
        assert (task.best, task.since, task.judged) == (5, 0, 5)


def test_patience():
    task = judged(fresh(patience=2), (1, 0.5, 0.7), (2, 0.5, 0.7))
    assert not task.done and judged(task, (3, 0.5, 0.7)).done
    assert not judged(fresh(patience=0), (1, 0.5, 0.7), (2, 0.5, 0.7)).done


def test_learned_and_fixed(tmp_path):
    dataset = write_tokens(tmp_path, np.arange(60) % 3)
    result = finetune(make(), dataset, tmp_path / "run", **{**FAST, "steps": 2, "val_fraction": 0.3})
    learned = np.load(tmp_path / "run" / "learned.npy")
    assert np.array_equal(learned, np.sort(result.chosen.indices[~result.chosen.test]))
    assert len(learned) == result.train + result.val


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_pixels_are_measured_by_images(tmp_path, objective):
    dataset = write_tokens(tmp_path, np.arange(60) % 3)
    model = make(objective=objective).eval()
    torch.nn.init.normal_(model.wtet)
    batches = Batches(dataset, Options(batch=4, val_fraction=0.3), objective)
    batch, task = next(batches.validation(7)), PixelTask(batches)
    (summed,) = task.measure(model, batch)
    assert summed.item() == pytest.approx(7 * model.loss(batch.tokens, keep=batch.keep).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "held_out", "said"),
    [
        ({"patience": 4}, 5, "loss of the classes + loss of the pixels; ends after 4 validations without a better one"),
        ({"patience": 4, "generative": 0.5}, 0, "loss of the classes + 0.5 × loss of the pixels"),
        ({"patience": 0, "generative": 0}, 5, "loss of the classes"),
    ],
)
def test_what_is_learned_is_said(options, held_out, said):
    batches = SimpleNamespace(options=FinetuneOptions(**options), held_out=np.arange(held_out))
    assert ClassTask(batches, ("a", "b")).introduction(None, None) == ["2 classes: a, b", said]


@pytest.mark.parametrize(("objective", "every", "lines"), [("bert", 5, 1), ("bert", 0, 0), ("ar", 5, 0)])
def test_pictures_that_there_will_not_be_are_said(objective, every, lines):
    task = PixelTask(None)
    assert len(task.introduction(SimpleNamespace(objective=objective), Options(sample_every=every))) == lines


def test_what_is_drawn_of_a_run(tmp_path, monkeypatch):
    drawn = {}

    def save_curve(path, curves, *labels, **more):
        drawn[path.name] = curves, more

    monkeypatch.setattr(module, "save_curve", save_curve)
    rows = [
        {"step": 2, "loss": 5.0, "class_loss": 3.0},
        {"step": 3, "val_class_loss": 4.0, "val_accuracy": 0.25},
        {"step": 4, "loss": 1.0, "class_loss": 2.0},
    ]
    labels, held_out = np.array([0, 0, 0, 0, 1, 1, 1, 2]), np.array([3, 4, 5, 6, 7])
    batches = SimpleNamespace(options=FinetuneOptions(), held_out=held_out, labels=labels)
    ClassTask(batches, ("a", "b", "c")).draw(tmp_path, rows, None)
    curves, more = drawn["loss.png"]
    assert curves == {"training": ([2, 4], [3.0, 2.0]), "validation": ([3], [4.0])}
    assert more["levels"] == {"chance, ln 3": math.log(3)}
    curves, more = drawn["accuracy.png"]
    assert curves == {"validation": ([3], [25.0])} and more["markers"]
    assert more["levels"] == {"most frequent class: 60.0 %": 60.0}, "of those that validation has"
    drawn.clear()
    batches.held_out = held_out[:0]
    ClassTask(batches, ("a", "b", "c")).draw(tmp_path, rows, None)
    assert list(drawn) == ["loss.png"]
    PixelTask(batches).draw(tmp_path, rows, SimpleNamespace(colors=16))
    assert drawn["loss.png"][0] == {"training": ([2, 4], [5.0, 1.0]), "validation": ([], [])}
    assert drawn["loss.png"][1]["levels"] == {"chance, ln 16": math.log(16)}
