"""`igpt-fast convert`: weights from one layout into another."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from igpt_fast.atomic import move_into_place, refuse_others, work_directory
from igpt_fast.checkpoint import save_checkpoint
from igpt_fast.cli.inputs import ModelArgument, preprocessing_of
from igpt_fast.cli.options import JsonOption, parse_size, print_json
from igpt_fast.console import number, say
from igpt_fast.errors import InputError
from igpt_fast.images import NOTED
from igpt_fast.made import CHECKPOINTS
from igpt_fast.model import ImageGPT
from igpt_fast.palette import Palette
from igpt_fast.weights import open_model


class Layout(str, Enum):
    """How weights lie on disk."""

    hf = "hf"
    run = "run"


class DType(str, Enum):
    """What weights are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("convert")(convert)


def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.", show_default=False)],
    to: Annotated[
        Layout,
        typer.Option(
            "--to",
            help="hf: Hugging Face's layout, which transformers and every command here read. run: a checkpoint "
            "as training writes it, under OUT/checkpoints/.",
        ),
    ] = Layout.hf,
    palette: Annotated[
        Path | None,
        typer.Option(
            "--palette", metavar="FILE", show_default="the model's own", help="The colours to store beside the weights."
        ),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option("--dtype", show_default="as they are", help="What to store the weights in.")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", min=1, metavar="H", show_default="by the shapes", help="Of a checkpoint of old code."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="PX",
            show_default="its own",
            help="Height x width as 32x48: of its positions, or what they are resampled to.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights that OUT holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn weights into a directory that Hugging Face's transformers loads, or into a checkpoint of ours.

    Reads OpenAI's TensorFlow checkpoints (with google-crc32c installed, not TensorFlow), Hugging Face's layout, and
    training runs. A kmeans_centers.npy beside a TensorFlow checkpoint goes along.

    Example: igpt-fast convert model.ckpt-1000000 imagegpt-s/ --palette kmeans_centers.npy
    """
    checkpoint = open_model(model, size=None if size is None else parse_size(size), heads=heads)
    colours = checkpoint.palette if palette is None else Palette.load(palette)
    found, config = checkpoint.model, checkpoint.model.config
    if colours is not None and len(colours) != config.colors:
        raise InputError(f"the palette has {len(colours)} colours, the model {config.colors}; give the one it has")
    if dtype is not None:
        found = _cast(found, getattr(torch, dtype.value))
    if preprocessing := preprocessing_of(checkpoint):
        found.preprocessing = {name: preprocessing[name] for name in NOTED if name in preprocessing}
    if to is Layout.hf:
        found.save_pretrained(out, colours, overwrite)
    else:
        _save_run(out, overwrite, _step(checkpoint.step, model), found, colours)
    say(f"{config.objective} model of {number(found.num_parameters())} parameters: {config.shape_text}")
    if colours is None:
        say("without a palette: tokens can be read and drawn, images cannot (--palette stores one)")
    if to is Layout.hf and config.objective == "bert":
        say("transformers has no BERT mode of ImageGPT and refuses these weights; all commands here read them")
    say(f"wrote {out}/")
    if as_json:
        print_json(
            out=str(out),
            layout=to.value,
            bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
            palette=colours is not None,
            parameters=found.num_parameters(),
            dtype=str(found.wte.dtype).removeprefix("torch."),
            config=config.to_dict(),
        )


def _save_run(out: Path, overwrite: bool, step: int, model: ImageGPT, palette: Palette | None) -> None:
    """Writes a checkpoint, and no training, as all that `out` holds. InputError where something else would be lost."""
    if os.path.lexists(out):
        if not out.is_dir():
            raise InputError(f"{out} is there and is no directory; choose another place")
        out = out.resolve()
        if not any(out.iterdir()):
            save_checkpoint(out, step, model, palette)
            return
        refuse_others(out, CHECKPOINTS)  # a run that was trained holds more
        if not overwrite:
            raise InputError(f"{out} holds weights already; choose another place, or replace them with --overwrite")
    with work_directory(out) as work:
        try:
            save_checkpoint(work, step, model, palette)
        except InputError as error:  # which names a folder that is gone when it is read
            raise InputError(str(error).replace(str(work), str(out))) from error
        move_into_place(work, out)


def _cast(model: ImageGPT, dtype: torch.dtype) -> ImageGPT:
    """The model in `dtype`. Raises InputError that names a weight of which a finite number would be infinite there."""
    for name, weight in model.named_parameters():
        if (weight.isfinite() & ~weight.to(dtype).isfinite()).any():
            most = f"{torch.finfo(dtype).max:.4g}"
            raise InputError(f"{name} has numbers beyond {most}, the most of {dtype}; use --dtype bfloat16 or float32")
    return model.to(dtype)


def _step(step: int | None, source: Path) -> int:
    """The step to save under: the run's, else that of a name such as model.ckpt-1000000, else 0."""
    digits = os.path.basename(str(source)).removesuffix(".index").rpartition("-")[2]
    return step if step is not None else int(digits) if digits.isascii() and digits.isdigit() else 0
