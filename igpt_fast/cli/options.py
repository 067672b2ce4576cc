"""Options that several commands share, so that they are spelled, explained and read in one way."""

import json
import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from igpt_fast.errors import InputError
from igpt_fast.options import PRECISIONS

DATA_HELP = (
    "Images: a folder (class folders or a metadata.csv give labels), a .zip, .tar or .tar.gz, a .npy or .npz array, or "
    "one image file."
)


class Resize(str, Enum):
    """How an image comes to its size: see igpt_fast.images.resize_image."""

    paper = "paper"
    hf = "hf"
    none = "none"


class OnError(str, Enum):
    """What a file that cannot be read does."""

    error = "raise"
    skip = "skip"


Precision = Enum("Precision", {name: name for name in PRECISIONS}, type=str)

DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help=DATA_HELP, show_default=False)]
SizeOption = Annotated[str, typer.Option("--size", metavar="PX", help="Pixels a side: 32, or height x width as 32x48.")]
ResizeOption = Annotated[
    Resize,
    typer.Option(
        "--resize",
        help="paper: short side 224, centre crop, then down. hf: straight to the size. none: images have the size.",
    ),
]
BackgroundOption = Annotated[
    str, typer.Option("--background", metavar="COLOUR", help="Behind transparent pixels: a name or #rrggbb.")
]
VALUE_RANGE = "The values that become black and white in images of more than 8 bits: 0,4095 for most scans."
BANDS = "Which bands become red, green and blue, as 4,3,2, or one for gray; the first is 1."
ValueRangeOption = Annotated[
    str | None,
    typer.Option("--value-range", metavar="LOW,HIGH", show_default="all that the type holds", help=VALUE_RANGE),
]
BandsOption = Annotated[str | None, typer.Option("--bands", metavar="B,B,B", show_default="all of 1 or 3", help=BANDS)]
OnErrorOption = Annotated[
    OnError,
    typer.Option("--on-error", help="A file that cannot be read ends the command (raise) or is left out (skip)."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        show_default="one a core, none for few images",
        help="Processes that decode images; 0 decodes in this one. The result is the same.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


def parse_size(text: str) -> tuple[int, int]:
    """Reads `32` or `32x48` as (height, width) in pixels. Raises InputError on anything else."""
    match = re.fullmatch(r"\s*(\d{1,5})(?:\s*[x×,]\s*(\d{1,5}))?\s*", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if height < 1 or width < 1:
        raise InputError(
            f"--size {text!r} is not a size; give pixels a side as 32, or height x width as 32x48, up to 99999"
        )
    return height, width


def print_json(**fields: object) -> None:
    """Prints one JSON object on stdout, for programs."""
    print(json.dumps(fields))
