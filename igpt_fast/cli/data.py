"""`igpt-fast palette` and `igpt-fast tokenize`: from images to what is trained on."""

import os
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from igpt_fast.atomic import write_atomically
from igpt_fast.checkpoint import STATE
from igpt_fast.cli.inputs import LimitOption, refuse_replacing
from igpt_fast.cli.options import (
    DataArgument,
    Given,
    JsonOption,
    SeedOption,
    SizeOption,
    WorkersOption,
    expanded,
    parse_size,
    print_json,
    reading,
)
from igpt_fast.console import counted, few_of, progress, say
from igpt_fast.data import fit_palette, report_left_out, show_steps
from igpt_fast.data import tokenize as tokenize_images
from igpt_fast.errors import InputError
from igpt_fast.images import MOST_VIEWS
from igpt_fast.palette import Palette
from igpt_fast.pictures import to_png_bytes
from igpt_fast.pixels import FIT_LIMIT, as_source, drawn_from
from igpt_fast.tokens import is_token_directory


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("palette")(expanded(palette))
    app.command("tokenize")(expanded(tokenize))


def palette(
    data: DataArgument,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.npy", help="Where to write the palette.")] = Path(
        "palette.npy"
    ),
    colors: Annotated[int, typer.Option("--colors", metavar="K", help="Colours, from 2 to 4096.")] = 512,
    size: SizeOption = "32",
    read_as: Annotated[Given, reading()],
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="N", help="Look at no more than N images, drawn by --seed; 0: all.")
    ] = FIT_LIMIT,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the colours that images are made of (k-means), and write them as a palette.

    Writes FILE.npy and, to look at, FILE.png with its colours as squares.

    Example: igpt-fast palette photos/ --colors 512 --size 32 -o palette.npy
    """
    began = time.monotonic()
    _check_palette_file(out, data)
    grid, source = parse_size(size), as_source(data)
    say(f"{data}: {_count(source)}")
    with progress(min(len(source), limit or len(source)), "images", "palette") as bar:
        shown = {"progress": bar.to, "fitting": partial(show_steps, bar)}
        drawn = {"limit": limit or None, "seed": seed}
        fitted, images, skipped = fit_palette(source, colors, grid, workers=workers, **drawn, **shown, **read_as)
    fitted.save(out)
    picture = _picture_of(out)
    write_atomically(picture, to_png_bytes(fitted.picture()))
    seconds = time.monotonic() - began
    _say_all(report_left_out(source.ignored, skipped))
    say(f"{len(fitted)} colours from {images} images of {grid[0]}x{grid[1]} in {seconds:.1f} s")
    say(f"inertia {fitted.inertia:.6f}: the mean squared distance of a pixel to its colour, where black to white is 12")
    say(f"wrote {out} and {picture}")
    if as_json:
        print_json(
            palette=str(out),
            picture=str(picture),
            colors=len(fitted),
            inertia=fitted.inertia,
            images=images,
            skipped=[{"name": name, "error": error} for name, error in skipped],
            ignored=source.ignored,
            seconds=round(seconds, 3),
        )


def tokenize(
    data: DataArgument,
    *,
    palette_path: Annotated[
        Path, typer.Option("--palette", metavar="FILE", help="From igpt-fast palette, OpenAI or Hugging Face.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The directory to write.")],
    size: SizeOption = "32",
    read_as: Annotated[Given, reading()],
    views: Annotated[
        int,
        typer.Option(
            "--views",
            min=0,
            max=MOST_VIEWS,
            metavar="K",
            show_default="the centre crop",
            help="K random crops of each image instead, at random sizes, as ImageNet was trained on.",
        ),
    ] = 0,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the tokens that DIR holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn images into tokens once, so that training reads them at full speed.

    Writes a directory of memory-mapped shards, which train and probe take in place of images.

    Example: igpt-fast tokenize photos/ --palette palette.npy --size 32 -o tokens/
    """
    began = time.monotonic()
    grid, colours, source = parse_size(size), Palette.load(palette_path), as_source(data)
    say(f"{data}: {_count(source)}")
    source = drawn_from(source, limit, seed)
    options = {"workers": workers, "overwrite": overwrite, "views": views}
    with progress(len(source), "images", "tokenising") as bar:
        tokens = tokenize_images(source, colours, out, grid, **options, progress=bar.to, **read_as)
    seconds = time.monotonic() - began
    _say_all(report_left_out(source.ignored, [(entry["name"], entry["error"]) for entry in tokens.meta["skipped"]]))
    size_on_disk = sum(file.stat().st_size for file in out.iterdir())
    held_out = len(tokens.split("val"))
    many = f"{len(tokens)} random crops of {len(tokens) // views} images" if views else f"{len(tokens)} images"
    say(f"{many} as {grid[0]}x{grid[1]} tokens of {tokens.colors} colours in {seconds:.1f} s")
    by = "names" if tokens.groups is None else "groups"
    say(f"by their {by}, {held_out} are for validation and {len(tokens) - held_out} for training")
    say(f"wrote {out}/ ({size_on_disk / 1e6:.1f} MB)")
    if as_json:
        print_json(
            tokens=str(out),
            images=len(tokens),
            views=views,
            size=list(tokens.size),
            colors=tokens.colors,
            classes=tokens.meta["class_counts"],
            train=len(tokens) - held_out,
            val=held_out,
            bytes=size_on_disk,
            skipped=tokens.meta["skipped"],
            ignored=source.ignored,
            seconds=round(seconds, 3),
        )


def _count(source: object) -> str:
    if not source.classes:
        return f"{counted(len(source), 'image')}, without class labels"
    number = "1 class" if len(source.classes) == 1 else f"{len(source.classes)} classes"
    return f"{counted(len(source), 'image')} in {number}: {few_of(source.classes)}"


def _say_all(lines: list[str]) -> None:
    for line in lines:
        say(line)


def _picture_of(out: Path) -> Path:
    return out.with_suffix(".png")


def _check_palette_file(out: Path, data: Path) -> None:
    """Finds out before the work that `out` and its picture can be written, over nothing but an older palette.

    Raises InputError.
    """
    if out.suffix != ".npy" or out.is_dir():
        raise InputError(f"{out}: a palette is written as a file ending in .npy; give such a name to --out")
    if is_token_directory(out.parent) or (out.parent / STATE).is_file():
        raise InputError(f"{out}: lies among tokens or in a checkpoint, which have their own; give another --out")
    picture = _picture_of(out)
    for path in (out, picture):
        refuse_replacing(path, data)
    if out.exists():
        try:
            Palette.load(out)
        except InputError as error:
            raise InputError(f"{out}: is there and holds no palette; give another --out") from error
    if picture.is_dir() or (picture.exists() and not out.exists()):
        raise InputError(f"{picture}: is there, and the palette's picture would take its place; give another --out")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        probe.touch()
        os.unlink(probe)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another place to --out") from error
