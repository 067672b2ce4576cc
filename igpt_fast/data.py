"""From images to what the model is trained on: pixels for a palette, tokens in memory-mapped shards.

    source → decode (worker processes) → palette.encode (here, with all cores) → shards

Everything streams: memory does not depend on the number of images.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from igpt_fast.console import progress as show_progress
from igpt_fast.console import say
from igpt_fast.decode import check_options, decode
from igpt_fast.errors import InputError
from igpt_fast.palette import Palette
from igpt_fast.sources import Source, open_source
from igpt_fast.tokens import FORMAT, VERSION, ShardWriter, TokenDataset, is_token_directory

__all__ = ["FIT_LIMIT", "Source", "TokenDataset", "load_pixels", "open_source", "open_tokens", "tokenize"]

FIT_LIMIT = 10_000  # images that a palette is fitted to: more colours of the same kind move its centres very little

Progress = Callable[[int, int], None]


def load_pixels(
    source: Source | str | Path,
    size: tuple[int, int] = (32, 32),
    resize: str = "paper",
    background: str = "white",
    on_error: str = "raise",
    workers: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Images as pixels in memory: uint8 [n, H, W, 3], labels int64 [n] (-1: unknown), and (name, why) of skipped ones.

    limit: at most so many images, drawn at random by `seed`, in the order of the source; all when None. The other
    arguments as for `tokenize`. Raises InputError when the source cannot be read or no image is left.
    """
    source = _source(source)
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} leaves no image; give at least 1, or none for all")
    count = len(source) if limit is None else min(limit, len(source))
    chosen = np.sort(np.random.default_rng(seed).choice(len(source), count, replace=False))
    pixels = np.empty((count, *size, 3), np.uint8)
    failures: list[tuple[int, str]] = []
    done = 0
    for part in decode(source, size, resize, background, on_error, workers, chosen):
        pixels[np.searchsorted(chosen, part.indices)] = part.pixels
        failures += part.failures
        done += part.seen
        if progress is not None:
            progress(done, count)
    good = np.isin(chosen, [index for index, _ in failures], invert=True)
    _refuse_none_left(source, int(good.sum()), failures)
    labels = np.full(len(source), -1, np.int64) if source.labels is None else source.labels
    return pixels if good.all() else pixels[good], labels[chosen[good]], _skipped(source, failures)


def tokenize(
    source: Source | str | Path,
    palette: Palette | str | Path,
    out: str | Path,
    size: tuple[int, int] = (32, 32),
    resize: str = "paper",
    background: str = "white",
    on_error: str = "raise",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    fit: dict | None = None,
    shard_images: int | None = None,
) -> TokenDataset:
    """Writes a source's images as tokens to the directory `out` (see igpt_fast.tokens), and opens it.

    The tokens, in the order of the source's names, do not depend on `workers`. `out` appears when it is complete: until
    then the work lies beside it under a hidden name, which goes away when an error or Ctrl-C ends the work.

    source: a Source, or a path for open_source. palette: a Palette or its file. size: (height, width). resize: "paper",
    "hf" or "none". background: seen through transparent pixels. on_error: "raise", or "skip" to leave corrupt files out
    and list them in meta["skipped"]. workers: processes that decode; 0: this one; None: one a core. overwrite:
    replace `out` when it holds tokens. progress: called as progress(done, total). fit: how the palette was made, noted
    in meta. shard_images: images in one file, 128 MiB when None. Raises InputError, leaving nothing behind.
    """
    check_options(size, resize, background, on_error)
    source, out = _source(source), Path(out)
    palette = palette if isinstance(palette, Palette) else Palette.load(palette)
    if shard_images is not None and shard_images < 1:
        raise InputError(f"shard_images {shard_images} is less than 1; give how many images a file holds")
    _refuse_existing(out, overwrite)
    work = _make_work_directory(out)  # now: an hour of work is a bad moment to learn that it cannot be written
    try:
        writer = ShardWriter(work, len(source), size, shard_images)
        failures: list[tuple[int, str]] = []
        done = 0
        for part in decode(source, size, resize, background, on_error, workers):
            if len(part.indices):
                writer.write(part.indices, np.asarray(palette.encode(part.pixels)).astype(np.uint16))
            failures += part.failures
            done += part.seen
            if progress is not None:
                progress(done, len(source))
        kept = np.delete(np.arange(len(source)), [index for index, _ in failures])
        _refuse_none_left(source, len(kept), failures)
        labels = np.full(len(kept), -1, np.int32) if source.labels is None else source.labels[kept].astype(np.int32)
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "images": len(kept),
            "size": [int(n) for n in size],
            "colors": len(palette),
            "shards": writer.finish(kept),
            "classes": source.classes,
            "class_counts": source.classes and {c: int((labels == k).sum()) for k, c in enumerate(source.classes)},
            "resize": resize,
            "background": background,
            "source": str(source.path.absolute()),
            "source_stamp": source.stamp,
            "ignored": source.ignored,
            "skipped": [{"name": name, "error": error} for name, error in _skipped(source, failures)],
            "palette_fit": fit,
        }
        palette.save(work / "palette.npy")
        np.save(work / "labels.npy", labels)
        (work / "names.json").write_text(json.dumps([source.names[index] for index in kept]))
        (work / "meta.json").write_text(json.dumps(meta, indent=1))
        for name in ("palette.npy", "labels.npy", "names.json", "meta.json"):
            with open(work / name, "rb") as file:
                os.fsync(file.fileno())
        _move_into_place(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return TokenDataset(out)


def open_tokens(
    path: str | Path,
    palette: Palette | str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    size: tuple[int, int] | None = None,
    resize: str = "paper",
    background: str = "white",
    on_error: str = "raise",
    workers: int | None = None,
    colors: int = 512,
    seed: int = 0,
) -> TokenDataset:
    """Opens a token directory, or makes one at `cache_dir` from images first, and opens that.

    palette: to tokenise with, or, of a token directory, the one that it must have. None: fits one with `colors`
    colours to at most 10,000 images drawn by `seed`. size: (height, width); None: 32×32, or whatever a token directory
    has. Tokens that lie at `cache_dir` already are used again when they were made from the same images in the same way,
    with a line that says so. Raises InputError when they, or a token directory's size or palette, differ, saying how.
    """
    palette = Palette.load(palette) if isinstance(palette, (str, Path)) else palette
    if is_token_directory(path):
        tokens = TokenDataset(path)
        _refuse_other(tokens, {} if size is None else {"size": list(size)}, palette, "give tokens that fit, or images")
        return tokens
    size = size or (32, 32)
    check_options(size, resize, background, on_error)
    source = _source(path)
    if cache_dir is None:
        raise InputError(f"{path}: is not a directory of tokens; write one with igpt-fast tokenize, or say cache_dir")
    fit = {"colors": colors, "seed": seed, "limit": FIT_LIMIT} if palette is None else None
    if is_token_directory(cache_dir):
        tokens = TokenDataset(cache_dir)
        wanted = {"size": list(size), "resize": resize, "background": background, "source_stamp": source.stamp}
        if on_error == "raise":
            wanted["skipped"] = []
        _refuse_other(tokens, {**wanted, "palette_fit": fit}, palette, "delete that directory to make them anew")
        say(f"using the tokens at {cache_dir} again: {_summary(tokens)}")
        return tokens
    _refuse_existing(Path(cache_dir), overwrite=False)
    options = {"size": size, "resize": resize, "background": background, "on_error": on_error, "workers": workers}
    if palette is None:
        with show_progress(min(len(source), FIT_LIMIT), "images", "reading for the palette") as bar:
            pixels, _, _ = load_pixels(source, **options, limit=FIT_LIMIT, seed=seed, progress=bar.to)
        palette = Palette.fit(pixels, colors, seed=seed)
        del pixels
    with show_progress(len(source), "images", "tokenising") as bar:
        tokens = tokenize(source, palette, cache_dir, **options, progress=bar.to, fit=fit)
    say(f"wrote tokens to {cache_dir}: {_summary(tokens)}")
    for line in report_left_out(tokens.meta["ignored"], [s["error"] for s in tokens.meta["skipped"]]):
        say(line)
    return tokens


def report_left_out(ignored: dict[str, int], skipped: list[str], listed: int = 20) -> list[str]:
    """Lines for a person about files that were not images (counted) and corrupt ones (the first `listed` in full)."""
    lines = [f"ignored {sum(ignored.values())} files: " + ", ".join(f"{n} {why}" for why, n in sorted(ignored.items()))]
    lines = lines if ignored else []
    if skipped:
        lines += [f"skipped {len(skipped)} corrupt images:", *(f"  {error}" for error in skipped[:listed])]
        lines += [f"  and {len(skipped) - listed} more"] if len(skipped) > listed else []
    return lines


def _summary(tokens: TokenDataset) -> str:
    return f"{len(tokens)} images, {tokens.size[0]}x{tokens.size[1]}, {tokens.colors} colours"


def _source(source: Source | str | Path) -> Source:
    if isinstance(source, Source):
        return source
    if is_token_directory(source):
        raise InputError(f"{source}: holds tokens, not images; give the images that they were made from")
    return open_source(source)


def _skipped(source: Source, failures: list[tuple[int, str]]) -> list[tuple[str, str]]:
    return [(source.names[index], error) for index, error in sorted(failures)]


def _refuse_none_left(source: Source, count: int, failures: list[tuple[int, str]]) -> None:
    if count == 0:
        raise InputError(f"{source.path}: none of {len(failures)} images can be read; the first: {failures[0][1]}")


def _refuse_other(tokens: TokenDataset, wanted: dict, palette: Palette | None, remedy: str) -> None:
    """Raises InputError, saying what differs, when tokens were not made as `wanted` and with `palette`."""
    words = {"source_stamp": "the images have changed since, or are others", "skipped": "corrupt images were skipped"}
    differs = [
        words.get(key, f"{key} is {tokens.meta[key]}, not {value}")
        for key, value in wanted.items()
        if tokens.meta[key] != value
    ]
    if palette is not None and not np.array_equal(np.asarray(palette.centers), np.asarray(tokens.palette.centers)):
        differs.append(f"the palette is another ({tokens.colors} colours, the one given has {len(palette)})")
    if differs:
        raise InputError(f"{tokens.path}: these tokens were made in another way: {'; '.join(differs)}; {remedy}")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_token_directory(out):
        raise InputError(f"{out}: exists and holds no tokens; choose another place for the tokens")
    if not overwrite:
        raise InputError(f"{out}: holds tokens already; choose another place, or replace them with --overwrite")


def _make_work_directory(out: Path) -> Path:
    work = out.absolute().parent / f".{out.absolute().name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose a place that can") from error
    return work


def _move_into_place(work: Path, out: Path) -> None:
    """Renames work to out. An old out is moved aside before and deleted after, so one of them is there in whole."""
    aside = work.with_name(work.name + ".old")
    if out.exists():
        os.rename(out, aside)
    os.rename(work, out)
    shutil.rmtree(aside, ignore_errors=True)
