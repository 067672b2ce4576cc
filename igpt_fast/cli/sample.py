"""`igpt-fast sample` and `igpt-fast complete`: pictures out of a trained model."""

import time
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from igpt_fast.atomic import write_atomically
from igpt_fast.checkpoint import Checkpoint
from igpt_fast.cli.inputs import (
    AS_RUN,
    PREPROCESSING,
    ModelArgument,
    check_folder,
    check_place,
    described,
    preprocessing_of,
    refuse_replacing,
)
from igpt_fast.cli.options import DeviceOption, Given, JsonOption, SeedOption, expanded, print_json, reading
from igpt_fast.console import progress, say
from igpt_fast.decode import tell_lost
from igpt_fast.device import pick_device
from igpt_fast.errors import InputError
from igpt_fast.image_files import read_image
from igpt_fast.images import Preprocessing, resize_image
from igpt_fast.palette import Palette
from igpt_fast.pictures import save_grid, to_png_bytes
from igpt_fast.sample import Drawn, check_options, drawing_dtype, kept_pixels
from igpt_fast.sample import complete as complete_tokens
from igpt_fast.sample import sample as sample_tokens
from igpt_fast.weights import open_model

GRAY = 128  # what stands for the pixels that the model does not see


class DType(str, Enum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", metavar="T", help="1: as trained. Below 1: safer, 0: the likeliest colour only."),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", metavar="K", show_default="all", help="Draw from the K likeliest colours of each pixel."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="P", show_default="all", help="Draw from the likeliest colours that make up P in all."
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="B",
        show_default="by memory",
        help="Images drawn side by side. The result is the same for any.",
    ),
]
DTypeOption = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        show_default="bfloat16 on a GPU, float32 on a CPU",
        help="bfloat16 takes half the memory and less time; its images are others. A GPU has kernels for it alone.",
    ),
]
SingleOption = Annotated[
    Path | None,
    typer.Option(
        "--single",
        metavar="DIR",
        show_default="none",
        help="Also write every image as a PNG of its own here, each batch when it is finished, before the grid.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("sample")(sample)
    app.command("complete")(expanded(complete))


def sample(
    model: ModelArgument,
    n: Annotated[int, typer.Option("-n", metavar="N", help="Images to draw.")] = 16,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    first: Annotated[
        int,
        typer.Option(
            "--first",
            metavar="I",
            help="Number of the first image: to go on behind others, or share many out.",
        ),
    ] = 0,
    batch: BatchOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.png", help="The grid of all images.")] = Path(
        "samples.png"
    ),
    single: SingleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw new images from a trained model.

    Image i depends on the seed and i alone, so a larger -n or another --batch only adds images, and machines that each
    take -n and --first draw what one would.

    Example: igpt-fast sample run/ -n 16 --seed 1 -o samples.png
    """
    began = time.monotonic()
    options = {"n": n, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "batch": batch}
    options["first"] = first
    check_options(**options)
    _refuse_idle(temperature, top_k, top_p)
    _check_places(out, single)
    checkpoint, palette = _load(model, dtype, device)
    files = _singles(single, [f"sample-{index:06d}" for index in range(first, first + n)], out)
    with progress(n * checkpoint.model.config.tokens, "pixels", "sampling") as bar:
        written: list[Path] = []
        try:
            drawn = _saver(palette, files, written)
            tokens = sample_tokens(checkpoint.model, **options, progress=bar.to, drawn=drawn)
        except (KeyboardInterrupt, SystemExit):
            if 0 < (there := len(written)) < n:
                rest = f"--first {first + there} -n {n - there}"
                say(f"{there:,} of {n:,} images are in {single}; {rest} gives the others")
            raise
    save_grid(out, _decode(palette, tokens))
    _report(checkpoint, out, files, began, as_json, images=n, seed=seed, first=first)


def complete(
    model: ModelArgument,
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Image files.", show_default=False)],
    *,
    keep: Annotated[
        float, typer.Option("--keep", metavar="F", help="The fraction, from the top, that is kept: 0 to 1.")
    ] = 0.5,
    n: Annotated[int, typer.Option("-n", metavar="N", help="Completions of each photo.")] = 8,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = 0,
    batch: BatchOption = None,
    read_as: Annotated[Given, reading(AS_RUN, on_error=False)],
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.png", help="The grid: a row for each photo.")
    ] = Path("completions.png"),
    single: SingleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep the top of your own images and let the model draw the rest, several times.

    A row of the grid is: the photo at the model's size, what the model was shown (the rest gray), then the completions.

    Example: igpt-fast complete run/ photo.png --keep 0.5 -n 8 -o completions.png
    """
    began = time.monotonic()
    options = {"n": n, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "batch": batch}
    check_options(**options, keep=keep)
    _refuse_idle(temperature, top_k, top_p)
    Preprocessing(**read_as)
    _check_places(out, single, *photos)
    for photo in photos:
        if not photo.is_file():
            what = f"{photo} is a folder" if photo.is_dir() else f"there is no file {photo}"
            raise InputError(f"{what}; give image files to complete")
    checkpoint, palette = _load(model, dtype, device)
    config, where = checkpoint.model.config, checkpoint.model.wte.device
    how = Preprocessing(config.size, **{**PREPROCESSING, **preprocessing_of(checkpoint), **read_as})
    originals, notes = [], Counter()
    for photo in photos:
        image = read_image(photo.read_bytes(), str(photo), how.background, how.value_range, how.bands)
        notes.update(image.info)
        originals.append(resize_image(image, config.size, how.resize, str(photo)))
    originals = np.stack(originals)
    tell_lost("the photos", notes)
    tokens = torch.from_numpy(palette.encode(originals)).to(where)
    count = kept_pixels(config, keep)
    names = [f"{index:03d}-{photo.stem[:50]}-{j:03d}" for index, photo in enumerate(photos) for j in range(n)]
    for file in (files := _singles(single, names, out)):
        refuse_replacing(file, *photos)
    with progress(len(photos) * n * (config.tokens - count), "pixels", "completing") as bar:
        drawn = _saver(palette, files, [])
        completed = complete_tokens(checkpoint.model, tokens, keep, **options, progress=bar.to, drawn=drawn)
    images = _decode(palette, completed)
    shown = _decode(palette, tokens)
    shown.reshape(len(photos), -1, 3)[:, count:] = GRAY
    rows = np.concatenate([originals[:, None], shown[:, None], images], axis=1)
    save_grid(out, rows.reshape(-1, *rows.shape[2:]), columns=n + 2)
    _report(checkpoint, out, files, began, as_json, images=len(names), seed=seed, keep=keep, kept_pixels=count)


def _load(model: Path, dtype: DType | None, device: str) -> tuple[Checkpoint, Palette]:
    checkpoint = open_model(model, where := pick_device(device))
    if checkpoint.palette is None:
        raise InputError(
            f"{checkpoint.path} has no palette, so its tokens have no colours; igpt-fast convert --palette stores one"
        )
    checkpoint.model.to(drawing_dtype(where) if dtype is None else getattr(torch, dtype.value))
    return checkpoint, checkpoint.palette


def _decode(palette: Palette, tokens: Tensor) -> np.ndarray:
    return palette.decode(tokens.cpu()).numpy()


def _refuse_idle(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """InputError for an option that would change nothing."""
    if temperature == 0 and (top_k is not None or top_p is not None):
        flag = "--top-p" if top_k is None else "--top-k"
        raise InputError(f"{flag} changes nothing with --temperature 0, the likeliest colour; leave one of them out")


def _check_places(out: Path, single: Path | None, *photos: Path) -> None:
    check_place(out, ".png", *photos)
    if single is not None:
        check_folder(single)


def _singles(folder: Path | None, names: list[str], grid: Path) -> list[Path]:
    """The files of single images; none without a folder. InputError where the grid is to be one of them."""
    files = [] if folder is None else [folder / f"{name}.png" for name in names]
    if files and grid.name in {file.name for file in files} and grid.resolve().parent == folder.resolve():
        raise InputError(f"{grid}: one of the single images is to be there; give another name to --out")
    return files


def _saver(palette: Palette, files: list[Path], written: list[Path]) -> Drawn:
    """What writes finished images into their files, one pixel a pixel, so that only a batch is lost with a machine. It
    adds them to `written`.
    """

    def save(before: int, tokens: Tensor) -> None:
        for path, image in zip(files[before:], _decode(palette, tokens) if files else (), strict=False):
            write_atomically(path, to_png_bytes(image))
            written.append(path)

    return save


def _report(checkpoint: Checkpoint, out: Path, files: list[Path], began: float, as_json: bool, **facts: object) -> None:
    beside = f" and {len(files)} single files" if files else ""
    say(f"wrote {out}{beside}, from {described(checkpoint)}")
    if as_json:
        fields = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, **facts}
        print_json(
            grid=str(out), single=[str(file) for file in files], seconds=round(time.monotonic() - began, 3), **fields
        )
