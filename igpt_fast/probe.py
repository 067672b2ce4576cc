"""The linear probe: how well a logistic regression on a layer's features tells the classes apart.

The paper's protocol: features are means over positions (`ImageGPT.features`), the classifier is scikit-learn's L-BFGS
logistic regression, and for as many images as ImageNet has SGD. Beside the layers stand two scores that need no model:
the same classifier on the raw pixels, and the answer that is always the most frequent class of the test images: the
best that one answer to all can be, whatever the shares of the classes among the images to learn from.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import sgd
from igpt_fast.console import progress
from igpt_fast.data import TokenDataset
from igpt_fast.device import memory_of
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens, refuse_misfit, warn_of_twins
from igpt_fast.labels import Labelled, choose_labelled, warn_of_few
from igpt_fast.model import ImageGPT
from igpt_fast.over_images import over_images
from igpt_fast.pictures import COLOURS, figure_png_bytes, new_figure, set_title
from igpt_fast.processes import Processes
from igpt_fast.regression import Score, classify, count_fits, draw_folds, load_sklearn, score
from igpt_fast.tables import csv_bytes

SOLVERS = LBFGS, SGD = "lbfgs", "sgd"


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found. `layers` is in the order of the layers."""

    layers: tuple[Score, ...]
    pixels: Score
    majority: Score
    depth: int  # the model's number of layers; layer `depth` is the final norm's output
    classes: tuple[str, ...]
    left_out: dict[str, int]  # classes with too few images to learn and test on, and how many they have
    unlabelled: int  # images without a label, left out
    train: int  # images that the classifiers learned from
    test: int
    test_fraction: float
    per_class: int | None  # labels of each class at most; None: all that there are
    seed: int
    feature_bytes: int
    seconds: float
    test_groups: int | None = None  # among the images to test on, which the intervals take as independent; None: images
    chosen: Labelled | None = field(default=None, repr=False, compare=False)  # which images these are
    solver: str = LBFGS
    epochs: int | None = None  # of SGD
    joined: Score | None = None  # of all these layers' features side by side, where asked for

    @property
    def best(self) -> Score:
        """The layer that validation prefers, the lowest of equals: the test images have no say in it."""
        return max(self.layers, key=lambda score: score.validation)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "chosen"}
        values["layers"] = [score.to_dict() for score in self.layers]
        values |= {name: score.to_dict() for name in ("pixels", "majority", "joined") if (score := values[name])}
        return {**values, "best_layer": self.best.layer}

    @property
    def scores(self) -> tuple[Score, ...]:
        """All of them, as the table has them: of layers, of these joined, of raw pixels, and of the majority class."""
        return *self.layers, *([self.joined] if self.joined else []), self.pixels, self.majority


def probe(
    model: ImageGPT,
    dataset: TokenDataset | JoinedTokens,
    *,
    layers: Sequence[int] | None = None,
    joined: bool = False,
    test_fraction: float = 0.2,
    limit: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    amp: bool = False,
    processes: Processes | None = None,
    solver: str = LBFGS,
    epochs: int = sgd.EPOCHS,
) -> ProbeResult | None:
    """Probes a model's layers on a labelled dataset.

    layers: which; None: all, 0 to model.config.layers. joined: also one classifier on all of their features side by
    side, as the paper's best figure has of five layers. test_fraction: the test images are those that training with
    that val_fraction, or a larger one, never saw: `dataset.split("val", test_fraction)`. limit: at most so many images.
    per_class: learn from so few of each class, to see what little teaching is worth. `seed` draws both, and the parts
    of the validation; nothing else is left to chance. batch: images side by side; None: what fits. amp: features in
    bf16 autocast. processes: those that share the images, see igpt_fast.processes.together; the first alone learns from
    their features, and others are given None. solver: "lbfgs", or "sgd" for hundreds of thousands of images, which goes
    over them `epochs` times. Progress is shown on stderr. All features are held at once: images · layers · width · 4
    bytes.

    Raises InputError for a dataset without labels, with one class, with too few images or with tokens that do not fit
    the model, and for options out of range.
    """
    began = time.monotonic()
    layers = check_options(model.config.layers, layers, test_fraction, limit, per_class, batch, solver, epochs)
    if solver == LBFGS:
        load_sklearn()  # before any work
    refuse_misfit(dataset, model.config, model.palette)
    chosen = choose_labelled(dataset, test_fraction, limit, per_class, seed)
    warn_of_few(chosen, per_class)
    warn_of_twins(dataset, chosen.learned, chosen.tested, " to test on")
    indices, labels, test, groups = chosen.indices, chosen.labels, chosen.test, chosen.test_groups
    folds = draw_folds(labels, test, seed, chosen.groups)
    by_lbfgs = solver == LBFGS
    widest = max(model.config.width * (len(layers) if joined else 1), 3 * model.config.tokens)
    beside = 2 * 4 * len(indices) * widest if by_lbfgs else 0  # what one classifier reads, and that standardised
    pooled = extract_features(model, dataset, indices, layers, batch, amp, processes, beside)
    if processes is not None and not processes.first:
        return None
    fits = count_fits(folds) if by_lbfgs else 2 * epochs
    with progress((len(layers) + joined + 1) * fits, "regressions" if by_lbfgs else "epochs", "fit") as bar:

        def fit(name: str, fetch: sgd.Fetch, layer: int | None = None) -> Score:
            what = labels, folds, layer, bar.advance, groups
            if by_lbfgs:
                return classify(name, fetch(slice(None)), *what)
            return sgd.classify(name, fetch, *what, epochs=epochs, seed=seed, device=model.wte.device)

        scores = tuple(fit(f"layer {n}", features.__getitem__, n) for n, features in zip(layers, pooled, strict=True))
        together = fit("layers joined", lambda rows: np.concatenate(pooled[:, rows], 1)) if joined else None
        pixels = fit("raw pixels", lambda rows: _colours(dataset, indices[rows]))
    tested = labels[test]
    most_frequent = np.full(len(tested), np.bincount(tested).argmax())
    return ProbeResult(
        layers=scores,
        pixels=pixels,
        majority=score("majority class", most_frequent == tested, groups, tested, answers=most_frequent),
        depth=model.config.layers,
        classes=chosen.classes,
        left_out=chosen.left_out,
        unlabelled=chosen.unlabelled,
        train=int((~test).sum()),
        test=int(test.sum()),
        test_groups=None if groups is None else len(np.unique(groups)),
        test_fraction=test_fraction,
        per_class=per_class,
        seed=seed,
        feature_bytes=pooled.nbytes,
        seconds=time.monotonic() - began,
        chosen=chosen,
        solver=solver,
        epochs=None if by_lbfgs else epochs,
        joined=together,
    )


def _colours(dataset: TokenDataset | JoinedTokens, indices: np.ndarray) -> np.ndarray:
    """The images' raw pixels, in the palette's colours: float32 [N, 3 · H · W]."""
    found = np.asarray(dataset.palette.centers)[dataset.batch(indices).numpy()]
    return found.reshape(len(found), -1)


def check_options(
    top: int,
    layers: Sequence[int] | None = None,
    test_fraction: float = 0.2,
    limit: int | None = None,
    per_class: int | None = None,
    batch: int | None = None,
    solver: str = LBFGS,
    epochs: int = sgd.EPOCHS,
) -> list[int]:
    """The layers to probe, ascending. Raises InputError for an option out of range; `top` is the model's last layer."""
    chosen = list(range(top + 1)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] > top:
        raise InputError(
            f"layers {', '.join(map(str, chosen)) or 'none'} were asked for; this model has layers 0 to {top}"
        )
    if not 0 < test_fraction < 1:  # also catches NaN
        raise InputError(f"test fraction is {test_fraction}; use a fraction between 0 and 1, such as 0.2")
    if solver not in SOLVERS:
        raise InputError(f"solver is {solver!r}; use {' or '.join(SOLVERS)}")
    given = ("limit", limit, 1), ("per class", per_class, 2), ("batch", batch, 1), ("epochs", epochs, 1)
    for name, value, least in given:
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; use at least {least}")
    return chosen


def extract_features(
    model: ImageGPT,
    dataset: TokenDataset | JoinedTokens,
    indices: np.ndarray,
    layers: Sequence[int],
    batch: int | None = None,
    amp: bool = False,
    processes: Processes | None = None,
    beside: int = 0,
) -> np.ndarray:
    """Pooled features of the images `indices`: float32 [len(layers), len(indices), width], all layers in one pass.

    amp: matrix products in bf16 autocast. processes: those that share the images. beside: bytes that will be needed
    beside them. Raises InputError when the machine's memory cannot hold all that.
    """
    config = model.config
    copies = processes.on_this_machine if processes else 1  # all hold what all have found
    needed, there = copies * len(layers) * len(indices) * config.width * 4 + beside, memory_of(torch.device("cpu"))
    if needed > there:
        what = f"{len(indices):,} images at {len(layers)} layers" + (", and what a classifier reads," if beside else "")
        what += f" in {copies} processes" if copies > 1 else ""
        or_else = ", or --solver sgd, which reads them batch by batch" if needed - beside <= there else ""
        raise InputError(
            f"the features of {what} take {needed / 1e9:.1f} GB and this machine has {there / 1e9:.1f} GB; take fewer "
            f"with --limit or --layers{or_else}"
        )
    pooled = np.empty((len(layers), len(indices), config.width), np.float32)

    def features(tokens: Tensor) -> Tensor:
        return model.features(tokens, layers).transpose(0, 1).float()

    over_images(
        features,
        pooled.swapaxes(0, 1),
        model,
        dataset,
        indices,
        batch,
        processes=processes,
        amp=amp,
        doing="features",
        what="features",
    )
    return pooled


def answers_csv(result: ProbeResult, names: Sequence[str]) -> bytes:
    """A line a test image: its name, its class, and what each classifier answers; a CSV file's bytes.

    names: of all the dataset's images.
    """
    chosen, classes = result.chosen, (*result.classes, "")  # -1 is of a classifier that became infinite
    said = [chosen.labels[chosen.test], *(score.answers for score in result.scores)]
    images = zip(chosen.indices[chosen.test], np.stack(said, 1), strict=True)
    rows = [[names[image], *(classes[number] for number in row)] for image, row in images]
    return csv_bytes(["image", "class", *(score.name for score in result.scores)], rows)


def figure_png(result: ProbeResult, title: str) -> bytes:
    """Accuracy by layer with 95 % intervals and both baselines, as the bytes of a PNG. title: what of what."""
    figure, axes = new_figure(8.0, 5.0)
    blue, orange = COLOURS[:2]
    pixels, majority, best = result.pixels, 100 * result.majority.accuracy, result.best
    axes.axhspan(100 * pixels.low, 100 * pixels.high, color=orange, alpha=0.12, linewidth=0)
    label = f"raw pixels: {100 * pixels.accuracy:.1f} %"
    axes.axhline(100 * pixels.accuracy, color=orange, linestyle="--", linewidth=1.6, label=label)
    numbers = [score.layer for score in result.layers]
    accuracy, low, high = (
        100 * np.array([getattr(score, field) for score in result.layers]) for field in ("accuracy", "low", "high")
    )
    errors = (accuracy - low, high - accuracy)
    axes.errorbar(numbers, accuracy, errors, color=blue, marker="o", capsize=3, linewidth=1.6, label="layers")
    label = f"layer {best.layer}, which validation prefers: {100 * best.accuracy:.1f} %"
    axes.plot(best.layer, 100 * best.accuracy, "o", color=blue, markersize=12, fillstyle="none", label=label)
    if result.joined:
        label = f"all of these layers joined: {100 * result.joined.accuracy:.1f} %"
        axes.axhline(100 * result.joined.accuracy, color=COLOURS[2], linestyle="-.", linewidth=1.6, label=label)
    label, bottom, top = f"most frequent class: {majority:.1f} %", min(*low, 100 * pixels.low), max(high)
    if bottom - majority < 3 * (top - bottom):
        axes.axhline(majority, color="#888888", linestyle=":", linewidth=1.6, label=label)
    else:  # drawn, it would press all else into a thin band
        axes.plot([], [], color="#888888", linestyle=":", label=f"{label}, below the picture")
    set_title(axes, title)
    axes.set_xlabel(f"layer (0: embedding, {result.depth}: final norm)")
    axes.set_ylabel(f"accuracy on {result.test:,} test images (%), 95 % intervals")
    axes.set_xticks(numbers[:: math.ceil(len(numbers) / 16)])
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=0.85, edgecolor="none", loc="best")
    return figure_png_bytes(figure)
