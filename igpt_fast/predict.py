"""What a classifier says of images: the probability of every class; how often it is right where labels are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens, refuse_misfit
from igpt_fast.model import ImageGPT
from igpt_fast.over_images import over_images
from igpt_fast.pictures import figure_png_bytes, new_figure, set_title
from igpt_fast.processes import Processes
from igpt_fast.tables import csv_bytes
from igpt_fast.tokens import TokenDataset

WRITTEN = 24  # classes up to which the cells of a picture hold their numbers


@dataclass(frozen=True)
class Answers:
    """What a model says of N images."""

    indices: np.ndarray  # int64 [N], of the dataset
    probabilities: np.ndarray  # float32 [N, classes], each row sums to 1
    classes: tuple[str, ...]

    @property
    def best(self) -> np.ndarray:
        """The likeliest class of each image, the first of equals: int64 [N]."""
        return self.probabilities.argmax(1)

    def table(self, labels: np.ndarray) -> np.ndarray:
        """How many images of class i (`labels`, int64 [N], of `classes`) are said to be of class j: int64 [K, K]."""
        count = len(self.classes)
        return np.bincount(labels * count + self.best, minlength=count * count).reshape(count, count)

    def recall(self, labels: np.ndarray) -> dict[str, dict[str, int]]:
        """Of each class how many images there are (`labels` as in `table`), and how many of them are said to be it."""
        table = self.table(labels)
        counts = zip(table.sum(1).tolist(), table.diagonal().tolist(), strict=True)
        return {name: {"images": of, "right": right} for name, (of, right) in zip(self.classes, counts, strict=True)}


def class_names(model: ImageGPT) -> tuple[str, ...]:
    """The names of a model's classes, LABEL_0 and so on where it came without. InputError for one without a head."""
    if not model.config.classes:
        raise InputError("this model has no classifier head: igpt-fast finetune gives it one, probe needs none")
    return model.class_names or tuple(f"LABEL_{row}" for row in range(model.config.classes))


def predict(
    model: ImageGPT,
    dataset: TokenDataset | JoinedTokens,
    indices: np.ndarray | None = None,
    batch: int | None = None,
    amp: bool = False,
    processes: Processes | None = None,
) -> Answers:
    """Asks a model with a classifier head for the classes of images.

    indices: which; None: all. batch: images side by side; None: what fits. amp: bf16 autocast. processes: those that
    share the images, see igpt_fast.processes.together. Progress is shown on stderr. Raises InputError for a model
    without a head, tokens that do not fit it, no image at all, a batch below 1, and probabilities that are not finite.
    """
    classes, config = class_names(model), model.config
    refuse_misfit(dataset, config, model.palette)
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    if not len(indices):
        raise InputError(f"{dataset.origin}: no image is left to classify")
    found = np.empty((len(indices), len(classes)), np.float32)

    def shares(tokens: Tensor) -> Tensor:
        return model.classify(tokens).float().softmax(1)

    over_images(
        shares,
        found,
        model,
        dataset,
        indices,
        batch,
        processes=processes,
        amp=amp,
        doing="classifying",
        what="probabilities",
    )
    return Answers(indices, found, classes)


def answers_csv(answers: Answers, names: Sequence[str], labels: np.ndarray | None = None, whole: bool = False) -> bytes:
    """A line an image: its name, the answer, its probability, its class where `labels` has it; a CSV file's bytes.

    names: of all the dataset's images. labels: int64 [N], -1 where unknown. whole: the probability of every class too.
    """
    known, rows = [] if labels is None else ["class"], []
    for row, (index, best) in enumerate(zip(answers.indices, answers.best, strict=True)):
        of_all = answers.probabilities[row]
        label = [answers.classes[labels[row]] if labels[row] >= 0 else ""] if known else []
        every = [f"{p:.6f}" for p in of_all] if whole else []
        rows.append([names[index], answers.classes[best], f"{of_all[best]:.6f}", *label, *every])
    every = [f"p({name})" for name in answers.classes if whole]
    return csv_bytes(["image", "answer", "probability", *known, *every], rows)


def table_png(table: np.ndarray, classes: tuple[str, ...], title: str) -> bytes:
    """`Answers.table` as the bytes of a PNG: a row a true class, a column an answer, dark where a row's images went."""
    count = len(classes)
    side = min(14.0, 3.0 + 0.42 * count)
    figure, axes = new_figure(side + 0.8, side)
    shares = table / np.maximum(1, table.sum(1, keepdims=True))
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, label="share of the images of a class (%)", shrink=0.8)
    if count <= WRITTEN:
        for (row, column), number in np.ndenumerate(table):
            colour = "white" if shares[row, column] > 0.5 else "#333333" if number else "#bbbbbb"
            axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=colour)
    shown = range(0, count, -(-count // 50))
    names = [_shown(classes[index]) for index in shown]
    axes.set_xticks(list(shown), names, rotation=90, parse_math=False)
    axes.set_yticks(list(shown), names, parse_math=False)
    axes.set(xlabel="answer", ylabel="class")
    set_title(axes, title)
    return figure_png_bytes(figure)


def _shown(name: str) -> str:
    """A class's name, short, in what a picture can show."""
    name = name.encode("utf-8", "replace").decode()
    return name if len(name) <= 20 else name[:19] + "…"
