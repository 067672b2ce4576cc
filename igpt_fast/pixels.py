"""Images as pixels: streamed into a palette, or held in memory for a probe or a look."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from igpt_fast.decode import decode
from igpt_fast.errors import InputError
from igpt_fast.images import Preprocessing
from igpt_fast.palette import Palette
from igpt_fast.sources import Source, open_source
from igpt_fast.tokens import is_token_directory

FIT_LIMIT = 10_000  # images that a palette is fitted to: more colours of the same kind move its centres very little

Progress = Callable[[int, int], None]


def fit_palette(
    source: Source | str | Path,
    colors: int = 512,
    size: tuple[int, int] = (32, 32),
    *,
    workers: int | None = None,
    limit: int | None = FIT_LIMIT,
    seed: int = 0,
    progress: Progress | None = None,
    fitting: Progress | None = None,
    **preprocessing: Any,
) -> tuple[Palette, int, list[tuple[str, str]]]:
    """Palette.fit on a source's images, part by part. Returns the palette, how many images it saw, and (name, why) of
    those skipped.

    limit: at most so many images, drawn at random by `seed`, which also starts k-means; None: all. progress: of the
    decoding, as progress(done, total). fitting: of k-means, as fitting(step, most steps that there can be). The other
    arguments as for `tokenize`. Raises InputError when no image is left, or as Palette.fit does.
    """
    source, how = as_source(source), Preprocessing(size, **preprocessing)
    chosen = _draw(source, limit, seed)
    failures: list[tuple[int, str]] = []

    def batches() -> Iterator[np.ndarray]:
        done = 0
        for part in decode(source, how, workers, chosen):
            yield part.pixels
            failures.extend(part.failures)
            done += part.seen
            if progress is not None:
                progress(done, len(chosen))
        refuse_none_left(source, len(chosen) - len(failures), failures)

    palette = Palette.fit(batches(), colors, seed=seed, progress=fitting)
    return palette, len(chosen) - len(failures), by_name(source, failures)


def load_pixels(
    source: Source | str | Path,
    size: tuple[int, int] = (32, 32),
    *,
    workers: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **preprocessing: Any,
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Images as pixels in memory: uint8 [n, H, W, 3], labels int64 [n] (-1: unknown), and (name, why) of skipped ones.

    limit: at most so many images, drawn at random by `seed`, in the order of the source; all when None. The other
    arguments as for `tokenize`. Raises InputError when the source cannot be read or no image is left.
    """
    source, how = as_source(source), Preprocessing(size, **preprocessing)
    if how.views:
        raise InputError(f"views is {how.views}; pixels are loaded as the evaluation crops them: leave it out")
    chosen = _draw(source, limit, seed)
    pixels = np.empty((len(chosen), *how.size, 3), np.uint8)
    failures: list[tuple[int, str]] = []
    done = 0
    for part in decode(source, how, workers, chosen):
        pixels[np.searchsorted(chosen, part.indices)] = part.pixels
        failures += part.failures
        done += part.seen
        if progress is not None:
            progress(done, len(chosen))
    good = np.isin(chosen, [index for index, _ in failures], invert=True)
    refuse_none_left(source, int(good.sum()), failures)
    labels = np.full(len(source), -1, np.int64) if source.labels is None else source.labels
    return pixels if good.all() else pixels[good], labels[chosen[good]], by_name(source, failures)


def as_source(source: Source | str | Path) -> Source:
    """A Source as it is, a path opened. Raises InputError as open_source does, and for a directory of tokens."""
    if isinstance(source, Source):
        return source
    if is_token_directory(source):
        raise InputError(f"{source}: holds tokens, not images; give the images that they were made from")
    return open_source(source)


def _draw(source: Source, limit: int | None, seed: int) -> np.ndarray:
    """Indices (int64, ascending) of at most `limit` images drawn by `seed`; of all when None."""
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} leaves no image; give at least 1, or none for all")
    return at_most(limit, np.arange(len(source)), seed)


def drawn_from(source: Source, limit: int | None, seed: int) -> Source:
    """At most `limit` of a source's images, drawn by `seed`, as a Source whose stamp says so; all when None."""
    chosen = _draw(source, limit, seed)
    if len(chosen) == len(source):
        return source
    names, refs = ([of[k] for k in chosen] for of in (source.names, source.refs))
    labels = None if source.labels is None else source.labels[chosen]
    groups = None if source.groups is None else [source.groups[k] for k in chosen]
    stamp = f"{limit} by {seed} of {source.stamp}"
    return replace(source, names=names, refs=refs, stamp=stamp, labels=labels, groups=groups)


def at_most(limit: int | None, indices: np.ndarray, seed: int | Sequence[int]) -> np.ndarray:
    """The images, or, where there are more than `limit`, so many that the seed draws, in their order."""
    if limit is None or limit >= len(indices):
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, limit, replace=False))


def by_name(source: Source, failures: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """(name, why) of the images that decode could not give, in the order of the source."""
    return [(source.names[index], error) for index, error in sorted(failures)]


def refuse_none_left(source: Source, count: int, failures: list[tuple[int, str]]) -> None:
    """Raises InputError when `count`, the images that could be read, is nothing."""
    if count == 0:
        raise InputError(f"{source.path}: none of {len(failures)} images can be read; the first: {failures[0][1]}")
