"""The options of commands that learn, or plan to: one spelling and one explanation for all of them."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_fast.cli.options import Given, Group, Precision
from igpt_fast.config import OBJECTIVES, POSITIONS, PRESETS
from igpt_fast.options import Options

LEARNING, MACHINE, WATCHING = "Learning", "Speed and memory", "Validation, pictures and checkpoints"
IMAGES_PANEL = "The images, unless DATA holds tokens already"

# The fields of Options and of FinetuneOptions: panel, explanation, what is shown where None stands for something.
FIELDS = {
    "steps": (LEARNING, "Steps in all.", None),
    "batch": (LEARNING, "Images a step.", None),
    "lr": (LEARNING, "Peak learning rate.", "3e-3, less for batches below 128 or widths above 512"),
    "warmup": (LEARNING, "Steps of linear warm-up.", "a twentieth of the steps, at most 10,000"),
    "clip": (LEARNING, "Largest gradient norm; 0: any.", None),
    "ema": (LEARNING, "Decay of averaged weights, such as 0.999; 0: none.", None),
    "flip": (LEARNING, "Mirror images at random.", "no-flip"),
    "shift": (LEARNING, "Move images by up to so many pixels at random, their borders mirrored.", None),
    "seed": (LEARNING, "The same seed gives the same result.", None),
    "generative": (LEARNING, "Weight of the pixels' loss beside that of the classes; 0: classes alone.", None),
    "patience": (LEARNING, "End after so many validations without a better one; 0: take all steps.", None),
    "per_class": (LEARNING, "Learn from so many images of each class, those of validation included.", "all"),
    "accumulate": (MACHINE, "Split each step's images into so many parts.", None),
    "activation_checkpointing": (MACHINE, "Recompute activations: less memory, a third more time.", False),
    "precision": (MACHINE, "Of the arithmetic; weights are float32.", None),
    "val_fraction": (WATCHING, "Share of images held out, by name.", None),
    "val_every": (WATCHING, "Steps between validations; 0: at the end.", None),
    "val_images": (WATCHING, "Held-out images to look at; 0: all.", None),
    "sample_every": (WATCHING, "Steps between sample pictures; 0: none.", None),
    "save_every": (WATCHING, "Steps between checkpoints; 0: at the end.", None),
    "log_every": (WATCHING, "Steps between lines of metrics.jsonl.", None),
    "keep": (WATCHING, "Checkpoints to keep.", None),
    "test_fraction": (WATCHING, "Share of the images, by their names, that is tested on at the end.", None),
}
FLAGS = {"flip": "--flip/--no-flip"}

SMALL = {"layers": 4, "width": 128, "heads": 4}  # when nothing is said: two cores take about a second a step
# The options that are fields of Config, but for those that the data decide.
SHAPE = ("layers", "width", "heads", "objective", "pattern", "positions")

Preset = Enum("Preset", {name: name for name in PRESETS}, type=str)
Objective = Enum("Objective", {name: name for name in OBJECTIVES}, type=str)
Positions = Enum("Positions", {name: name for name in POSITIONS}, type=str)


def option(panel: str, flags: str, text: str, shown: object = False, **more: Any) -> Any:
    """An option that is None unless given: then a resumed run's own value counts, in a new run what is `shown`."""
    shown = shown if isinstance(shown, bool) else str(shown)
    return typer.Option(*flags.split(), help=text, rich_help_panel=panel, show_default=shown, **more)


def learning(standard: Options, names: Iterable[str] = FIELDS, **texts: tuple[str, str | None]) -> Group:
    """The options of those fields that `standard` has; its values count in a new run. texts: others than in FIELDS."""
    kinds = {each.name: each.type for each in fields(standard)} | {"precision": Precision}
    options = {}
    for name in filter(kinds.__contains__, names):
        panel, usual, usually = FIELDS[name]
        text, shown = texts.get(name, (usual, usually))
        shown = getattr(standard, name) if shown is None else shown
        least = {"min": 0} if name == "seed" else {}
        given = option(panel, FLAGS.get(name, f"--{name.replace('_', '-')}"), text, shown, **least)
        options[name] = Annotated[kinds[name] | None, given]
    return Group(options)


def chosen(standard: Options, saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of an Options: as given, else as a resumed run has them, else those of `standard`, all checked."""
    known = {**asdict(standard), **saved}
    options = {each.name: given.get(each.name, known[each.name]) for each in fields(standard)}
    type(standard)(**options)
    return options


def read_pattern(given: dict[str, Any]) -> dict[str, Any]:
    """The pattern of the options given, where there is one, as Config takes it: a/b are heads of one layer."""
    return (
        {"pattern": [text.split("/") if "/" in text else text for text in given["pattern"]]}
        if "pattern" in given
        else {}
    )


def _model(flags: str, text: str, shown: object = False, **more: Any) -> Any:
    return option("The model", flags, text, shown, **more)


_SHAPE = {
    "preset": (Preset, _model("--preset", "A published size.")),
    "layers": (int, _model("--layers", "Blocks.", SMALL["layers"])),
    "width": (int, _model("--width", "Channels, a multiple of the heads.", SMALL["width"])),
    "heads": (int, _model("--heads", "Attention heads.", SMALL["heads"])),
    "objective": (Objective, _model("--objective", "ar: predict the next pixel. bert: predict hidden pixels.", "ar")),
    "pattern": (
        list[str],
        _model(
            "--pattern",
            "Sparse attention, such as row|neighborhood(7), or dense. Repeated: layers alternate; a / b: heads do.",
            "dense",
            metavar="TEXT",
        ),
    ),
    "positions": (
        Positions,
        _model("--positions", "An embedding a pixel; axial: of its row plus of its column.", "learned"),
    ),
}
ShapeOptions = Annotated[Given, Group({name: Annotated[kind | None, given] for name, (kind, given) in _SHAPE.items()})]
RunOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="RUN", help="The directory that everything is written to.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from RUN's newest checkpoint, with the options that RUN has.")
]
AutoResumeOption = Annotated[
    bool,
    typer.Option(
        "--auto-resume",
        help="--resume where RUN holds a checkpoint, else begin: for jobs that are started again.",
    ),
]
RunWorkersOption = Annotated[
    int | None,
    option(
        MACHINE, "--workers", "Processes that decode images; 0: this one.", "one a core, none for few images", min=0
    ),
]
RunDeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=MACHINE)]
