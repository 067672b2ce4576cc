"""From images to the tokens that a model is trained on, in memory-mapped shards.

    source → decode (worker processes) → palette.encode (here, with all cores) → shards

Everything streams: memory does not depend on the number of images. This module is the door to its neighbours, one step
each: images (one image), sources (lists of them), decode (many, in parallel), pixels (for a palette or a probe), tokens
(on disk).
"""

import errno
import json
import os
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from igpt_fast.atomic import move_into_place, refuse_others, sync, work_directory
from igpt_fast.console import Bar, counted, say
from igpt_fast.console import progress as show_progress
from igpt_fast.decode import decode
from igpt_fast.errors import InputError
from igpt_fast.images import NOTED, Preprocessing
from igpt_fast.palette import Palette
from igpt_fast.pixels import FIT_LIMIT, Progress, as_source, by_name, fit_palette, load_pixels, refuse_none_left
from igpt_fast.sources import Source, open_source
from igpt_fast.tokens import FORMAT, TOKEN_FILES, VERSION, ShardWriter, TokenDataset, is_token_directory

__all__ = [
    "Source",
    "TokenDataset",
    "fit_palette",
    "load_pixels",
    "open_source",
    "open_tokens",
    "report_left_out",
    "show_steps",
    "tokenize",
]


def tokenize(
    source: Source | str | Path,
    palette: Palette | str | Path,
    out: str | Path,
    size: tuple[int, int] = (32, 32),
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    fit: dict | None = None,
    shard_images: int | None = None,
    **preprocessing: Any,
) -> TokenDataset:
    """Writes a source's images as tokens to the directory `out` (see igpt_fast.tokens), and opens it.

    The tokens, in the order of the source's names, do not depend on `workers`. `out` appears when it is complete: until
    then the work lies beside it under a hidden name, which goes away when an error or Ctrl-C ends the work.

    source: a Source, or a path for open_source. palette: a Palette or its file. size: (height, width). workers:
    processes that decode; 0: this one; None: one a core. overwrite: replace `out` when it holds tokens. progress:
    called as progress(done, total). fit: how the palette was made, noted in meta. shard_images: images in one file, 128
    MiB when None. preprocessing: the other fields of igpt_fast.images.Preprocessing: resize, background, on_error
    (what "skip" leaves out is listed in meta["skipped"]), value_range, bands, views (so many rows an image, one after
    the other, with its label and name). Raises InputError, leaving nothing behind.
    """
    out, how = Path(out), Preprocessing(size, **preprocessing)
    _refuse_existing(out, overwrite)
    source = as_source(source)
    palette = palette if isinstance(palette, Palette) else Palette.load(palette)
    if shard_images is not None and shard_images < 1:
        raise InputError(f"shard_images {shard_images} is less than 1; give how many images a file holds")
    try:
        with work_directory(out) as work:  # now: after an hour of work is a bad moment to learn that it cannot be
            writer = ShardWriter(work, len(source) * how.each, how.size, shard_images)
            failures = _encode(source, how, palette, workers, writer, progress)
            kept = np.delete(np.arange(len(source)), [index for index, _ in failures])
            refuse_none_left(source, len(kept), failures)
            shards = writer.finish(how.rows(kept))
            palette.save(work / "palette.npy")
            _describe(
                work, source, how, kept.repeat(how.each), failures, {"colors": len(palette), "shards": shards}, fit
            )
            _refuse_new(out, overwrite)
            move_into_place(work, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):  # None: cut short in NumPy
            raise InputError(f"{out}: the disk is full; make room, or choose a place on another") from error
        if error.errno in (errno.EFBIG, errno.EIO):
            error.filename = str(out)
        raise
    return TokenDataset(out)


def _encode(
    source: Source,
    how: Preprocessing,
    palette: Palette,
    workers: int | None,
    writer: ShardWriter,
    progress: Progress | None,
) -> list[tuple[int, str]]:
    """Writes the tokens of all images that can be read → the others, and what is wrong with each."""
    failures: list[tuple[int, str]] = []
    done = 0
    for part in decode(source, how, workers):
        if len(part.indices):
            writer.write(how.rows(part.indices), np.asarray(palette.encode(part.pixels)).astype(np.uint16))
        failures += part.failures
        done += part.seen
        if progress is not None:
            progress(done, len(source))
    return failures


def _describe(
    work: Path,
    source: Source,
    how: Preprocessing,
    images: np.ndarray,
    failures: list[tuple[int, str]],
    made: dict[str, Any],
    fit: dict | None,
) -> None:
    """Writes, in full, what lies beside the shards. images: int64 [rows], of the source. made: of meta, by others."""
    labels = np.full(len(images), -1, np.int32)
    if source.labels is not None:
        labels[:] = source.labels[images]
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "images": len(images),
        "size": list(how.size),
        **made,
        "classes": source.classes,
        "class_counts": source.classes and _counts(labels, source.classes),
        **_noted(how),
        "source": str(source.path.absolute()),
        "source_stamp": source.stamp,
        "ignored": source.ignored,
        "skipped": [{"name": name, "error": error} for name, error in by_name(source, failures)],
        "palette_fit": fit,
    }
    np.save(work / "labels.npy", labels)
    (work / "names.json").write_text(json.dumps([source.names[index] for index in images]))
    if source.groups is not None:
        (work / "groups.json").write_text(json.dumps([source.groups[index] for index in images]))
    (work / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in {*work.iterdir()} - {*work.glob("shard-*")}:  # those are on the disk already
        sync(path)


def open_tokens(
    path: Source | str | Path,
    palette: Palette | str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    size: tuple[int, int] | None = None,
    workers: int | None = None,
    colors: int = 512,
    seed: int = 0,
    kept: bool = True,
    remedy: str = "delete that directory to make them anew",
    **preprocessing: Any,
) -> TokenDataset:
    """Opens a token directory, or makes one at `cache_dir` from images first, and opens that.

    path: a token directory, a Source, or what open_source takes. palette: to tokenise with, or, of a token directory,
    the one that it must have. None: fits one with `colors` colours to at most 10,000 images drawn by `seed`. size:
    (height, width); None: 32×32, or whatever a token directory has. Tokens that lie at `cache_dir` already are used
    again when they were made from the same images in the same way, with a line that says so. kept: False: `cache_dir`
    goes away, and is named nowhere. workers, preprocessing: as for `tokenize`. Raises InputError when they, or a token
    directory's size or palette, differ, saying how; of those at cache_dir with the remedy given.
    """
    how = Preprocessing(size or (32, 32), **preprocessing)
    palette = Palette.load(palette) if isinstance(palette, (str, Path)) else palette
    if not isinstance(path, Source) and is_token_directory(path):
        tokens = TokenDataset(path)
        _refuse_other(tokens, {} if size is None else {"size": list(size)}, palette, "give tokens that fit, or images")
        return tokens
    source = as_source(path)
    if cache_dir is None:
        raise InputError(f"{source.path}: holds images, not tokens; run igpt-fast tokenize first, or say cache_dir")
    fit = {"colors": colors, "seed": seed, "limit": FIT_LIMIT} if palette is None else None
    if is_token_directory(cache_dir):
        tokens = TokenDataset(cache_dir)
        wanted = {"size": list(how.size), **_noted(how)}
        wanted |= {} if tokens.made_of(source.stamp) else {"source_stamp": source.stamp}
        wanted |= {"skipped": []} if how.on_error == "raise" else {}
        wanted |= {"palette_fit": fit} if palette is None else {}
        _refuse_other(tokens, wanted, palette, remedy)
        say(f"using the tokens at {cache_dir} again: {_summary(tokens)}")
        return tokens
    _refuse_existing(Path(cache_dir), overwrite=False)
    options = {**asdict(how), "workers": workers}
    if palette is None:
        with show_progress(min(len(source), FIT_LIMIT), "images", "palette") as bar:
            palette, _, _ = fit_palette(
                source, colors, **options, seed=seed, progress=bar.to, fitting=partial(show_steps, bar)
            )
    _refuse_new(Path(cache_dir), overwrite=False)
    with show_progress(len(source), "images", "tokenising") as bar:
        tokens = tokenize(source, palette, cache_dir, **options, progress=bar.to, fit=fit)
    say(f"wrote tokens to {cache_dir}: {_summary(tokens)}" if kept else f"tokenised {_summary(tokens)}")
    tokens.origin = tokens.origin if kept else source.path
    for line in report_left_out(tokens.meta["ignored"], [(s["name"], s["error"]) for s in tokens.meta["skipped"]]):
        say(line)
    return tokens


def _counts(labels: np.ndarray, classes: list[str]) -> dict[str, int]:
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


def report_left_out(ignored: dict[str, int], skipped: list[tuple[str, str]], listed: int = 20) -> list[str]:
    """Lines for a person about files that were not images (counted), and about those that could not be read.

    skipped: (name, why) of each. Of those that have the same reason the first is named; at most `listed` reasons are.
    """
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
    lines = [f"ignored {counted(sum(ignored.values()), 'file')}: {kinds}"] if ignored else []
    alike: dict[str, list[str]] = {}
    for name, error in skipped:  # numbers and what stands in brackets are an image's own
        reason = re.sub(r"\(.*?\)|\d[\d.,]*", "", error.rpartition(f"{name}: ")[2])
        alike.setdefault(reason, []).append(error)
    if skipped:
        lines.append(f"skipped {counted(len(skipped), 'image')} that could not be read:")
    for errors in list(alike.values())[:listed]:
        lines.append(f"  {errors[0]}" + (f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""))
    rest = sum(map(len, list(alike.values())[listed:]))
    return [*lines, f"  and {rest} more"] if rest else lines


def show_steps(bar: Bar, step: int, _: int) -> None:
    """Shows the steps of k-means behind the images that a bar counts; bound to its bar, a `fitting` of fit_palette."""
    bar.to(bar.done, **{"k-means steps": step})


def _noted(how: Preprocessing) -> dict[str, Any]:
    """What of it the tokens note, beside their size."""
    noted = {name: getattr(how, name) for name in (*NOTED, "views")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in noted.items()}  # as JSON has it


def _summary(tokens: TokenDataset) -> str:
    return f"{len(tokens)} images, {tokens.size[0]}x{tokens.size[1]}, {tokens.colors} colours"


def _refuse_other(tokens: TokenDataset, wanted: dict, palette: Palette | None, remedy: str) -> None:
    """Raises InputError, saying what differs, when tokens were not made as `wanted` and with `palette`."""
    made = {
        "value_range": None,
        "bands": None,
        "views": 0,
        **tokens.meta,
        **tokens.preprocessing,
    }  # older ones do not say
    words = {
        "source_stamp": "the images have changed since, or are others",
        "skipped": "unreadable images were skipped",
    }
    differs = [
        words.get(key, f"{key} is {made.get(key)}, not {value}")
        for key, value in wanted.items()
        if made.get(key) != value
    ]
    if palette is not None and not palette.equals(tokens.palette):
        differs.append(f"the palette is another ({tokens.colors} colours, the one given has {len(palette)})")
    if differs:
        raise InputError(f"{tokens.path}: these tokens were made in another way: {'; '.join(differs)}; {remedy}")


def _refuse_new(out: Path, overwrite: bool) -> None:
    """As `_refuse_existing`, of a place that was free when the work began."""
    if is_token_directory(out) and not overwrite:
        raise InputError(f"{out}: another process has written tokens there meanwhile; start again to use them")
    _refuse_existing(out, overwrite)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_token_directory(out):
        raise InputError(f"{out}: exists and holds no tokens; choose another place for the tokens")
    if not overwrite:
        raise InputError(f"{out}: holds tokens already; choose another place, or replace them with --overwrite")
    refuse_others(out, TOKEN_FILES)
