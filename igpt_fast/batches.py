"""Which images a training step sees, mirrored or not, masked where: a function of the seed and the step alone.

So a run that resumes at step s needs nothing but s to go on exactly as it would have.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from igpt_fast.data import TokenDataset
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens
from igpt_fast.model import MASKED
from igpt_fast.options import Options

ORDER, FLIP, MASK, VALIDATION, SHIFT = range(5)  # one random stream each, so that none depends on another's use
LOOKED_AT = 64  # images whose tokens stand for all of them in a fingerprint


class Batch(NamedTuple):
    """Some images."""

    tokens: Tensor  # int64 [N, H, W]
    keep: Tensor | None = None  # bool [N, H, W], True = visible; None unless BERT
    labels: Tensor | None = None  # int64 [N]; None unless classes are learned

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With `change` made to every tensor."""
        return Batch(*(None if tensor is None else change(tensor) for tensor in self))


class Batches:
    """The images of one run: those to learn from, step by step, and those held out. InputError when none is left.

    split: indices of the dataset, those to learn from and those to hold out; None: by its names. labels: int64 [N], of
    all the dataset.
    """

    def __init__(
        self,
        dataset: TokenDataset | JoinedTokens,
        options: Options,
        objective: str,
        split: tuple[np.ndarray, np.ndarray] | None = None,
        labels: np.ndarray | None = None,
    ) -> None:
        self.dataset, self.options, self.objective, self.labels = dataset, options, objective, labels
        self.indices, held_out = split or (dataset.split(part, options.val_fraction) for part in ("train", "val"))
        if not len(self.indices):
            raise InputError(f"no image is left to train on of {len(dataset)}: give more, or a smaller --val-fraction")
        if options.shift >= min(dataset.size):
            raise InputError(f"--shift is {options.shift}; use less than the {min(dataset.size)} pixels of a side")
        count = min(len(held_out), options.val_images or len(held_out))
        # Evenly spread: neighbours are often of one class.
        self.held_out = held_out[np.linspace(0, len(held_out), count, endpoint=False, dtype=np.int64)]

    def of_step(self, step: int) -> Batch:
        """What step `step` (from 0) learns from: options.batch images."""
        seed, reach = self.options.seed, self.options.shift
        images = images_of_step(self.indices, self.options.batch, seed, step)
        tokens = self.dataset.batch(images)
        if self.options.flip:
            mirrored = torch.from_numpy(_random(seed, FLIP, step).random(len(tokens)) < 0.5)
            tokens = torch.where(mirrored[:, None, None], tokens.flip(2), tokens)
        if reach:
            tokens = shifted(tokens, _random(seed, SHIFT, step).integers(-reach, reach + 1, (2, len(tokens))))
        return Batch(tokens, self._keep(MASK, step, tokens), self._labels(images))

    def validation(self, batch: int) -> Iterator[Batch]:
        """The held-out images in batches, each image always under the same mask, however large a batch is."""
        for start in range(0, len(self.held_out), batch):
            images = self.held_out[start : start + batch]
            tokens, keep = self.dataset.batch(images), None
            if self.objective == "bert" and self.labels is None:  # classes are told by whole images
                keep = torch.stack([self._keep(VALIDATION, start + n, image) for n, image in enumerate(tokens)])
            yield Batch(tokens, keep, self._labels(images))

    def _labels(self, images: np.ndarray) -> Tensor | None:
        return None if self.labels is None else torch.from_numpy(self.labels[images])

    def _keep(self, stream: int, number: int, tokens: Tensor) -> Tensor | None:
        if self.objective != "bert":
            return None
        drawn = _random(self.options.seed, stream, number).random(tuple(tokens.shape), dtype=np.float32)
        return torch.from_numpy(drawn > MASKED)


def shifted(tokens: Tensor, by: np.ndarray) -> Tensor:
    """Each image moved over its mirrored surroundings, as when it is padded by reflection and cropped.

    tokens [N, H, W]; by: integers [2, N], rows and columns, less than H and W either way. Colours only change places,
    so this is what the same would be of pixels before they became tokens.
    """
    places = []
    for side, move in zip(tokens.shape[1:], by, strict=True):
        place = np.abs(np.arange(side) + move[:, None])  # before the first: mirrored at it
        places.append(torch.from_numpy(np.minimum(place, 2 * (side - 1) - place)))  # beyond the last: at that
    rows, columns = places
    return tokens[torch.arange(len(tokens), device="cpu")[:, None, None], rows[:, :, None], columns[:, None, :]]


def images_of_step(indices: np.ndarray, batch: int, seed: int, step: int) -> np.ndarray:
    """The next `batch` of endless epochs, each all of `indices` (int64 [N]) in an order of its own: int64 [batch]."""
    chosen, place = [], step * batch
    while place < (step + 1) * batch:
        epoch, start = divmod(place, len(indices))
        part = _permutation(len(indices), seed, epoch)[start : start + (step + 1) * batch - place]
        chosen.append(indices[part])
        place += len(part)
    return np.concatenate(chosen)


def fingerprint(dataset: TokenDataset | JoinedTokens) -> dict[str, Any]:
    """What tells these data from others: their number, and digests of the palette, of some images' tokens, and of the
    names and groups, which split them.
    """
    if isinstance(dataset, JoinedTokens):
        return {**fingerprint(dataset.train), "test": fingerprint(dataset.test)["tokens"]}
    groups = {} if dataset.groups is None else {"groups": _digest_of_texts(dataset.groups)}
    some = np.linspace(0, len(dataset), min(len(dataset), LOOKED_AT), endpoint=False, dtype=np.int64)
    return {
        "images": len(dataset),
        "palette": digest(np.asarray(dataset.palette.centers)),
        "tokens": digest(dataset.batch(some).numpy()),
        "names": _digest_of_texts(dataset.names),
        **groups,
    }


def digest(values: np.ndarray) -> str:
    """A few letters that tell one array's contents from another's."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def _digest_of_texts(texts: list[str]) -> str:
    """digest() of them as one array, which a single long one would make huge."""
    found, width = hashlib.sha256(), max(map(len, texts))
    for at in range(0, len(texts), LOOKED_AT):
        found.update(np.array(texts[at : at + LOOKED_AT], f"U{width}").tobytes())
    return found.hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return _random(seed, ORDER, epoch).permutation(count)


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, number])
