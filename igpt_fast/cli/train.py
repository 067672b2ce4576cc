"""`igpt-fast train`: from images, or tokens, to a model."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_fast.checkpoint import list_checkpoints
from igpt_fast.cli.inputs import PREPROCESSING, say_read_otherwise
from igpt_fast.cli.learning import (
    IMAGES_PANEL,
    SHAPE,
    SMALL,
    AutoResumeOption,
    ResumeOption,
    RunDeviceOption,
    RunOption,
    RunWorkersOption,
    ShapeOptions,
    chosen,
    learning,
    option,
    read_pattern,
)
from igpt_fast.cli.options import Given, Group, JsonOption, expanded, given_of, parse_size, print_json, reading
from igpt_fast.cli.start import Start, open_start, refuse_changes
from igpt_fast.config import PRESETS, Config
from igpt_fast.console import duration, say
from igpt_fast.data import open_tokens
from igpt_fast.errors import InputError
from igpt_fast.made import CURVE, METRICS
from igpt_fast.options import Options
from igpt_fast.palette import Palette
from igpt_fast.processes import together
from igpt_fast.run import Result, learns_classes, picture_of, to_go_on_with
from igpt_fast.tokens import TokenDataset, is_token_directory
from igpt_fast.train import train as train_model
from igpt_fast.weights import refuse_other_shape

IMAGES = {"size": None, **PREPROCESSING, "palette": None, "colors": 512}
STANDARD = Options()
_SIZE = option(IMAGES_PANEL, "--size", "Pixels a side: 32, or height x width as 32x48.", 32, metavar="PX")
_COLORS = option(IMAGES_PANEL, "--colors", "Colours of the palette that is made from the images.", 512)
_PALETTE = option(IMAGES_PANEL, "--palette", "Use this palette and make none.", metavar="FILE.npy")
IMAGE_OPTIONS = Group(
    {
        "size": Annotated[str | None, _SIZE],
        "colors": Annotated[int | None, _COLORS],
        "palette": Annotated[Path | None, _PALETTE],
        **reading(panel=IMAGES_PANEL).options,
    }
)


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("train")(expanded(train))


def train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Tokens from igpt-fast tokenize, or images: a folder, a .zip or .tar, a .npy or .npz array.",
            show_default=False,
        ),
    ],
    *,
    out: RunOption,
    resume: ResumeOption = False,
    auto_resume: AutoResumeOption = False,
    init: Annotated[
        Path | None,
        option(
            "The model",
            "--init",
            "Begin with the weights of a run, or of any model that sample takes; --size and --pattern may be others.",
            "fresh weights",
            metavar="MODEL",
        ),
    ] = None,
    shape_options: ShapeOptions,
    image_options: Annotated[Given, IMAGE_OPTIONS],
    learning_options: Annotated[Given, learning(STANDARD)],
    device: RunDeviceOption = "auto",
    workers: RunWorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an Image GPT on images, from a fresh start or (--resume) from where a run was left.

    RUN receives checkpoints, metrics.jsonl, loss.png and samples/. Ctrl-C saves first; --resume then goes on as if
    nothing had been. On several GPUs: torchrun --nproc-per-node 8 -m igpt_fast.cli train DATA --out RUN ...

    Example: igpt-fast train photos/ --out run --layers 8 --width 256 --heads 4 --size 32 --steps 5000
    """
    given = given_of(workers=workers) | shape_options | image_options | learning_options
    given |= read_pattern(given)
    with together(device) as processes:
        if auto_resume and processes.largest(len(list_checkpoints(out))):
            resume, init = True, None  # what the run began with is behind it
        given |= given_of(resume=resume, init=init)
        with processes.first_goes_ahead():
            dataset, options = _prepare(data, out, given)
        result = train_model(dataset, out, device=processes, **options)
        if not processes.first:
            return
    _report(result, dataset, str(data), options["sample_every"])
    if as_json:
        _print(result, dataset, options["sample_every"])


def _prepare(data: Path, out: Path, given: dict[str, Any]) -> tuple[TokenDataset, dict[str, Any]]:
    """The images as tokens, and what else train() is to be given."""
    resume, init, made = given["resume"], given.get("init"), is_token_directory(data)
    saved = _saved(data, out, resume)
    options = chosen(STANDARD, saved["options"], given)  # finds mistakes before the images are read
    _refuse_idle(given, data)
    start = open_start(init, data, given) if init else None
    images, shape = _asked_for(out, given, saved, start)
    if not resume and made and "size" not in given:
        images["size"] = None  # a preset's, which tokens need not have
    palette = start.palette if start and start.palette else given.get("palette")
    dataset = _open(data, out, images, palette, resume, seed=options["seed"], workers=given.get("workers"))
    if not resume and made:
        say_read_otherwise(data, dataset, start.images if start else {})
        images |= dataset.preprocessing
    config = Config.from_dict({**shape, "colors": dataset.colors, "size": dataset.size})
    command = dict(saved["command"]) if resume else {"from_tokens": made}
    command |= {"data": str(data.absolute()), "images": images, "resume": _again(data, out)}
    command |= {"init": str(init.absolute() if init.exists() else init)} if init else {}
    model = start.model if start else None
    return dataset, {"config": config, "resume": resume, "init": model, "command": command, **options}


def _saved(data: Path, out: Path, resume: bool) -> dict[str, Any]:
    """What train.json says of a run to go on with, and of a new one nothing. InputError where it cannot be `data`'s."""
    saved = to_go_on_with(out, resume)
    if learns_classes(saved):
        way = saved["command"].get("resume", "igpt-fast finetune --resume")
        raise InputError(f"{out} is a run of finetune; go on with: {way}")
    if saved["command"].get("from_tokens") and not is_token_directory(data):
        raise InputError(f"{out} was trained on tokens ({saved['command'].get('data')}); give those, not {data}")
    return saved


def _asked_for(
    out: Path, given: dict[str, Any], saved: dict[str, Any], start: Start | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How images are to be read (IMAGES), and the model's shape, as for Config: as given, else as in the run, else as
    in the model to begin with. InputError where that cannot be.
    """
    given = PRESETS.get(given.get("preset"), {}) | given
    if "size" in given:
        given["size"] = list(parse_size(given["size"]) if isinstance(given["size"], str) else given["size"])
    images = {**IMAGES, **saved["command"].get("images", {}), **(start.images if start else {})}
    if given["resume"]:
        refuse_changes(out, saved, images, given)
    shape = {**(start.shape if start else SMALL), **saved["config"]}
    shape |= {name: given[name] for name in SHAPE if name in given}
    config = Config.from_dict(shape)
    if start:
        refuse_other_shape(start.model.config, config)
    images |= {name: str(given[name]) if name == "palette" else given[name] for name in IMAGES if name in given}
    return images, shape


def _refuse_idle(given: dict[str, Any], data: Path) -> None:
    """InputError for an option that would change nothing."""
    if is_token_directory(data):
        for name in ("colors", "resize", "background", "value_range", "bands", "on_error", "workers"):
            if name in given:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} changes nothing: {data} holds tokens already; leave it out, or give images")
    if "colors" in given and "palette" in given:
        raise InputError("--colors changes nothing with --palette, which has its own; leave one of them out")


def _again(data: Path, out: Path) -> str:
    """What goes on with a run."""
    return f"igpt-fast train {shlex.quote(str(data))} --out {shlex.quote(str(out))} --resume"


def _open(
    data: Path, out: Path, images: dict[str, Any], palette: Palette | Path | None, resume: bool, **more: Any
) -> TokenDataset:
    """DATA as tokens, made in RUN/tokens first when it holds images."""
    options = {**images, "size": images["size"] and tuple(images["size"])}
    if palette is not None:
        options["palette"] = palette
    elif images["palette"] and (own := next(filter(is_token_directory, (data, out / "tokens")), None)):
        options["palette"] = Palette.load(own)  # what a resumed run compares: the file it came from may be gone
    as_they_are = f"{_again(out / 'tokens', out)} goes on with the tokens as they are"
    remedy = as_they_are if resume else "choose another --out, or delete these to make them anew"
    return open_tokens(data, cache_dir=out / "tokens", remedy=remedy, **more, **options)


def _picture(result: Result, sample_every: int) -> Path | None:
    path = picture_of(result.run, result.step)
    return path if sample_every and path.exists() else None


def _report(result: Result, dataset: TokenDataset, data: str, sample_every: int) -> None:
    """Says how it ended, where everything is, and what to try next."""
    run, picture = shlex.quote(str(result.run)), _picture(result, sample_every)
    ar = result.model.config.objective == "ar"
    loss = f"loss {result.loss:.4f} nats per pixel" if result.loss is not None else f"no loss in {result.run / METRICS}"
    held_out = "" if result.val_loss is None else f", on held-out images {result.val_loss:.4f}"
    say(f"step {result.step}: {loss}{held_out}; {duration(result.seconds)} in all")
    places = [("checkpoint", result.checkpoint), ("loss curve", result.run / CURVE), ("metrics", result.run / METRICS)]
    for name, path in [*places, *([("samples", picture)] if picture else [])]:
        say(f"  {name:<12}{path}")
    say("try next:")
    if ar:
        say(f"  igpt-fast sample {run}\n  igpt-fast complete {run} photo.png --keep 0.5 -n 8")
    if dataset.classes or not ar:
        say(f"  igpt-fast probe {run} {shlex.quote(data)}")


def _print(result: Result, dataset: TokenDataset, sample_every: int) -> None:
    picture = _picture(result, sample_every)
    print_json(
        run=str(result.run),
        step=result.step,
        loss=result.loss,
        val_loss=result.val_loss,
        train=result.train,
        val=result.val,
        skipped=dataset.meta.get("skipped", []),
        parameters=result.model.num_parameters(),
        seconds=round(result.seconds, 2),
        checkpoint=str(result.checkpoint),
        loss_curve=str(result.run / CURVE),
        samples=str(picture) if picture else None,
    )
