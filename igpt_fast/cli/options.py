"""Options that several commands share, so that they are spelled, explained and read in one way."""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_fast.console import write
from igpt_fast.errors import InputError
from igpt_fast.options import PRECISIONS

Given = dict[str, Any]  # options that were given, as plain values

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


@dataclass(frozen=True)
class Group:
    """Options that stand together: a command's parameter `Annotated[Given, Group(...)]` is all of them, see expanded.

    options: the annotation of each, which is None unless it is given.
    """

    options: Mapping[str, Any]


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it: the options of its groups in their place. It is given those that were given."""
    own = inspect.signature(command).parameters
    groups = {
        name: mark.options
        for name, parameter in own.items()
        for mark in getattr(parameter.annotation, "__metadata__", ())
        if isinstance(mark, Group)
    }
    shown = []
    for name, parameter in own.items():
        for each, kind in groups[name].items() if name in groups else [(name, parameter.annotation)]:
            default = None if name in groups else parameter.default
            shown.append(inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))

    def run(**values: Any) -> None:
        for name, options in groups.items():
            values[name] = given_of(**{each: values.pop(each) for each in options})
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(shown)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def reading(otherwise: str = "", panel: str | None = None, on_error: bool = True) -> Group:
    """The options of how images are read, fields of igpt_fast.images.Preprocessing.

    otherwise: what counts, where nothing is given, before the usual. on_error: whether what cannot be read may be.
    """

    def option(kind: Any, flag: str, usual: str, text: str, metavar: str | None = None) -> Any:
        shown = f"{otherwise}{usual}"
        given = typer.Option(flag, metavar=metavar, show_default=shown, help=text, rich_help_panel=panel)
        return Annotated[kind | None, given]

    ways = "paper: short side 224, centre crop, then down. hf: straight to the size. none: images have the size."
    behind = "Behind transparent pixels: a name or #rrggbb."
    ends = "The values that become black and white in images of more than 8 bits: 0,4095 for most scans."
    which = "Which bands become red, green and blue, as 4,3,2, or one for gray; the first is 1."
    broken = "A file that cannot be read ends the command (raise) or is left out (skip)."
    options = {
        "resize": option(Resize, "--resize", "paper", ways),
        "background": option(str, "--background", "white", behind, "COLOUR"),
        "value_range": option(str, "--value-range", "all that the type holds", ends, "LOW,HIGH"),
        "bands": option(str, "--bands", "all of 1 or 3", which, "B,B,B"),
    }
    return Group({**options, "on_error": option(OnError, "--on-error", "raise", broken)} if on_error else options)


def given_of(**options: Any) -> Given:
    """Those options that were given, as plain values, --value-range and --bands as lists. Raises InputError."""
    given = {name: getattr(value, "value", value) for name, value in options.items() if value not in (None, [])}
    for name, (kind, wanted) in _LISTS.items():
        if name in given:
            try:
                given[name] = [kind(part) for part in given[name].split(",")]
            except ValueError as error:
                raise InputError(f"--{name.replace('_', '-')} {given[name]!r} is not {wanted}") from error
    return given


def _number(text: str) -> int | float:
    return int(value) if (value := float(text)).is_integer() else value


_LISTS = {"value_range": (_number, "two numbers, as 0,4095"), "bands": (int, "bands, as 4,3,2 or 1")}


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
    write(json.dumps(fields))
