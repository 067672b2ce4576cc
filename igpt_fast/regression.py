"""Logistic regression on fixed features, its penalty chosen without the test images, and a Score of how it did."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from igpt_fast import intervals
from igpt_fast.classes import by_class
from igpt_fast.errors import InputError

log = logging.getLogger("igpt_fast")

# Inverse strengths of the L2 penalty that are tried; the best in validation is used, the smallest of equals.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
FOLDS = 5  # parts of the images to learn from; validation answers for a part by a classifier of the others
FEW = 1000  # up to so many images every part is answered for; above, where one part says enough, only the first
SMALL = 10_000_000  # multiplications of a step of L-BFGS below which one thread is used: waiting for others costs more
ITERATIONS = 1000  # of L-BFGS at most; a fit that would need more is marked


@dataclass(frozen=True)
class Score:
    """One way to answer, on the test images. `low` to `high` is the 95 % interval of the accuracy (intervals.py)."""

    name: str  # "layer 3", "raw pixels", "majority class"
    accuracy: float  # fraction of the test images
    low: float
    high: float
    layer: int | None = None
    strength: float | None = None  # C, the inverse strength of L-BFGS's penalty
    validation: float | None = None  # accuracy in validation with what it has chosen, among the images to learn from
    converged: bool = True  # False: L-BFGS stopped at ITERATIONS, or SGD became infinite
    rate: float | None = None  # of SGD, at first
    balanced: float | None = None  # balanced accuracy: the mean of the tested classes' shares of right answers
    answers: np.ndarray | None = field(default=None, repr=False, compare=False)  # the class of each test image: int64

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without the single answers."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "answers"}

    def __str__(self) -> str:
        """`93.1 % (95 % interval 90.2 – 95.2 %)`."""
        return f"{100 * self.accuracy:.1f} % (95 % interval {100 * self.low:.1f} – {100 * self.high:.1f} %)"


def load_sklearn() -> tuple[type, type, type]:
    """scikit-learn's LogisticRegression and StandardScaler, and threadpool_limits, which comes with it.

    Raises InputError, naming the extra, when it is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise InputError("scikit-learn is not installed; run: pip install igpt-fast[probe]") from error
    return LogisticRegression, StandardScaler, threadpool_limits


def draw_folds(labels: np.ndarray, test: np.ndarray, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The part, 0 to FOLDS - 1, of every image to learn from, and -1 for the test: int64 [N].

    labels: int64 [N]. test: bool [N]. Each class is dealt out evenly, in an order drawn by the seed. groups: int64 [N],
    which are dealt out whole instead, where there are enough of them for every part to leave two classes.
    """
    folds, random = np.full(len(labels), -1), np.random.default_rng([seed, 1])
    numbers, of = np.unique(np.arange(len(labels))[~test] if groups is None else groups[~test], return_inverse=True)
    if len(numbers) < len(of):
        folds[~test] = (random.permutation(len(numbers)) % FOLDS)[of.reshape(-1)]
        if all(len(np.unique(labels[learn])) > 1 for learn, _ in parts_of(folds)):
            return folds
        log.warning("there are too few groups to choose the penalty by whole ones: it is chosen by images")
    for mine in by_class(labels, ~test):
        folds[random.permutation(mine)] = np.arange(len(mine)) % FOLDS
    return folds


def count_fits(folds: np.ndarray) -> int:
    """How many regressions `classify` fits."""
    return len(STRENGTHS) * len(parts_of(folds)) + 1


def classify(
    name: str,
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    layer: int | None = None,
    fitted: Callable[[], object] = lambda: None,
    groups: np.ndarray | None = None,
) -> Score:
    """Chooses the strength by validation among the images to learn from, learns from all of them, and tests.

    features: float32 [N, D], standardised here by what is learned from. labels: int64 [N], at least two of every class
    to learn from. folds: as draw_folds gives them. fitted: called behind each fit. groups: of the images to test on, of
    which the interval takes whole ones as independent. Raises InputError when scikit-learn is missing.
    """
    test, parts = folds < 0, parts_of(folds)
    small = features.size * len(np.unique(labels)) < SMALL
    with load_sklearn()[2](1 if small else None):
        found = np.zeros(len(STRENGTHS), int)
        for learn, ask in parts:
            found += (_answers(features, labels, learn, ask, STRENGTHS, fitted)[0] == labels[ask]).sum(1)
        best = int(np.argmax(found))
        (answers,), converged = _answers(features, labels, ~test, test, STRENGTHS[best : best + 1], fitted)
    validation = float(found[best] / sum(ask.sum() for _, ask in parts))
    chosen = {"strength": STRENGTHS[best], "validation": validation, "converged": converged}
    return score(name, answers == labels[test], groups, labels[test], layer=layer, answers=answers, **chosen)


def parts_of(folds: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each part of the validation what is learned from and what is asked."""
    test = folds < 0
    answered = range(FOLDS if (~test).sum() <= FEW else 1)
    return [(~test & (folds != fold), folds == fold) for fold in answered if (folds == fold).any()]


def score(
    name: str,
    right: np.ndarray,
    groups: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    **rest: Any,
) -> Score:
    """A Score of answers: whether each is right, bool [N], and its image's group, int64 [N], None: all are alone.

    labels: the images' classes, int64 [N]; None: unknown, and so is the balanced accuracy.
    """
    balanced = None
    if labels is not None:
        of = np.unique(labels, return_inverse=True)[1].reshape(-1)
        balanced = float((np.bincount(of, right) / np.bincount(of)).mean())
    return Score(name, float(right.mean()), *intervals.of_share(right, groups), balanced=balanced, **rest)


def _answers(
    features: np.ndarray,
    labels: np.ndarray,
    learn: np.ndarray,
    ask: np.ndarray,
    strengths: Sequence[float],
    fitted: Callable[[], object],
) -> tuple[np.ndarray, bool]:
    """For each strength what a classifier of `learn` answers for `ask`: int64 [strengths, asked]; and whether all fits
    converged.

    strengths: ascending. A fit starts where the one before ended, which takes half the steps of starting at zero: the
    optimum of a weak penalty is far from zero and near that of one ten times as strong.
    """
    regression, scaler, _ = load_sklearn()
    scale, classifier = scaler(copy=False), regression(max_iter=ITERATIONS, warm_start=True)
    learned, asked = scale.fit_transform(features[learn]), scale.transform(features[ask])
    answers, converged = np.empty((len(strengths), len(asked)), np.int64), True
    for row, strength in enumerate(strengths):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not converge is said in the Score
            classifier.set_params(C=strength).fit(learned, labels[learn])
        answers[row] = classifier.predict(asked)
        converged = converged and bool(classifier.n_iter_.max() < ITERATIONS)
        fitted()
    return answers, converged
