"""What a run learns: which weights are the best so far, and when more steps help no more."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled import FAST, make, write_tokens

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
