"""Which of the images that a command looks at the model has learned from."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from igpt_fast.batches import fingerprint
from igpt_fast.checkpoint import Checkpoint
from igpt_fast.cli.inputs import run_of
from igpt_fast.console import say
from igpt_fast.errors import reading
from igpt_fast.run import LEARNED, learns_classes, read_options
from igpt_fast.tokens import TokenDataset, is_token_directory

CHUNK = 4096  # images read at a time


def seen_among(checkpoint: Checkpoint, dataset: TokenDataset, indices: np.ndarray) -> int | None:
    """How many of the images the model has learned from; None where that cannot be told.

    Of other data than the run's own those count whose tokens are the same. Of a fine-tuned model's last run the images
    of validation count as seen: the weights were chosen by them.
    """
    run = run_of(checkpoint)
    if run is None:
        return None
    saved = read_options(run)
    own = dataset if _is(dataset, saved) else _data_of(run, saved)
    if own is None or own.size != dataset.size:
        return None
    if learns_classes(saved):
        with reading(f"{run / LEARNED}:", "put it back"):
            learned = np.load(run / LEARNED, allow_pickle=False)
        learned = learned[learned < len(own)]
    else:
        learned = own.split("train", saved["options"]["val_fraction"])
    if own is dataset:
        return len(np.intersect1d(indices, learned))
    known = set(_digests(own, learned))
    return sum(digest in known for digest in _digests(dataset, indices))


def say_seen(checkpoint: Checkpoint, seen: int | None, words: str) -> None:
    """Says it: `words` of how many there are, that nobody knows, or nothing where there are none."""
    if seen:
        say(words)
    elif seen is None and run_of(checkpoint) is not None:
        say("whether the model has learned from some of these images cannot be told: those that it had are not there")


def _is(dataset: TokenDataset, saved: dict[str, Any]) -> bool:
    return {**saved["data"], "test": None} == {**fingerprint(dataset), "test": None}


def _data_of(run: Path, saved: dict[str, Any]) -> TokenDataset | None:
    """What a run has learned from, where it still lies."""
    for path in (run / "tokens", Path(saved["command"].get("data", run))):
        if is_token_directory(path) and _is(found := TokenDataset(path), saved):
            return found
    return None


def _digests(dataset: TokenDataset, indices: np.ndarray) -> Iterator[bytes]:
    for begin in range(0, len(indices), CHUNK):
        for tokens in dataset.batch(indices[begin : begin + CHUNK]).short().numpy():
            yield hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
