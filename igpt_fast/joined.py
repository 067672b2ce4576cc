"""Two token directories as one: images to learn from, and others, of the same classes, to test on."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_fast.classes import in_both
from igpt_fast.config import Config
from igpt_fast.console import counted, few_of
from igpt_fast.errors import InputError
from igpt_fast.palette import Palette
from igpt_fast.tokens import MOST, TokenDataset

log = logging.getLogger("igpt_fast")


class JoinedTokens:
    """What a probe asks of a dataset. Its "val" images are all of `test`, whatever the fraction; the rest is `train`.

    Groups that both have, such as a patient's, images that both have, and what was read in another way, are told in the
    log. Raises InputError when the two differ in size or palette, `test` has a class that `train` has not, or is of the
    same images.
    """

    def __init__(self, train: TokenDataset, test: TokenDataset) -> None:
        self.train, self.test, self.origin = train, test, train.origin
        self.size, self.colors, self.palette, self.classes = train.size, train.colors, train.palette, train.classes
        if train.size != test.size or not train.palette.equals(test.palette):
            raise InputError(f"{test.origin}: its images have another size or palette than those of {train.origin}")
        if test.made_of(train.stamp) or train.made_of(test.stamp):
            raise InputError(f"{test.origin}: holds the images that are learned from; give others to test on")
        self._compare_images()
        known = {name: k for k, name in enumerate(train.classes or [])}
        if new := [name for name in test.classes or [] if name not in known]:
            raise InputError(f"{test.origin}: has classes that {train.origin} lacks: {', '.join(map(str, new[:5]))}")
        if both := in_both(train.groups, test.groups):
            what = f"{counted(len(both), 'group')} ({few_of(both, 3)})"
            log.warning("%s: images of %s are learned from too, which makes the test too easy", test.origin, what)
        number = np.array([*map(known.__getitem__, test.classes or []), -1])  # the last: no label stays no label
        self.labels = np.concatenate([train.labels, number[test.labels]])

    def _compare_images(self) -> None:
        train, test = self.train, self.test
        for flag, other in test.read_otherwise(train.preprocessing):
            log.warning(
                "%s was made with %s, %s with %s: a model answers less well", test.origin, flag, train.origin, other
            )
        if too_many(train) or too_many(test):
            return
        learned = set(train.digests(np.arange(len(train))))
        tested = list(test.digests(np.arange(len(test))))
        if learned == set(tested):
            raise InputError(f"{test.origin}: holds the images that are learned from; give others to test on")
        _warn_of_equal(learned, tested, test.origin)

    @property
    def names(self) -> list[str]:
        """The images' names, each relative to its own source."""
        return [*self.train.names, *self.test.names]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How the images to learn from were read."""
        return self.train.preprocessing

    @property
    def groups(self) -> list[str]:
        """Of each image its group, or its own name; none is on both sides."""
        parts = ("learned", self.train), ("test", self.test)
        return [f"{part} {group}" for part, tokens in parts for group in tokens.groups or tokens.names]

    def __len__(self) -> int:
        return len(self.train) + len(self.test)

    def split(self, name: str, val_fraction: float = 0.1) -> np.ndarray:
        """Indices of the "train", "val" or "all" images."""
        first = len(self.train)
        return {"train": np.arange(first), "val": np.arange(first, len(self)), "all": np.arange(len(self))}[name]

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Tokens of the images `indices` as int64 [n, H, W]."""
        indices = np.asarray(indices)
        out, late = torch.empty(len(indices), *self.size, dtype=torch.int64, device="cpu"), indices >= len(self.train)
        for dataset, part, start in ((self.train, ~late, 0), (self.test, late, len(self.train))):
            if part.any():
                out[torch.from_numpy(part)] = dataset.batch(indices[part] - start)
        return out


def warn_of_twins(dataset: TokenDataset | JoinedTokens, learned: np.ndarray, tested: np.ndarray, which: str) -> None:
    """Says, in the log, how many of the images `tested` are the same, by their tokens, as some of `learned`.

    Both are indices of the dataset. which: what they are tested for, as " to test on". JoinedTokens have said it
    themselves; of more than MOST tokens it is not asked.
    """
    if len(tested) and isinstance(dataset, TokenDataset) and not too_many(dataset):
        _warn_of_equal(set(dataset.digests(learned)), list(dataset.digests(tested)), dataset.origin, which)


def too_many(dataset: TokenDataset) -> bool:
    """Whether looking through all tokens for equal images would take longer than it is worth."""
    return len(dataset) * math.prod(dataset.size) > MOST


def _warn_of_equal(learned: set[bytes], tested: list[bytes], where: str | Path, which: str = "") -> None:
    if twice := sum(digest in learned for digest in tested):
        what = f"{twice:,} of {counted(len(tested), 'image')}{which}"
        log.warning("%s: %s are learned from too, which makes the test too easy", where, what)


def refuse_misfit(dataset: TokenDataset | JoinedTokens, config: Config, palette: Palette | None = None) -> None:
    """InputError where the images have another size or number of colours than a model of `config` reads, or, where its
    palette is known, other colours.
    """
    if dataset.size != config.size or dataset.colors != config.colors:
        is_, wants = (f"{o.size[0]}x{o.size[1]} in {o.colors} colours" for o in (dataset, config))
        raise InputError(f"{dataset.origin}: the images are {is_}, the model is made for {wants}; tokenise them for it")
    if palette is not None and not dataset.palette.equals(palette):
        raise InputError(
            f"{dataset.origin}: its colours are others than the model's; tokenise the images with the model's palette"
        )
