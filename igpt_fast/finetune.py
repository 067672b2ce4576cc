"""Fine-tuning: `finetune(model, dataset, run, …)` teaches a model to tell the classes of labelled images apart.

As the paper does it: a linear head, zero at first, on the mean over positions of the final norm's output; its
cross-entropy and the loss of the pixels added; Adam at a constant rate, at the paper's widths a tenth of that of
training; the weights that are best in validation. A run is stopped, killed and resumed as one of `train`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_fast.batches import Batches
from igpt_fast.checkpoint import Checkpoint, find_best, load_checkpoint
from igpt_fast.console import say
from igpt_fast.data import TokenDataset
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens, refuse_misfit, warn_of_twins
from igpt_fast.labels import Labelled, choose_labelled, draw_validation, warn_of_few
from igpt_fast.model import ImageGPT
from igpt_fast.options import FinetuneOptions
from igpt_fast.predict import Answers, predict
from igpt_fast.processes import Processes, together
from igpt_fast.regression import Score, score
from igpt_fast.run import Result, refuse_differences
from igpt_fast.task import ClassTask
from igpt_fast.train import Prepared, carry_out, own_copy
from igpt_fast.weights import reshaped

TOLD = "accuracy", "low", "high", "balanced"  # of the test's Score, in JSON


@dataclass(frozen=True)
class FinetuneResult:
    """How fine-tuning ended. `model` has the weights that validation likes best, the last ones without validation."""

    model: ImageGPT
    run: Path
    checkpoint: Path  # of those weights
    step: int  # and their step
    last_step: int  # that the run has come to
    val_accuracy: float | None  # of those weights; None when no image is held out
    test: Score | None  # of those weights on the test images, which nothing was chosen by; None: there are none
    answers: Answers | None  # to the test images
    chosen: Labelled
    train: int  # images that were learned from
    val: int  # and validated on
    seconds: float
    rows: list[dict[str, Any]]  # of metrics.jsonl

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "run": str(self.run),
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "last_step": self.last_step,
            "val_accuracy": self.val_accuracy,
            "test": None if self.test is None else {key: getattr(self.test, key) for key in TOLD},
            "recall": None if self.answers is None else self.answers.recall(self.chosen.labels[self.chosen.test]),
            "classes": list(self.chosen.classes),
            "left_out": self.chosen.left_out,
            "unlabelled": self.chosen.unlabelled,
            "images": {"train": self.train, "val": self.val, "test": int(self.chosen.test.sum())},
            "parameters": self.model.num_parameters(),
            "seconds": round(self.seconds, 2),
        }


def finetune(
    model: ImageGPT | None,
    dataset: TokenDataset | JoinedTokens,
    run: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device | Processes = "auto",
    command: Mapping[str, Any] | None = None,
    **options: Any,
) -> FinetuneResult:
    """Fine-tunes a copy of `model` on the images of `dataset` that have labels. All it makes lies under `run`.

    model: of the dataset's size and colours; a head that it has is replaced; None when resuming. The test images are
    `dataset.split("val", options.test_fraction)`, as `probe` has them, or the second part of JoinedTokens. Of the rest,
    at most options.per_class of each class, validation keeps options.val_fraction of each. options: fields of
    igpt_fast.options.FinetuneOptions. Otherwise as `igpt_fast.train.train`. In the processes that torchrun starts, the
    first alone tests. Raises InputError as `train`, and for a dataset without labels, with one class, or too few.
    """
    o, run = FinetuneOptions(**options), Path(run)
    if (model is None) != resume:
        what = "a resumed run has its own weights: leave out the model" if resume else "give a model to begin with"
        raise InputError(f"finetune: {what}")
    chosen = choose_labelled(dataset, o.test_fraction, per_class=o.per_class, seed=o.seed, tests=False)
    warn_of_few(chosen, o.per_class)
    held_out = draw_validation(chosen, o.val_fraction, o.seed)
    parts = chosen.indices[~chosen.test & ~held_out], chosen.indices[held_out]
    labels = np.full(len(dataset), -1)
    labels[chosen.indices] = chosen.labels

    def prepare(checkpoint: Checkpoint | None) -> Prepared:
        config = replace((checkpoint.model if checkpoint else model).config, classes=len(chosen.classes))
        if checkpoint:
            refuse_differences(run, checkpoint.model.config.to_dict(), config.to_dict())
        refuse_misfit(dataset, config, (checkpoint.model if checkpoint else model).palette)
        task = ClassTask(Batches(dataset, o, config.objective, parts, labels), chosen.classes)
        if checkpoint:
            return task, config, None
        headless = reshaped(model, replace(config, classes=0))
        start = own_copy(headless, config)
        start.class_names = chosen.classes
        return task, config, start

    with together(device) as processes:
        if processes.first:
            warn_of_twins(dataset, chosen.learned, chosen.tested, " to test on")
        result, task = carry_out(prepare, run, o, processes, resume, command)
        if result.step < o.steps:
            say(f"ended at step {result.step}: validation has not become better {o.patience} times in a row")
        return _result(result, task, dataset, chosen, test=processes.first)


def _result(
    result: Result, task: ClassTask, dataset: TokenDataset | JoinedTokens, chosen: Labelled, test: bool
) -> FinetuneResult:
    """What the run has come to, tested."""
    best = load_checkpoint(find_best(result.run), result.model.wte.device)
    accuracy = None if task.best_score is None else task.best_score[0]
    found, answers = None, None
    if test and chosen.test.any():
        answers = predict(best.model, dataset, chosen.tested)
        labels = chosen.labels[chosen.test]
        found = score("fine-tuned", answers.best == labels, chosen.test_groups, labels)
    return FinetuneResult(
        model=best.model,
        run=result.run,
        checkpoint=best.path,
        step=best.step,
        last_step=result.step,
        val_accuracy=accuracy,
        test=found,
        answers=answers,
        chosen=chosen,
        train=result.train,
        val=result.val,
        seconds=result.seconds,
        rows=result.rows,
    )
