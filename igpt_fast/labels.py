"""Which labelled images are learned from, validated on and tested on."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_fast.classes import by_class
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens
from igpt_fast.pixels import at_most
from igpt_fast.tokens import TokenDataset

log = logging.getLogger("igpt_fast")


@dataclass(frozen=True)
class Labelled:
    """The images that take part, N of them, in the order of the dataset."""

    indices: np.ndarray  # int64 [N], of the dataset
    labels: np.ndarray  # int64 [N], indices into classes
    test: np.ndarray  # bool [N]
    classes: tuple[str, ...]
    left_out: dict[str, int]  # classes with too few images, and how many they have
    unlabelled: int  # images without a label
    groups: np.ndarray | None = None  # int64 [N]: images of one stay together; None: each is alone

    @property
    def tested(self) -> np.ndarray:
        """The images to test on: indices of the dataset."""
        return self.indices[self.test]

    @property
    def learned(self) -> np.ndarray:
        """The images to learn from: indices of the dataset."""
        return self.indices[~self.test]

    @property
    def test_groups(self) -> np.ndarray | None:
        """The groups of the images to test on."""
        return None if self.groups is None else self.groups[self.test]


def choose_labelled(
    dataset: TokenDataset | JoinedTokens,
    test_fraction: float,
    limit: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    tests: bool = True,
) -> Labelled:
    """The images that have labels, those to test on by `dataset.split("val", test_fraction)`.

    limit: at most so many, and per_class: of each class at most so many to learn from, drawn by the seed. tests: a
    class without an image to test on is left out, as is one with fewer than two to learn from; where the images to test
    on are others (JoinedTokens) it stays, as an answer that may be wrong. Raises InputError for fewer than two classes.
    """
    apart = isinstance(dataset, JoinedTokens)
    tests = tests and not apart
    known = np.flatnonzero(dataset.labels >= 0)
    if not len(known) or dataset.classes is None:
        raise without_classes(dataset.origin)
    unlabelled = len(dataset) - len(known)
    known = at_most(limit, known, [seed, 0])
    labels, test = dataset.labels[known], np.isin(known, dataset.split("val", test_fraction))
    number = len(dataset.classes)
    tested, learned = (np.bincount(labels[part], minlength=number) for part in (test, ~test))
    # One image to learn from, one to choose by and one to test on.
    good = (learned >= 2) & ((tested >= 1) | (not tests))
    left_out = {
        dataset.classes[k]: int(tested[k] + learned[k]) for k in range(number) if tested[k] + learned[k] and not good[k]
    }
    if good.sum() < 2:
        present = int(((tested + learned) > 0).sum())
        few = "only one class has images" if present < 2 else f"of {present} classes {good.sum()} have enough images"
        one = " and 1 to test on" if tests else ""
        way = "give more images" if apart else f"(test fraction {test_fraction}): give more images or another fraction"
        raise InputError(
            f"{dataset.origin}: {few} among {len(known):,}; it takes two classes, each with at least 2 images to learn "
            f"from{one}{': ' if apart else ' '}{way}"
        )
    used = good[labels]
    if per_class is not None:
        random = np.random.default_rng([seed, 2])
        for mine in by_class(labels, used & ~test):
            used[random.permutation(mine)[per_class:]] = False
    compact = np.cumsum(good) - 1  # classes that take part, numbered without gaps
    names = tuple(dataset.classes[label] for label in np.flatnonzero(good))
    groups = group_numbers(dataset, known[used])
    return Labelled(known[used], compact[labels[used]], test[used], names, left_out, unlabelled, groups)


def group_numbers(dataset: TokenDataset | JoinedTokens, indices: np.ndarray) -> np.ndarray | None:
    """The group of each image of `indices`, numbered: int64 [N]; None where each image of the dataset is alone.

    Crops of one image, which share its name, are a group.
    """
    owners = dataset.groups or dataset.names
    number = {owner: k for k, owner in enumerate(sorted(set(owners)))}
    if len(number) == len(owners):
        return None
    return np.fromiter((number[owner] for owner in owners), np.int64, len(owners))[indices]


def without_classes(where: str | Path) -> InputError:
    """The error of images that cannot be told apart by classes."""
    way = "put each class into a folder of its own, or labels into a metadata.csv or the .npz"
    return InputError(f"{where}: no image has a label, or all are of one class; {way}")


def warn_of_few(chosen: Labelled, per_class: int | None) -> None:
    """Names, in the log, the classes that have fewer images to learn from than were asked for."""
    learned = np.bincount(chosen.labels[~chosen.test], minlength=len(chosen.classes))
    counts, asked = zip(chosen.classes, learned, strict=True), per_class or 0
    few = [f"{name} has {count}" for name, count in counts if count < asked]
    if few:
        more = f" and {len(few) - 5} more classes have fewer" if len(few) > 5 else ""
        log.warning("fewer than %d images to learn from: %s%s; all are used", per_class, ", ".join(few[:5]), more)


def draw_validation(chosen: Labelled, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: the share of each class's images to learn from that validation keeps, one at least; none for 0.

    Drawn by the seed. At least one of each class stays to learn from. Groups are kept whole: with them the share is
    only roughly that, and a class may have none in validation.
    """
    held_out, random = np.zeros(len(chosen.labels), bool), np.random.default_rng([seed, 3])
    learned = chosen.groups[~chosen.test] if chosen.groups is not None else ()
    if fraction and len(np.unique(learned)) < len(learned):
        return _whole_groups(chosen, fraction, random)
    for mine in by_class(chosen.labels, ~chosen.test) if fraction else ():
        held_out[random.permutation(mine)[: min(max(1, round(fraction * len(mine))), len(mine) - 1)]] = True
    return held_out


def _whole_groups(chosen: Labelled, fraction: float, random: np.random.Generator) -> np.ndarray:
    """draw_validation by groups, greedily: in random order every group that fits into its classes' shares; then, for
    each class without validation images, the smallest group that leaves every class something to learn from.
    """
    learn = np.flatnonzero(~chosen.test)
    learn = learn[np.argsort(chosen.groups[learn], kind="stable")]
    groups = np.split(learn, np.flatnonzero(np.diff(chosen.groups[learn])) + 1)
    number = len(chosen.classes)
    has, held = np.bincount(chosen.labels[learn], minlength=number), np.zeros(number, np.int64)
    held_out, wanted = np.zeros(len(chosen.labels), bool), np.maximum(1, np.round(fraction * has))
    order = [groups[k] for k in random.permutation(len(groups))]
    counts = [np.unique(chosen.labels[group], return_counts=True) for group in order]
    for most, places in ((wanted, range(len(order))), (has, np.argsort([len(g) for g in order], kind="stable"))):
        for place in places:
            group, (its, count) = order[place], counts[place]
            lacking = most is wanted or (held[its] == 0).any()
            if lacking and not held_out[group[0]] and (held[its] + count <= np.minimum(most, has - 1)[its]).all():
                held_out[group] = True
                held[its] += count
    if not held_out.any():
        log.warning("validation has no image: no group leaves every class something to learn from")
    return held_out
