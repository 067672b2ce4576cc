"""Which images a training step sees, mirrored or not, masked where: a function of the seed and the step alone.

So a run that resumes at step s needs nothing but s to go on exactly as it would have.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast.data import TokenDataset
from igpt_fast.errors import InputError
from igpt_fast.model import MASKED
from igpt_fast.options import Options

ORDER, FLIP, MASK, VALIDATION = range(4)  # one random stream each, so that none depends on whether another is used
LOOKED_AT = 64  # images whose tokens stand for all of them in a fingerprint

Batch = tuple[Tensor, Tensor | None]  # tokens int64 [N, H, W]; keep bool [N, H, W], True = visible, None unless BERT


class Batches:
    """The images of one run: those to learn from, step by step, and those held out. InputError when none is left."""

    def __init__(self, dataset: TokenDataset, options: Options, objective: str) -> None:
        self.dataset, self.options, self.objective = dataset, options, objective
        self.indices = np.asarray(dataset.split("train", options.val_fraction))
        if not len(self.indices):
            raise InputError(f"no image is left to train on of {len(dataset)}: give more, or a smaller --val-fraction")
        held_out = np.asarray(dataset.split("val", options.val_fraction))
        count = min(len(held_out), options.val_images or len(held_out))
        # Evenly spread: neighbours are often of one class.
        self.held_out = held_out[np.linspace(0, len(held_out), count, endpoint=False, dtype=np.int64)]

    def of_step(self, step: int) -> Batch:
        """What step `step` (from 0) learns from: options.batch images."""
        seed = self.options.seed
        tokens = self.dataset.batch(images_of_step(self.indices, self.options.batch, seed, step))
        if self.options.flip:
            mirrored = torch.from_numpy(_random(seed, FLIP, step).random(len(tokens)) < 0.5)
            tokens = torch.where(mirrored[:, None, None], tokens.flip(2), tokens)
        return tokens, self._keep(MASK, step, tokens)

    def validation(self, batch: int) -> Iterator[Batch]:
        """The held-out images in batches, each image always under the same mask, however large a batch is."""
        for start in range(0, len(self.held_out), batch):
            tokens = self.dataset.batch(self.held_out[start : start + batch])
            masks = [self._keep(VALIDATION, start + n, image) for n, image in enumerate(tokens)]
            yield tokens, torch.stack(masks) if self.objective == "bert" else None

    def _keep(self, stream: int, number: int, tokens: Tensor) -> Tensor | None:
        if self.objective != "bert":
            return None
        drawn = _random(self.options.seed, stream, number).random(tuple(tokens.shape), dtype=np.float32)
        return torch.from_numpy(drawn > MASKED)


def images_of_step(indices: np.ndarray, batch: int, seed: int, step: int) -> np.ndarray:
    """The next `batch` of endless epochs, each all of `indices` (int64 [N]) in an order of its own: int64 [batch]."""
    chosen, place = [], step * batch
    while place < (step + 1) * batch:
        epoch, start = divmod(place, len(indices))
        part = _permutation(len(indices), seed, epoch)[start : start + (step + 1) * batch - place]
        chosen.append(indices[part])
        place += len(part)
    return np.concatenate(chosen)


def fingerprint(dataset: TokenDataset) -> dict[str, Any]:
    """What tells these data from others: their number, and digests of the palette and of some images' tokens."""
    some = np.linspace(0, len(dataset), min(len(dataset), LOOKED_AT), endpoint=False, dtype=np.int64)
    return {
        "images": len(dataset),
        "palette": _digest(np.asarray(dataset.palette.centers)),
        "tokens": _digest(dataset.batch(some).numpy()),
    }


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return _random(seed, ORDER, epoch).permutation(count)


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, number])
