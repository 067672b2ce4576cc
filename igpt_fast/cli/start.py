"""What `igpt-fast train` goes on from: with --resume the run itself, with --init the weights of another model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_fast.cli.inputs import PREPROCESSING, described, preprocessing_of
from igpt_fast.config import Config
from igpt_fast.console import say
from igpt_fast.errors import InputError
from igpt_fast.made import OPTIONS
from igpt_fast.model import ImageGPT
from igpt_fast.options import Options
from igpt_fast.palette import Palette
from igpt_fast.run import damaged, refuse_differences
from igpt_fast.tokens import is_token_directory
from igpt_fast.weights import open_model


@dataclass(frozen=True)
class Start:
    """The model, its palette, and its values for what options would say: shape, fields of Config; images, of IMAGES."""

    model: ImageGPT
    palette: Palette | None
    shape: dict[str, Any]
    images: dict[str, Any]


def open_start(source: Path, data: Path, given: dict[str, Any]) -> Start:
    """Opens the model, and says so. given: the options of the command, by name.

    Its colours are the run's, since its weights know colours by their numbers. Raises InputError for a resumed run, for
    a model without a palette, unless the options or the data bring one, and for options that its own makes idle.
    """
    if given["resume"]:
        raise InputError("--init changes nothing with --resume: the run has its own weights; leave it out")
    found = open_model(source)
    config, made = found.model.config, is_token_directory(data)
    if found.palette is None and not made and "palette" not in given:
        raise InputError(f"{source} has no palette: give --palette, the one it was trained with, or tokens of it")
    for name in ("colors", "palette"):
        if name in given and (found.palette is not None or name == "colors"):
            raise InputError(f"--{name} changes nothing with --init: the colours are those of {source}; leave it out")
    say(f"beginning with the weights of {described(found)}")
    shape = {**config.to_dict(), "classes": 0}
    preprocessing = preprocessing_of(found)
    images: dict[str, Any] = {**preprocessing, "size": list(config.size), "colors": config.colors}
    others = [
        f"{name} {value}" for name, value in preprocessing.items() if value != PREPROCESSING[name] and name not in given
    ]
    if others and not made:
        say(f"images are read as those that it has learned from: {', '.join(others)}")
    if found.palette is not None and not made:  # tokens have their own, which is compared
        images["palette"] = str(source)
    return Start(found.model, found.palette, shape, images)


def refuse_changes(out: Path, saved: dict[str, Any], images: dict[str, Any], given: dict[str, Any]) -> None:
    """InputError for an option that would change a resumed run's model or data, before any image is read.

    Only a part can be seen so early: train compares everything with the checkpoint itself.
    """
    try:
        whole = Config.from_dict(saved["config"])
    except InputError as error:
        raise damaged(out / OPTIONS, error) from error
    config = {name: value for name, value in whole.to_dict().items() if name != "colors"}  # fewer than asked for, maybe
    if "pattern" in given:
        given = {**given, "pattern": Config.from_dict({**config, "pattern": given["pattern"]}).to_dict()["pattern"]}
    fixed = {name: saved["options"].get(name, getattr(Options, name)) for name in Options.FIXED}
    images = {name: value for name, value in images.items() if name not in ("size", "palette")}
    for was in (config, fixed, images):
        refuse_differences(out, was, {**was, **{name: given[name] for name in was if name in given}})
