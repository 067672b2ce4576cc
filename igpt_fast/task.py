"""What a run learns: what a step minimises, what validation measures, what is drawn of it. Pixels, or classes too."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_fast.atomic import write_atomically
from igpt_fast.batches import Batch, Batches, digest
from igpt_fast.config import Config
from igpt_fast.console import few_of, number
from igpt_fast.made import ACCURACY, CURVE
from igpt_fast.model import ImageGPT
from igpt_fast.options import FinetuneOptions, Options
from igpt_fast.pictures import save_curve
from igpt_fast.run import LEARNED


class PixelTask:
    """To predict pixels: the next one, or hidden ones, as the model's objective says."""

    # What metrics.jsonl calls the values of `learn`, the first of which is minimised, and those of `measure`.
    losses: tuple[str, ...] = ("loss",)
    measures: tuple[str, ...] = ("val_loss",)
    best: int | None = None  # the step of the weights that are the best so far, where the task can tell
    judged: int | None = None  # the step of the newest weights that validation has measured
    done = False  # whether more steps would help no more

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def learn(self, model: ImageGPT, batch: Batch) -> tuple[Tensor, ...]:
        """Scalars; the first has a gradient."""
        return (model.loss(batch.tokens, keep=batch.keep),)

    def measure(self, model: ImageGPT, batch: Batch) -> tuple[Tensor, ...]:
        """Scalars, each a sum over the batch's images."""
        return tuple(mean.double() * len(batch.tokens) for mean in self.learn(model, batch))

    def judge(self, step: int, measured: Mapping[str, float]) -> None:
        """Hears what validation has measured of that step's weights."""
        self.judged = step

    def forget_best(self) -> None:
        """The best weights are gone: others will be the best."""

    def write_images(self, run: Path) -> None:
        """Notes in the run which images it learns from, where their names do not say it."""

    def fixed(self) -> dict[str, Any]:
        """What a resumed run cannot change, beside the options."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know, for `restore`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state` was taken."""

    def introduction(self, config: Config, options: Options) -> list[str]:
        """What is learned, as lines for a person."""
        if options.sample_every and config.objective != "ar":
            return [f"no pictures of samples: a {config.objective} model cannot be sampled from"]
        return []

    def draw(self, run: Path, rows: list[dict[str, Any]], config: Config) -> None:
        """RUN/loss.png: training and validation loss in nats per pixel, over steps; chance, ln(colors), in grey."""
        levels = {f"chance, ln {config.colors}": math.log(config.colors)}
        save_curve(run / CURVE, _curves(rows, "loss", "val_loss"), "step", "loss (nats per pixel)", levels=levels)


class ClassTask(PixelTask):
    """To tell classes apart, and to go on predicting pixels, whose loss is added: the paper's fine-tuning."""

    losses = ("loss", "pixel_loss", "class_loss")
    measures = ("val_class_loss", "val_accuracy")

    options: FinetuneOptions

    def __init__(self, batches: Batches, classes: tuple[str, ...]) -> None:
        super().__init__(batches)
        self.options, self.classes = batches.options, classes
        self.best_score: tuple[float, float] | None = None  # (val_accuracy, -val_class_loss) of the best step
        self.since = 0  # validations since the best

    @property
    def done(self) -> bool:
        """Whether validation has not become better for as long as one is patient."""
        return 0 < self.options.patience <= self.since

    def learn(self, model: ImageGPT, batch: Batch) -> tuple[Tensor, ...]:
        """The sum that is minimised; the pixels' part of it, nats per pixel; that of the classes, nats per image."""
        hidden = model.hidden(batch.tokens, batch.keep)
        pixels = model.loss(batch.tokens, keep=batch.keep, hidden=hidden)
        classes = F.cross_entropy(model.classify(batch.tokens, hidden).float(), batch.labels)
        return classes + self.options.generative * pixels, pixels.detach(), classes.detach()

    def measure(self, model: ImageGPT, batch: Batch) -> tuple[Tensor, ...]:
        """The sum of the images' losses of the classes, nats, and the number of right answers."""
        logits = model.classify(batch.tokens).float()
        return F.cross_entropy(logits, batch.labels, reduction="sum"), (logits.argmax(1) == batch.labels).sum()

    def judge(self, step: int, measured: Mapping[str, float]) -> None:
        """The best has the highest accuracy, of equal ones the lowest loss."""
        super().judge(step, measured)
        found = measured["val_accuracy"], -measured["val_class_loss"]
        self.since += 1
        if self.best_score is None or found > self.best_score:
            self.best, self.best_score, self.since = step, found, 0

    def forget_best(self) -> None:
        """The best weights are gone: the next that are measured will be the best."""
        self.best = self.best_score = None

    def write_images(self, run: Path) -> None:
        """RUN/learned.npy: the dataset's indices of the images to learn from and of those that validation has."""
        indices = np.sort(np.concatenate([self.batches.indices, self.batches.held_out]))
        data = io.BytesIO()
        np.save(data, indices)
        write_atomically(run / LEARNED, data.getvalue())

    def fixed(self) -> dict[str, Any]:
        """The classes, in their order, which image has which, and which ones validation has."""
        held_out = digest(self.batches.held_out)
        return {"classes": list(self.classes), "labels": digest(self.batches.labels), "validation images": held_out}

    def state(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best, "record": self.best_score, "since": self.since, "judged": self.judged}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `state` was taken."""
        self.best, self.since, self.judged = state["best"], state["since"], state["judged"]
        self.best_score = state["record"] and tuple(state["record"])

    def introduction(self, config: Config, options: Options) -> list[str]:
        """The classes, and how they are learned."""
        weight = f"{self.options.generative:g} × " if self.options.generative != 1 else ""
        loss = f"loss of the classes + {weight}loss of the pixels" if self.options.generative else "loss of the classes"
        lines = [f"{number(len(self.classes))} classes: {few_of(self.classes)}", loss]
        if self.options.patience and len(self.batches.held_out):
            lines[-1] += f"; ends after {self.options.patience} validations without a better one"
        return lines

    def draw(self, run: Path, rows: list[dict[str, Any]], config: Config) -> None:
        """RUN/loss.png: the classes' loss over steps; RUN/accuracy.png: validation's, and the largest class's share."""
        levels = {f"chance, ln {len(self.classes)}": math.log(len(self.classes))}
        curves = _curves(rows, "class_loss", "val_class_loss")
        save_curve(run / CURVE, curves, "step", "loss of the classes (nats per image)", levels=levels)
        if not len(self.batches.held_out):
            return
        accuracy = {"validation": _points(rows, "val_accuracy", 100.0)}
        largest = 100 * self._share_of_largest()
        axis = f"accuracy on {number(len(self.batches.held_out))} images held out (%)"
        levels = {f"most frequent class: {largest:.1f} %": largest}
        save_curve(run / ACCURACY, accuracy, "step", axis, levels=levels, markers=True)

    def _share_of_largest(self) -> float:
        labels = self.batches.labels[self.batches.held_out]
        return float(torch.bincount(torch.from_numpy(labels)).max()) / len(labels)


class Learned(nn.Module):
    """A task's `learn` with a model, as a module: what DistributedDataParallel averages the gradients of."""

    def __init__(self, task: PixelTask, model: ImageGPT) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, tokens: Tensor, keep: Tensor | None, labels: Tensor | None) -> tuple[Tensor, ...]:
        return self.task.learn(self.model, Batch(tokens, keep, labels))


def _curves(rows: list[dict[str, Any]], training: str, validation: str) -> dict[str, tuple[list, list]]:
    return {"training": _points(rows, training), "validation": _points(rows, validation)}


def _points(rows: list[dict[str, Any]], key: str, times: float = 1.0) -> tuple[list[float], list[float]]:
    found = [(row["step"], times * row[key]) for row in rows if key in row]
    return [x for x, _ in found], [y for _, y in found]
