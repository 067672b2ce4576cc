"""Fine-tuning: the paper's loss, which weights are kept, when it ends, what a killed run loses (nothing)."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled import FAST, make, write_tokens

from igpt_fast import finetune as module
from igpt_fast.batches import Batch, Batches
from igpt_fast.checkpoint import find_best, list_checkpoints, load_checkpoint
from igpt_fast.errors import InputError
from igpt_fast.finetune import finetune
from igpt_fast.joined import JoinedTokens
from igpt_fast.options import FinetuneOptions, Options
from igpt_fast.probe import probe
from igpt_fast.run import read_options
from igpt_fast.task import ClassTask
from igpt_fast.train import train
from igpt_fast.weights import open_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("classes"), np.r_[np.arange(240) * 7 % 3, [-1] * 5])


@pytest.fixture(scope="module")
def learned(dataset, tmp_path_factory):
    """A run that is long enough to learn something."""
    model = make()
    before = [p.clone() for p in model.parameters()]
    result = finetune(model, dataset, tmp_path_factory.mktemp("learned") / "run", steps=300, lr=5e-3, batch=32, ema=0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "a copy is trained"
    return result


def test_it_learns_what_no_linear_classifier_of_pixels_can(dataset, learned):
    assert learned.test.accuracy > 0.75 > probe(make(), dataset, layers=[2]).pixels.accuracy + 0.2
    assert learned.test.low < learned.test.accuracy < learned.test.high
    assert learned.chosen.unlabelled == 5 and learned.chosen.classes == tuple(dataset.classes)
    assert learned.train + learned.val + len(learned.answers.indices) == 240
    assert np.array_equal(learned.answers.indices, np.intersect1d(dataset.split("val", 0.2), np.arange(240)))
    right = learned.answers.best == dataset.labels[learned.answers.indices]
    assert learned.test.accuracy == right.mean()
    assert json.loads(json.dumps(learned.to_dict()))["images"]["test"] == len(right)


def test_the_best_weights_are_kept_and_found(learned):
    measured = {
        row["step"]: (row["val_accuracy"], -row["val_class_loss"]) for row in learned.rows if "val_accuracy" in row
    }
    best = max(measured, key=lambda step: (measured[step], -step))
    assert learned.step == best and learned.val_accuracy == measured[best][0]
    found = open_model(learned.run)
    assert found.step == best and found.path == find_best(learned.run) == learned.checkpoint
    assert found.model.class_names == learned.chosen.classes
    newest = list_checkpoints(learned.run)[-1]
    assert open_model(newest).path == newest == load_checkpoint(learned.run).path
    for name in ("loss.png", "accuracy.png"):
        assert (learned.run / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_the_loss_is_the_sum_of_both(dataset, objective, weight):
    options = FinetuneOptions(batch=6, generative=weight, shift=1, flip=True)
    model = make(objective=objective, classes=3).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    labels = dataset.labels % 3
    batches = Batches(dataset, options, objective, (np.arange(200), np.arange(200, 240)), labels)
    task, batch = ClassTask(batches, ("a", "b", "c")), batches.of_step(3)
    assert (batch.keep is None) == (objective == "ar")
    total, pixels, classes = task.learn(model, batch)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = model.loss(batch.tokens, keep=batch.keep)
    logits = model.hidden(batch.tokens, batch.keep).mean(1) @ model.wclf.T
    told = F.cross_entropy(logits, batch.labels)
    (told + weight * alone).backward()
    assert (pixels.item(), classes.item()) == pytest.approx((alone.item(), told.item()), rel=1e-6)
    assert total.item() == pytest.approx(told.item() + weight * alone.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-7), name
    held_out = next(batches.validation(7))
    assert held_out.keep is None and held_out.labels.tolist() == labels[200:207].tolist()
    loss, right = task.measure(model, held_out)
    logits = model.classify(held_out.tokens)
    assert loss.item() == pytest.approx(7 * F.cross_entropy(logits, held_out.labels).item(), rel=1e-6)
    assert right.item() == (logits.argmax(1) == held_out.labels).sum().item()


def test_a_step_learns_from_the_labels_of_its_images(dataset):
    options = FinetuneOptions(batch=300, seed=2)
    batches = Batches(dataset, options, "ar", (np.arange(240), np.arange(0)), dataset.labels)
    tokens, _, labels = batches.of_step(0)
    whole = {tuple(image.flatten().tolist()): int(label) for image, label in zip(*dataset_pairs(dataset), strict=True)}
    assert [whole[tuple(image.flatten().tolist())] for image in tokens] == labels.tolist()


def dataset_pairs(dataset):
    return dataset.batch(np.arange(240)), dataset.labels[:240]


def test_without_validation_the_last_weights_count(dataset, tmp_path):
    result = finetune(make(), dataset, tmp_path, **{**FAST, "val_fraction": 0.0, "test_fraction": 0.0, "steps": 5})
    assert (result.val, result.val_accuracy, result.test, result.answers) == (0, None, None, None)
    assert result.step == result.last_step == 5 and result.train == 240
    assert not (tmp_path / "accuracy.png").exists() and (tmp_path / "loss.png").exists()


def test_other_images_to_test_on_and_few_to_learn_from(dataset, tmp_path):
    test = write_tokens(tmp_path, np.arange(30) % 2, seed=5, name="test")
    joined = JoinedTokens(dataset, test)
    result = finetune(make(), joined, tmp_path / "run", **FAST, test_fraction=0.0, per_class=10, val_fraction=0.3)
    assert np.array_equal(result.answers.indices, len(dataset) + np.arange(30))
    assert (result.train, result.val) == (21, 9) and len(result.chosen.classes) == 3, "a class that the test lacks"


@pytest.mark.parametrize("classes", [7, 3])
def test_a_head_that_is_there_is_replaced(dataset, tmp_path, classes):
    model = make(classes=classes)
    torch.nn.init.normal_(model.wclf)
    result = finetune(model, dataset, tmp_path, **{**FAST, "steps": 1, "lr": 1e-9, "warmup": 0})
    assert result.model.wclf.shape == (3, 24) and result.model.wclf.abs().max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"per_class": 12, "val_fraction": 0.0}])
def test_the_seed_draws_whom_it_learns_from(dataset, tmp_path, monkeypatch, options):
    learned = []
    monkeypatch.setattr(
        module, "ClassTask", lambda batches, *rest: learned.append(batches.indices) or ClassTask(batches, *rest)
    )
    for seed in (1, 2):
        finetune(make(), dataset, tmp_path / str(seed), **{**FAST, "steps": 1, **options}, seed=seed)
    assert len(learned[0]) == len(learned[1]) and not np.array_equal(*learned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generative": -1.0}, "--generative is -1.0; use a weight such as 1.0, or 0"),
        ({"generative": float("nan")}, "--generative is nan"),
        ({"patience": -1}, "--patience is -1; use 0 or more"),
        ({"test_fraction": 1.0}, "--test-fraction is 1.0; use a fraction"),
        ({"per_class": 1}, "--per-class is 1; use at least 2"),
        ({"shift": 4}, "--shift is 4; use less than the 4 pixels of a side"),
        ({"shift": -1}, "--shift is -1; use 0 or more"),
        ({"resume": True}, "a resumed run has its own weights: leave out the model"),
    ],
)
def test_options_out_of_range(dataset, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        finetune(make(), dataset, tmp_path / "run", **{**FAST, **options})
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit(dataset, learned, tmp_path):
    bare = write_tokens(tmp_path, [-1] * 9, name="bare")
    with pytest.raises(InputError, match="no image has a label"):
        finetune(make(), bare, tmp_path / "run")
    with pytest.raises(InputError, match=r"of 2 classes 1 have enough .* at least 2 images to learn from \(test"):
        finetune(make(), write_tokens(tmp_path, [0] * 9 + [1], name="one"), tmp_path / "run", test_fraction=0.0)
    with pytest.raises(InputError, match=r"the images are 4x5 in .* the model is made for 5x5"):
        finetune(make(size=(5, 5)), dataset, tmp_path / "run")
    with pytest.raises(InputError, match="give a model to begin with"):
        finetune(None, dataset, tmp_path / "run")
    other = write_tokens(tmp_path, np.r_[np.arange(240) * 5 % 3, [-1] * 5], name="other")
    saved = {"steps": 310, "lr": 5e-3, "batch": 32, "ema": 0.9}
    for data in (other, write_tokens(tmp_path, np.arange(40) % 2, name="two")):
        with pytest.raises(InputError, match="--resume with another"):
            finetune(None, data, learned.run, resume=True, **saved)
    with pytest.raises(InputError, match="--resume with another generative"):
        finetune(None, dataset, learned.run, resume=True, **{**saved, "generative": 0.5})
    with pytest.raises(InputError, match="classes is 3: train learns pixels"):
        train(dataset, learned.run, resume=True)


def test_equal_numbers_of_right_answers_are_equal(dataset, tmp_path):
    """However the images were put together: the mean of shares would differ in its last bits, and choose by them."""
    options = {**FAST, "steps": 6, "val_every": 1, "per_class": 30, "val_fraction": 0.3, "test_fraction": 0.0}
    result = finetune(make(), dataset, tmp_path, **{**options, "batch": 16})
    measured = [row["val_accuracy"] for row in result.rows if "val_accuracy" in row]
    assert result.val % 16 and all(value == round(value * result.val) / result.val for value in measured)


def test_only_a_better_validation_is_a_new_best():
    task = ClassTask(SimpleNamespace(options=FinetuneOptions()), ("a", "b"))
    for step, (accuracy, loss) in enumerate([(0.5, 0.7), (0.5, 0.7), (0.5, 0.8), (0.4, 0.1)], start=1):
        task.judge(step, {"val_accuracy": accuracy, "val_class_loss": loss})
        assert (task.best, task.since) == (1, step - 1)
    for step, (accuracy, loss) in enumerate([(0.5, 0.6), (0.6, 0.9)], start=5):
        task.judge(step, {"val_accuracy": accuracy, "val_class_loss": loss})
        assert (task.best, task.since) == (step, 0)


def test_rates_stay(dataset):
    options = FinetuneOptions(steps=100, batch=128)
    rates = [options.rate(step, 512) for step in range(100)]
    assert rates[0] == pytest.approx(3e-4 / 5) and rates[4:] == [3e-4] * 96
    assert options.peak_lr(64) == pytest.approx(2.4e-3) and options.peak_lr(16) == 3e-3
    assert replace(options, batch=32).peak_lr(1024) == pytest.approx(0.75e-4)
    assert Options(batch=128).peak_lr(1024) == pytest.approx(1.5e-3) and Options(batch=128).peak_lr(64) == 3e-3


def test_a_best_checkpoint_that_is_gone_is_missed(dataset, tmp_path):
    result = finetune(make(), dataset, tmp_path, **{**FAST, "lr": 1e-12, "warmup": 0, "precision": "fp32"})
    assert result.step < result.last_step
    for file in result.checkpoint.iterdir():
        file.unlink()
    result.checkpoint.rmdir()
    with pytest.raises(InputError, match=f"{result.checkpoint.name} is missing, the run's best: put it back, or give"):
        open_model(tmp_path)


def test_train_json_says_all(learned):
    saved = read_options(learned.run)
    assert saved["options"]["patience"] == 10 and saved["config"]["classes"] == 3
    (learned.run / "train.json").write_text(json.dumps({**saved, "options": {**saved["options"], "patience": -1}}))
    with pytest.raises(InputError, match=r"damaged .*patience is -1"):
        read_options(learned.run)
    (learned.run / "train.json").write_text(json.dumps(saved))


def test_a_batch_changes_all_that_it_has():
    batch = Batch(torch.arange(4), None, torch.arange(4) % 2).each(lambda t: t[1:3])
    assert batch.tokens.tolist() == [1, 2] and batch.keep is None and batch.labels.tolist() == [1, 0]
