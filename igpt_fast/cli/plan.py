"""`igpt-fast plan`: what a training run would take on this machine, before it is begun."""

from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_fast.cli.inputs import described
from igpt_fast.cli.learning import (
    SHAPE,
    SMALL,
    RunDeviceOption,
    ShapeOptions,
    chosen,
    learning,
    option,
    read_pattern,
)
from igpt_fast.cli.options import Given, JsonOption, expanded, given_of, parse_size, print_json
from igpt_fast.config import PRESETS, Config
from igpt_fast.console import answer, counted, duration, number, say
from igpt_fast.errors import InputError
from igpt_fast.options import Options
from igpt_fast.plan import Plan
from igpt_fast.plan import plan as make_plan
from igpt_fast.weights import open_model, refuse_other_shape

STANDARD = Options()
USED = ("steps", "batch", "ema", "accumulate", "activation_checkpointing", "precision")  # for time, memory and disk


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("plan")(expanded(plan))


def plan(
    *,
    init: Annotated[
        Path | None,
        option(
            "The model",
            "--init",
            "The shape of this model, as train and finetune begin with it.",
            "none",
            metavar="MODEL",
        ),
    ] = None,
    shape_options: ShapeOptions,
    size: Annotated[
        str | None, option("The model", "--size", "Pixels a side: 32, or height x width as 32x48.", 32, metavar="PX")
    ] = None,
    colors: Annotated[int | None, option("The model", "--colors", "Colours of the palette.", 512)] = None,
    learning_options: Annotated[Given, learning(STANDARD, USED)],
    device: RunDeviceOption = "auto",
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.0, help="About how long to measure.")
    ] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Measure what train would take on this machine: time, memory, disk. Nothing is written.

    The options are those of train. A few passes are done on images of noise, of one image and of ever more side by
    side; a step and a run are reckoned from them.

    Example: igpt-fast plan --preset S --batch 32 --accumulate 4 --steps 100000
    """
    given = given_of(size=size, colors=colors) | shape_options | learning_options
    options = Options(**chosen(STANDARD, {}, given))
    shape: dict[str, Any] = SMALL
    if init is not None:
        for name in ("preset", "colors"):
            if name in given:
                raise InputError(f"--{name} changes nothing with --init: the model is that of {init}; leave it out")
        found = open_model(init)
        base = found.model.config
        shape = {**base.to_dict(), "classes": 0}
        say(f"shaped as {described(found)}")
        del found  # its memory is not the run's
    shape = {**shape, **PRESETS.get(given.get("preset"), {})}
    if size is not None:
        given["size"] = parse_size(size)
    given |= read_pattern(given)
    config = Config.from_dict({**shape, **{name: given[name] for name in (*SHAPE, "size", "colors") if name in given}})
    if init is not None:
        refuse_other_shape(base, config)
    result = make_plan(config, options, device, seconds)
    for line in report(config, options, result):
        answer(line, as_json)
    if as_json:
        print_json(config=config.to_dict(), **result.to_dict())


def report(config: Config, options: Options, plan: Plan) -> list[str]:
    """The plan as lines for a person."""
    p, c = plan, config
    rate = (
        f"{number(p.batch / p.step_seconds)} images/s, {p.flop_per_image * p.batch / p.step_seconds / 1e9:,.0f} GFLOP/s"
    )
    side = f"{counted(p.part, 'image')} side by side"
    guess = "" if p.measured == p.part else f", in proportion to {p.measured} that were measured"
    lines = [
        f"{c.objective} model of {p.parameters:,} parameters: {c.shape_text}",
        f"  step         {number(p.step_seconds)} s of {p.batch} images, {side}{guess}: {rate}",
        f"  run          {duration(p.seconds)} for {p.steps:,} steps, without validation and pictures",
        f"  memory       {_bytes(p.peak_bytes)}, of {_bytes(p.device_bytes)} there {_bytes(p.free_bytes)} are free",
        f"               an image side by side takes {_bytes(p.image_bytes)}: about {p.fits:,} fit",
        f"  checkpoint   {_bytes(p.checkpoint_bytes)} on disk, and {options.keep + 1} of them while one is saved",
    ]
    if p.cache_bytes:
        lines.append(f"  sampling     {_bytes(p.cache_bytes)} of keys and values an image, in bfloat16")
    if p.part > p.fits:
        lines.append("a step does not fit: more --accumulate, --activation-checkpointing or a smaller --batch helps")
    return lines


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
