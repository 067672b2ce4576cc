"""A training run's directory: what may be done there, and train.json, which holds the options for people and for a
later --resume.
"""

import fcntl
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from igpt_fast.atomic import write_atomically
from igpt_fast.checkpoint import Checkpoint, list_checkpoints
from igpt_fast.config import Config
from igpt_fast.console import number, say
from igpt_fast.errors import InputError, reason_of
from igpt_fast.images import in_todays_words
from igpt_fast.made import OPTIONS, SAMPLES
from igpt_fast.model import ImageGPT
from igpt_fast.options import FinetuneOptions, Options

LEARNED = "learned.npy"  # of fine-tuning: which of the images it learns from
IN_PYTHON = "a model given in Python"  # what a run began with, where nothing else is noted


@dataclass(frozen=True)
class Result:
    """How a training ended. Losses are nats per pixel; val_loss is None when no image is held out."""

    model: ImageGPT  # with the averaged weights when ema is on
    run: Path
    checkpoint: Path
    step: int
    loss: float | None  # None when a resumed run had no step to take and metrics.jsonl is gone
    val_loss: float | None
    train: int  # images to learn from
    val: int  # images to validate on
    seconds: float  # all parts of an interrupted run together
    rows: list[dict[str, Any]]  # of metrics.jsonl


def check_run(run: str | Path, resume: bool) -> None:
    """Finds out, before any work and without leaving a trace, that `run` can be trained into. Raises InputError."""
    run = Path(run)
    found = list_checkpoints(run)
    if found and not resume:
        raise InputError(f"{run} already holds {found[-1].name}: add --resume to go on from it, or use another --out")
    if resume and not found:
        raise InputError(f"{run} holds no checkpoint to go on from: leave out --resume to start anew")
    there = next(p for p in (run, *run.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"cannot write into {run}: {there}: {error.strerror}; use another --out") from error


def refuse_new(run: Path, checkpoint: Checkpoint | None) -> None:
    """InputError where another process has saved something between `check_run` and the lock."""
    newest = list_checkpoints(run)[-1:]
    if newest != ([] if checkpoint is None else [checkpoint.path]):
        raise InputError(f"another process has trained into {run} meanwhile: start again, with --resume to go on")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run's lock; it ends with the process, however that dies. InputError while another process holds it."""
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is training into {run}: wait for it, or use another --out") from error
        except OSError as error:
            say(f"{run} is not locked ({error.strerror}): see to it that no other process trains into it")
        yield


def write_options(
    run: Path, config: Config, options: Options, data: Mapping[str, Any], command: Mapping[str, Any]
) -> None:
    """Writes train.json. data: see `batches.fingerprint`; command: what the caller wants to find there again."""
    values = {"config": config.to_dict(), "options": asdict(options), "data": dict(data), "command": dict(command)}
    write_atomically(run / OPTIONS, (json.dumps(values, indent=1) + "\n").encode())


def read_options(run: str | Path) -> dict[str, Any]:
    """train.json of a run: config, options, data, command. Raises InputError when it is missing, or holds what no run
    could have written.
    """
    path = Path(run) / OPTIONS
    try:
        values = json.loads(path.read_bytes())
        values = {key: dict(values[key]) for key in ("config", "options", "data", "command")}
        kind = FinetuneOptions if learns_classes(values) else Options
        kind(**{f.name: values["options"][f.name] for f in fields(kind) if f.name in values["options"]})
        if "images" in values["command"]:
            _check_images(values["command"]["images"])
            values["command"]["images"] = in_todays_words(values["command"]["images"])
    except FileNotFoundError as error:
        way = f"put it back, or begin a run with its weights: --init {run} and another --out"
        raise InputError(f"{path} is missing; {way}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, error) from error
    return values


def to_go_on_with(run: str | Path, resume: bool) -> dict[str, Any]:
    """As `check_run`; what `read_options` says of a run that is resumed, and nothing of a new one."""
    check_run(run, resume)
    return read_options(run) if resume else {"config": {}, "options": {}, "command": {}}


def learns_classes(saved: Mapping[str, Any]) -> bool:
    """Whether train.json is of fine-tuning."""
    return "generative" in saved["options"]


def damaged(path: Path, error: Exception) -> InputError:
    """The error of a train.json that says what no run could have written."""
    return InputError(f"{path} is damaged ({error}); mend it, or train anew into another --out")


def _check_images(images: object) -> None:
    """TypeError unless `images` says how the images were read in the types that the command line writes."""
    if not isinstance(images, dict):
        raise TypeError(f"images is {images!r}")
    size = images.get("size")
    if size is not None and (not isinstance(size, list) or [type(n) for n in size] != [int, int]):
        raise TypeError(f"size is {size!r}")
    for name, value in images.items():
        some = {"palette": str, "value_range": list, "bands": list}.get(name)
        kind = (some, type(None)) if some else int if name in ("colors", "gray_bits") else str
        if name != "size" and not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")


def refuse_differences(run: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError that names the first field that a resumed run would change but must not."""
    for name in dict.fromkeys([*saved, *now]):
        if saved.get(name) != now.get(name):
            was, is_ = (_short(values.get(name)) for values in (saved, now))
            raise InputError(
                f"--resume with another {name}: {run} was trained with {was}, not {is_}; "
                f"leave it as it was, or train anew into another --out"
            )


def refuse_idle_steps(run: Path, step: int, options: Options, saved: Mapping[str, Any], done: bool) -> None:
    """InputError when a resumed run is beyond options.steps, or has no step left and a new way to take them.

    done: it has ended before its last step.
    """
    if step > options.steps:
        raise InputError(f"--steps is {options.steps}, but {run} has come to step {step}: give as many or more")
    now = asdict(options)
    new = [name for name in ("lr", "warmup", "clip") if name in saved and saved[name] != now[name]]
    if done and (new or saved["steps"] != options.steps):
        name = new[0] if new else "steps"
        raise InputError(
            f"--{name} changes nothing: {run} ended because validation did not become better; give more --patience"
        )
    if step == options.steps and new:
        raise InputError(
            f"--{new[0]} changes nothing: {run} has taken its {step} steps; give more --steps, or leave it out"
        )


def refuse_unequal_shares(options: Options, processes: int) -> None:
    """InputError unless each process gets as many images a step, in as many equal parts as options.accumulate says."""
    if options.batch % (parts := processes * options.accumulate):
        among = f"{processes} processes" + (f", {options.accumulate} parts each" if options.accumulate > 1 else "")
        less = " or a smaller --accumulate" if options.accumulate > 1 else ""
        raise InputError(
            f"--batch {options.batch} cannot be split evenly among {among}: use a multiple of {parts}{less}"
        )


def picture_of(run: Path, step: int) -> Path:
    """Where the picture of samples of a step is."""
    return run / SAMPLES / f"step-{step:06d}.png"


def drop_later_pictures(run: Path, step: int) -> None:
    """Removes the pictures of samples of steps beyond `step`, which will be taken again."""
    for picture in picture_of(run, 0).parent.glob("step-*.png"):
        number = re.fullmatch(r"step-(\d+)", picture.stem)
        if number and int(number[1]) > step:
            picture.unlink()


def introduction(
    config: Config, options: Options, parameters: int, images: int, held_out: int, where: str, more: list[str]
) -> str:
    """What is about to be trained, on what, how and where: a few lines for a person. more: of the task."""
    c, o = config, options
    epochs, rate = f"{o.steps * o.batch / images:.1f} epochs", f"learning rate {o.peak_lr(c.width):.2g}"
    kinds = [f"attention by {c.pattern_text}"] if c.pattern else []
    kinds += ["axial positions"] if c.positions == "axial" else []
    return "\n".join([
        f"{c.objective} model of {number(parameters)} parameters: {c.shape_text}",
        *kinds,
        f"{number(images)} images to learn from, {number(held_out)} to validate on, {o.batch} a step",
        f"{number(o.steps)} steps ({epochs}), {rate}, {o.precision} {where}",
        *more,
    ])  # fmt: skip


def diverged(run: Path, what: str, options: Options, width: int, step: int) -> InputError:
    """The error of a run whose numbers are no longer finite at `step`, with the rate it had and the ways on."""
    saved = list_checkpoints(run)
    back = f"go on from {saved[-1].name} with --resume and" if saved else "start again with"
    how = f"learning rate {options.rate(step - 1, width):.3g}, {options.precision}"
    wider = " or --precision fp32" if options.precision != "fp32" else ""
    ways = f"a smaller --lr{'' if wider else ' or'}{',' if wider else ''} a longer --warmup{wider}"
    return InputError(f"{what} ({how}): {back} {ways}")


def broken_off(run: Path, error: OSError) -> InputError:
    """The error of a run that the file system has ended, with what is left of it."""
    saved = list_checkpoints(run)
    left = f"{saved[-1]} is intact: mend that, then go on with --resume" if saved else "mend that, then start again"
    return InputError(f"{reason_of(error)}: {error.filename or run}; {left}")


def circumstances(options: Options, device: torch.device, processes: int) -> dict[str, Any]:
    """What a resumed run may change, though its numbers then differ, be it by rounding only."""
    free = {name: value for name, value in asdict(options).items() if name not in options.FIXED}
    machine = {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "device": device.type}
    return {**free, **machine, "processes": processes}


def say_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says what is not as it was: from here on the numbers are not those of an uninterrupted run."""
    saved = {"processes": 1, **saved}  # what a checkpoint means that does not say
    changed = [f"{name} {saved.get(name)} → {now[name]}" for name in now if saved.get(name) != now[name]]
    if changed:
        say(f"changed since the checkpoint: {', '.join(changed)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
