"""`igpt-fast eval`: how likely a model finds images."""

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from igpt_fast.atomic import write_atomically
from igpt_fast.checkpoint import Checkpoint
from igpt_fast.cli.inputs import (
    LimitOption,
    ModelArgument,
    PrecisionOption,
    ReadAs,
    SideBySideOption,
    called,
    check_place,
    described,
    open_to_measure,
    run_of,
    tokens_for,
)
from igpt_fast.cli.options import DataArgument, DeviceOption, JsonOption, Precision, SeedOption, expanded, print_json
from igpt_fast.cli.seen import say_seen, seen_among
from igpt_fast.console import answer, counted, say
from igpt_fast.errors import InputError
from igpt_fast.evaluate import Likelihood
from igpt_fast.evaluate import evaluate as evaluate_model
from igpt_fast.pixels import at_most
from igpt_fast.processes import together
from igpt_fast.run import learns_classes, read_options


class Split(str, Enum):
    """Which of the images."""

    all = "all"
    val = "val"
    train = "train"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("eval")(expanded(evaluate))


def evaluate(
    model: ModelArgument,
    data: DataArgument,
    *,
    split: Annotated[
        Split, typer.Option("--split", help="val: the images that training with this --val-fraction held out.")
    ] = Split.all,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            "--val-fraction",
            metavar="F",
            show_default="as a run of train held out, else 0.1",
            help="Share of the images, by their names, that is val.",
        ),
    ] = None,
    limit: LimitOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE.csv", help="Also write a line an image: its nats and bits per pixel."
        ),
    ] = None,
    read_as: ReadAs,
    batch: SideBySideOption = None,
    precision: PrecisionOption = Precision.fp32,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score whole images: the negative log-likelihood of every pixel, in nats and in bits per pixel.

    The mean over the images, with its 95 % interval. All pixels count, the first one too. DATA may also be tokens.

    Example: igpt-fast eval openai/imagegpt-small photos/ --json
    """
    if val_fraction is not None and not 0 <= val_fraction <= 1:  # also catches NaN
        raise InputError(f"--val-fraction is {val_fraction}; use a fraction from 0 to 1")
    if out is not None:
        check_place(out, ".csv", data)
    with ExitStack() as stack:
        processes = stack.enter_context(together(device))
        with processes.first_goes_ahead():
            checkpoint = open_to_measure(model, [data], processes)
            dataset = stack.enter_context(tokens_for(checkpoint, data, read_as))
        val_fraction = _held_out_by(checkpoint) if val_fraction is None else val_fraction
        indices = at_most(limit, dataset.split(split.value, val_fraction), seed)
        result = evaluate_model(checkpoint.model, dataset, indices, batch, precision is Precision.bf16, processes)
        if not processes.first:
            return
        seen, way = seen_among(checkpoint, dataset, indices), False
        if seen and split is not Split.val:
            unseen = dataset.split("val", val_fraction)
            way = len(unseen) > 0 and seen_among(checkpoint, dataset, unseen) == 0
        if out is not None:
            write_atomically(out, result.to_csv([dataset.names[index] for index in indices]))
    images = f"{counted(len(indices), 'image')} of {called(data)}"
    for line in (f"{described(checkpoint)}, on {images}:", *summary(result)):
        answer(line, as_json)
    without = "; --split val leaves them out" if way else ""
    if seen and split is Split.val:
        without = ": what decides the split, names and fraction, is not as in training, or they are there twice"
    say_seen(checkpoint, seen, f"the model had learned from {seen or 0:,} of these images{without}")
    if out is not None:
        say(f"wrote {out}")
    if as_json:
        facts = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "seen": seen, "out": out and str(out)}
        facts |= {"split": split.value, "val_fraction": None if split is Split.all else val_fraction}
        print_json(**facts, **result.to_dict())


def _held_out_by(checkpoint: Checkpoint) -> float:
    """The share of the images that the model's run held out; 0.1 where none is known."""
    run = run_of(checkpoint)
    saved = None if run is None else read_options(run)
    return 0.1 if saved is None or learns_classes(saved) else saved["options"]["val_fraction"]


def summary(result: Likelihood) -> list[str]:
    """The result as lines for a person."""
    values = result.to_dict()

    def line(unit: str) -> str:
        low, high = values[f"{unit}_low"], values[f"{unit}_high"]
        reach = "no interval of one image or group" if low is None else f"95 % interval {low:.4f} – {high:.4f}"
        return f"  {values[f'{unit}_per_pixel']:.4f} {unit} per pixel ({reach})"

    return [line("nats"), line("bits"), f"  chance, ln {result.colors}: {values['nats_chance']:.4f} nats"]
