"""`igpt-fast features`: what a model makes of images, for other programs."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from igpt_fast.atomic import open_atomically
from igpt_fast.classes import group_names
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
    tokens_for,
)
from igpt_fast.cli.options import DataArgument, DeviceOption, JsonOption, Precision, SeedOption, expanded, print_json
from igpt_fast.cli.probe import parse_layers
from igpt_fast.console import counted, say
from igpt_fast.joined import refuse_misfit
from igpt_fast.pixels import at_most
from igpt_fast.probe import check_options, extract_features
from igpt_fast.processes import together
from igpt_fast.tokens import TokenDataset

MIDDLE = "middle"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("features")(expanded(features))


def features(
    model: ModelArgument,
    data: DataArgument,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.npz", help="Where to write them.")] = Path(
        "features.npz"
    ),
    layers: Annotated[
        str,
        typer.Option(
            "--layers", metavar="L", help="middle, where the paper found the best ones, all, or some as 3,5 or 2-6."
        ),
    ] = MIDDLE,
    read_as: ReadAs,
    limit: LimitOption = None,
    batch: SideBySideOption = None,
    precision: PrecisionOption = Precision.fp32,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write the features of images, as probe reads them, for scikit-learn, R or a plot.

    FILE.npz holds features, float32 of images x layers x width, the means over an image's pixels; layers; names; and
    where DATA has them labels (-1: none), the classes that they number, and groups. probe tells which layer is good.

    Example: igpt-fast features openai/imagegpt-small scans/ --layers 12 -o features.npz
    """
    check_place(out, ".npz", data)
    with ExitStack() as stack:
        checkpoint = open_to_measure(model, [data], stack.enter_context(together(device)))
        depth = checkpoint.model.config.layers
        chosen = check_options(depth, [depth // 2] if layers == MIDDLE else parse_layers(layers, depth))
        dataset = stack.enter_context(tokens_for(checkpoint, data, read_as))
        refuse_misfit(dataset, checkpoint.model.config, checkpoint.model.palette)
        indices = at_most(limit, np.arange(len(dataset)), seed)
        pooled = extract_features(checkpoint.model, dataset, indices, chosen, batch, amp=precision is Precision.bf16)
        with open_atomically(out) as file:
            np.savez(file, features=pooled.swapaxes(0, 1), layers=np.array(chosen), **_beside(dataset, indices))
    images = f"{counted(len(indices), 'image')} of {called(data)}"
    say(f"{described(checkpoint)}, on {images}: {counted(len(chosen), 'layer')}")
    say(f"wrote {out}")
    if as_json:
        facts = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "out": str(out)}
        print_json(**facts, images=len(indices), layers=chosen, width=checkpoint.model.config.width)


def _beside(dataset: TokenDataset, indices: np.ndarray) -> dict[str, Any]:
    """What is known of the images `indices`, as arrays of an .npz."""
    found: dict[str, Any] = {"names": np.array([dataset.names[index] for index in indices])}
    if dataset.classes is not None:
        found |= {"labels": dataset.labels[indices], "classes": np.array(dataset.classes)}
    if dataset.groups is not None:
        found["groups"] = np.array(group_names(dataset.groups[index] for index in indices))
    return found
