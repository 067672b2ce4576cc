"""Which of the images that a command looks at the model has learned from."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from igpt_fast.batches import fingerprint
from igpt_fast.checkpoint import CONFIG, STATE, Checkpoint
from igpt_fast.cli.inputs import run_of
from igpt_fast.console import say
from igpt_fast.errors import InputError, as_input_error
from igpt_fast.joined import JoinedTokens, too_many
from igpt_fast.labels import Labelled
from igpt_fast.made import CHECKPOINTS, OPTIONS
from igpt_fast.pretrained.settings import OURS
from igpt_fast.run import IN_PYTHON, LEARNED, learns_classes, read_options
from igpt_fast.tokens import TokenDataset, is_token_directory


def seen_among(checkpoint: Checkpoint, dataset: TokenDataset, indices: np.ndarray) -> int | None:
    """How many of the images the model has learned from, as far as it is known; None where that is none.

    Those count whose tokens are the same, where the run's still lie there whole; of the same files also those of the
    same names, however they were read. Of other files that were read in another way it is not known. What the runs
    that it began with have learned from counts too, and of a fine-tuned model's runs the images of validation: the
    weights were chosen by them.
    """
    if (newest := run_of(checkpoint)) is None:
        return None
    seen, known, all_known = np.zeros(len(indices), bool), set(), True
    for run, saved in _lineage(newest):
        itself = run is not None and "names" in saved["data"] and _is(dataset, saved)
        own = dataset if itself else None if run is None else _data_of(run, saved)
        if own is None or own.size != dataset.size:
            all_known = False
            continue
        learned = _learned(run, saved, own)
        same, otherwise = own is dataset, _read_otherwise(dataset, own)
        if same:
            seen |= np.isin(indices, learned)
        elif own.made_of(dataset.stamp) or dataset.made_of(own.stamp):
            same, named = True, {own.names[index] for index in learned}
            seen |= np.fromiter((dataset.names[index] in named for index in indices), bool, len(indices))
        if same and (otherwise or too_many(own)):
            continue
        all_known = all_known and not otherwise
        try:
            known |= set(own.digests(learned))
        except InputError:  # a remark is not worth ending for
            all_known = False
    if known:
        seen |= np.fromiter((digest in known for digest in dataset.digests(indices)), bool, len(indices))
    return int(seen.sum()) if all_known or seen.any() else None


def _read_otherwise(dataset: TokenDataset, own: TokenDataset) -> bool:
    """Whether one image would have other tokens in the two."""
    views = [tokens.meta.get("views", 0) for tokens in (dataset, own)]
    return any(views) or any(dataset.read_otherwise(own.preprocessing))


def _lineage(run: Path) -> Iterator[tuple[Path | None, dict[str, Any]]]:
    """The run with its train.json, the one whose weights it began with, and so on to fresh or published ones.

    None: what it began with is not there, or does not say what it has learned from.
    """
    passed: set[Path] = set()
    while run is not None and run.resolve() not in passed:
        passed.add(run.resolve())
        yield run, (saved := read_options(run))
        command = saved["command"]
        if (begun := command.get("init")) is None:
            return
        if begun == IN_PYTHON:
            yield None, {}
            return
        path, whole = Path(begun), "from_tokens" in command  # older runs note paths as they were given, from anywhere
        if whole and not path.is_absolute():
            return  # a name on the hub: published
        around = {place: None for p in (path, path.resolve()) for place in (p, p.parent, p.parent.parent)}
        run = next((place for place in around if (place / OPTIONS).is_file()), None)
        gone = not path.exists() and not path.with_name(f"{path.name}.index").exists()
        if run is None and (gone or any((place / CHECKPOINTS).is_dir() for place in around) or _made_here(path)):
            yield None, {}


def _made_here(path: Path) -> bool:
    """Whether weights lie there that were written here, and not published as they are."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return (path / STATE).is_file() or OURS in json.loads((path / CONFIG).read_bytes())
    return False


def _learned(run: Path, saved: dict[str, Any], own: TokenDataset) -> np.ndarray:
    """Indices of the images of `own` that a run has learned from, or was chosen by."""
    if not learns_classes(saved):
        return own.split("train", saved["options"]["val_fraction"])
    with as_input_error(f"{run / LEARNED}:", "put it back"):
        learned = np.load(run / LEARNED, allow_pickle=False)
    return learned[learned < len(own)]


def seen_in_test(checkpoint: Checkpoint, dataset: TokenDataset | JoinedTokens, labelled: Labelled) -> int | None:
    """`seen_among`, of the images that are tested on."""
    tested = labelled.tested
    if isinstance(dataset, JoinedTokens):
        return seen_among(checkpoint, dataset.test, tested - len(dataset.train))
    return seen_among(checkpoint, dataset, tested)


def say_seen(checkpoint: Checkpoint, seen: int | None, words: str) -> None:
    """Says it: `words` of how many there are, that nobody knows, or nothing where there are none."""
    if seen:
        say(words)
    elif seen is None and (run_of(checkpoint) is not None or _made_here(checkpoint.path)):
        say("whether the model has learned from some of these images is not known")


def _is(dataset: TokenDataset, saved: dict[str, Any]) -> bool:
    """Whether these are the images of a run, by the same names, which older runs do not note."""
    unsaid = {} if "names" in saved["data"] else {"names": None}
    return {**saved["data"], **unsaid, "test": None} == {**fingerprint(dataset), **unsaid, "test": None}


def _data_of(run: Path, saved: dict[str, Any]) -> TokenDataset | None:
    """What a run has learned from, where it still lies."""
    for path in (run / "tokens", Path(saved["command"].get("data", run))):
        with contextlib.suppress(InputError):
            if is_token_directory(path) and _is(found := TokenDataset(path), saved):
                return None if too_many(found) else found
    return None
