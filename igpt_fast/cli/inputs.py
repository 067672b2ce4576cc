"""What several commands read: a model from wherever it lies, and images or tokens as that model reads them."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from igpt_fast.checkpoint import Checkpoint
from igpt_fast.classes import is_table
from igpt_fast.cli.options import Given, Precision, reading
from igpt_fast.console import say
from igpt_fast.data import Source, open_tokens
from igpt_fast.errors import InputError
from igpt_fast.image_files import SUFFIXES
from igpt_fast.images import Preprocessing
from igpt_fast.made import CHECKPOINTS, OPTIONS
from igpt_fast.pixels import as_source
from igpt_fast.processes import Processes
from igpt_fast.run import read_options
from igpt_fast.tokens import TokenDataset, is_token_directory
from igpt_fast.weights import open_model

# How images are read, as a run's train.json has it, and unless it or the options say otherwise.
PREPROCESSING = {field.name: field.default for field in fields(Preprocessing) if field.name not in ("size", "views")}

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="The --out of a training run, one of its checkpoints, a directory of weights in Hugging Face's layout, "
        "a name on their hub, or the prefix of an OpenAI checkpoint.",
        show_default=False,
    ),
]
LabelledArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Images with labels (class folders or a metadata.csv, also in a .zip or .tar, or an .npz), or tokens of "
        "them.",
        show_default=False,
    ),
]
TestOption = Annotated[
    Path | None,
    typer.Option(
        "--test",
        metavar="DATA",
        show_default="a share of DATA",
        help="Other images or tokens, with the same classes, to test on; all of DATA is then learned from.",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, metavar="N", show_default="all", help="At most N images, drawn by --seed."),
]
SideBySideOption = Annotated[
    int | None, typer.Option("--batch", min=1, metavar="B", show_default="by memory", help="Images side by side.")
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="Of the arithmetic; bf16 (autocast) is faster, a little less exact.")
]
AS_RUN = "as the run read its own, else "
ReadAs = Annotated[Given, reading(AS_RUN)]


def check_place(out: Path, ending: str, *inputs: Path) -> None:
    """Finds out before the work that a file can be written, over none of the `inputs`. Raises InputError."""
    if out.suffix.lower() != ending or out.is_dir():
        raise InputError(f"{out}: is written as a {ending} file; give a name ending in {ending}")
    check_folder(out.parent)
    refuse_replacing(out, *inputs)


def refuse_replacing(out: Path, *inputs: Path) -> None:
    """InputError where `out` is one of the images, arrays or tables of labels that a command reads."""
    table = is_table(out.name)
    if table or (out.exists() and out.suffix.lower() in {*SUFFIXES, ".npy", ".npz"}):
        for path in inputs:
            if path.resolve() in (out.resolve(), *out.resolve().parents):
                what = "would be taken for their labels" if table else "would be replaced"
                raise InputError(f"{out}: is among the images, and {what}; give another name")
    if table and out.exists():  # of other images, which may be those that given tokens were made of
        raise InputError(f"{out}: says which classes images have, and would be replaced; give another name")


def check_folder(folder: Path) -> None:
    """The same of a folder to write into, which need not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to ({there} is no writable folder); choose another place")


def called(data: Path) -> str:
    """The images' name for a person, also where they are `.`."""
    return data.name or str(data.resolve())


def open_to_measure(model: Path, data: list[Path], processes: Processes) -> Checkpoint:
    """open_model, float16 weights widened to float32: activations of a sound model can overflow float16.

    data: what is to be measured, which several processes share as tokens only. Raises InputError.
    """
    images = [path for path in data if not is_token_directory(path)]
    if images and processes.count > 1:
        raise InputError(f"{images[0]}: several processes share tokens; make them once with igpt-fast tokenize")
    checkpoint = open_model(model, processes.device)
    if checkpoint.model.wte.dtype is torch.float16:
        checkpoint.model.float()
    return checkpoint


def described(checkpoint: Checkpoint) -> str:
    """`step 500 of run/checkpoints/step-00000500`, or where published weights lie."""
    return str(checkpoint.path) if checkpoint.step is None else f"step {checkpoint.step} of {checkpoint.path}"


@contextmanager
def tokens_for(
    checkpoint: Checkpoint, data: Path, given: Mapping[str, Any], beside: TokenDataset | None = None
) -> Iterator[TokenDataset]:
    """DATA as tokens for the checkpoint's model: as they are, the run's own, or made for the time of the command.

    given: of PREPROCESSING, what the options say. beside: tokens of other images, whose preprocessing
    is theirs too.
    """
    size, palette = checkpoint.model.config.size, checkpoint.palette
    if beside is None:
        refuse_preprocessing([data], given, PREPROCESSING)
    if is_token_directory(data):
        tokens = open_tokens(data, palette, size=size)
        say_read_otherwise(data, tokens, preprocessing_of(checkpoint))
        yield tokens
        return
    if palette is None:
        raise InputError(f"{checkpoint.path} has no palette to read images with; give DATA as tokens of its palette")
    noted = beside.preprocessing if beside is not None else {}
    source, run, options = as_source(data), run_of(checkpoint), {**preprocessing_of(checkpoint), **noted, **given}
    if not given and not noted and run is not None and _made_from(own := run / "tokens", source):
        yield open_tokens(source, palette, own, size=size, **options)
        return
    with tempfile.TemporaryDirectory(prefix="igpt-fast-") as folder:
        yield open_tokens(source, palette, Path(folder) / "tokens", size=size, **options, kept=False)


def say_read_otherwise(data: Path, tokens: TokenDataset, known: Mapping[str, Any]) -> None:
    """Says what tokens were made with that is not `known` of the images that their model learned from."""
    for flag, other in tokens.read_otherwise(known):
        say(f"{data} was made with {flag}, but the model learned from images with {other}")


def refuse_preprocessing(data: list[Path], given: Mapping[str, object], names: Iterable[str]) -> None:
    """InputError for those of `names` among the options given, which say how to read images, where all is tokens."""
    idle = [f"--{name.replace('_', '-')}" for name in names if name in given]
    if idle and all(map(is_token_directory, data)):
        words = " and ".join(idle)
        raise InputError(f"{data[0]}: holds tokens, which are read already; leave out {words}, or give the images")


def preprocessing_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the images that the model learned from were read, of PREPROCESSING, as far as it is known."""
    run = run_of(checkpoint)
    preprocessing = {} if run is None else read_options(run)["command"].get("images", {})
    preprocessing = {**preprocessing, **checkpoint.model.preprocessing}
    return {name: preprocessing[name] for name in PREPROCESSING if name in preprocessing}


def _made_from(tokens: Path, source: Source) -> bool:
    with suppress(InputError):  # broken ones are of no use, and no reason to end
        return is_token_directory(tokens) and TokenDataset(tokens).made_of(source.stamp)
    return False


def run_of(checkpoint: Checkpoint) -> Path | None:
    """The run that a checkpoint belongs to, when it is one and lies there, by whatever link it was given."""
    for path in (checkpoint.path, checkpoint.path.absolute(), checkpoint.path.resolve()):
        run = path.parent.parent
        if checkpoint.step is not None and path.parent.name == CHECKPOINTS and (run / OPTIONS).is_file():
            return run
    return None
