"""`igpt-fast finetune`: a model learns the classes of images."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from igpt_fast.checkpoint import load_checkpoint
from igpt_fast.cli.inputs import (
    ModelArgument,
    ReadAsOption,
    SkipOption,
    described,
    reading_of,
    refuse_reading,
    seen_among,
)
from igpt_fast.cli.learning import MACHINE, Precision, chosen, field, option
from igpt_fast.cli.options import JsonOption, print_json
from igpt_fast.console import duration, number, say
from igpt_fast.data import open_tokens
from igpt_fast.errors import InputError
from igpt_fast.finetune import FinetuneResult
from igpt_fast.finetune import finetune as finetune_model
from igpt_fast.joined import JoinedTokens
from igpt_fast.model import ImageGPT
from igpt_fast.options import FinetuneOptions
from igpt_fast.pictures import write_atomically
from igpt_fast.predict import answers_csv, table_png
from igpt_fast.processes import together
from igpt_fast.run import check_run, read_options
from igpt_fast.task import ACCURACY, CURVE
from igpt_fast.tokens import TokenDataset, is_token_directory
from igpt_fast.weights import open_model

STANDARD = FinetuneOptions()
IMAGES = {"resize": "paper", "background": "white", "on_error": "raise"}
TABLE, ANSWERS = "confusion.png", "test.csv"  # of the images that are tested on, in RUN


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("finetune")(finetune)


def finetune(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Images with labels (class folders, also in a .zip or .tar, or an .npz), or tokens of them.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="RUN", help="The directory that everything is written to.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from RUN's newest checkpoint, with the options that RUN has.")
    ] = False,
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            metavar="DATA",
            show_default="a share of DATA",
            help="Other images or tokens, with the same classes, to test on; all of DATA is then learned from.",
        ),
    ] = None,
    test_fraction: Annotated[float | None, field("test_fraction", STANDARD)] = None,
    per_class: Annotated[int | None, field("per_class", STANDARD)] = None,
    resize: ReadAsOption = None,
    on_error: SkipOption = None,
    steps: Annotated[int | None, field("steps", STANDARD)] = None,
    batch: Annotated[int | None, field("batch", STANDARD)] = None,
    lr: Annotated[
        float | None,
        field("lr", STANDARD, "Learning rate, the same to the end.", "3e-4 x 512 / width, less for batches below 128"),
    ] = None,
    warmup: Annotated[int | None, field("warmup", STANDARD)] = None,
    clip: Annotated[float | None, field("clip", STANDARD)] = None,
    ema: Annotated[float | None, field("ema", STANDARD)] = None,
    flip: Annotated[bool | None, field("flip", STANDARD)] = None,
    shift: Annotated[int | None, field("shift", STANDARD)] = None,
    generative: Annotated[float | None, field("generative", STANDARD)] = None,
    patience: Annotated[int | None, field("patience", STANDARD)] = None,
    seed: Annotated[int | None, field("seed", STANDARD, min=0)] = None,
    accumulate: Annotated[int | None, field("accumulate", STANDARD)] = None,
    activation_checkpointing: Annotated[bool | None, field("activation_checkpointing", STANDARD)] = None,
    precision: Annotated[Precision | None, field("precision", STANDARD)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MACHINE)] = "auto",
    workers: Annotated[
        int | None, option(MACHINE, "--workers", "Processes that decode images; 0: this one.", "one a core", min=0)
    ] = None,
    val_fraction: Annotated[
        float | None,
        field("val_fraction", STANDARD, "Share of each class that validation keeps of the images to learn from."),
    ] = None,
    val_every: Annotated[int | None, field("val_every", STANDARD)] = None,
    save_every: Annotated[
        int | None, field("save_every", STANDARD, "Steps between checkpoints, beside the best; 0: at the end.")
    ] = None,
    log_every: Annotated[int | None, field("log_every", STANDARD)] = None,
    keep: Annotated[int | None, field("keep", STANDARD, "Checkpoints to keep, beside the best.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a model the classes of DATA: a linear head on its last layer, and all its weights with it.

    RUN keeps the weights that validation likes best, which classify, convert and others then take, and loss.png and
    accuracy.png; the test at the end gives confusion.png and test.csv. Ctrl-C saves first; --resume then goes on.

    Example: igpt-fast finetune openai/imagegpt-small scans/ --out run --steps 500 --flip
    """
    given = {name: getattr(value, "value", value) for name, value in locals().items() if value is not None}
    with together(device) as processes:
        with processes.first_goes_ahead():
            start, dataset, options = _prepare(model, data, out, given)
        result = finetune_model(start, dataset, out, device=processes, **options)
        if not processes.first:
            return
    seen = options["command"]["seen"]
    _report(result, dataset, data, seen)
    if as_json:
        print_json(**result.to_dict(), seen_unlabelled=seen)


def _prepare(
    model: Path, data: Path, out: Path, given: dict[str, Any]
) -> tuple[ImageGPT | None, TokenDataset | JoinedTokens, dict[str, Any]]:
    """The model to begin with, None when resuming, the images as tokens, and what else finetune() is to be given."""
    resume = given["resume"]
    check_run(out, resume)
    saved = read_options(out) if resume else {"config": {}, "options": {}, "command": {}}
    command = saved["command"]
    if resume and not saved["config"].get("classes"):
        way = command.get("resume", "igpt-fast train --resume")
        raise InputError(f"{out} is a run of train; go on with: {way}, or fine-tune it into another --out")
    if "test" in given and "test_fraction" in given:
        raise InputError("--test-fraction changes nothing with --test, which is all that is tested on; leave one out")
    options = chosen(STANDARD, saved["options"], given)  # finds mistakes before anything is read
    init, test = command.get("init", str(model)), given.get("test", command.get("test"))
    if Path(init).resolve() != model.resolve():
        raise InputError(f"--resume with another MODEL: {out} began with {init}; give that, or another --out")
    refuse_reading([data, *([test] if test else [])], given, ("resize", "on_error", "workers"))
    found = load_checkpoint(out) if resume else open_model(model)
    images = {**IMAGES, **reading_of(found), **command.get("images", {})}
    images |= {name: given[name] for name in images if name in given}
    again = _again(model, data, out, given.get("test"))
    more = {"workers": given.get("workers"), "remedy": f"give {out / 'tokens'} as DATA, or another --out"}

    def tokens(of: Path, name: str) -> TokenDataset:
        if found.palette is None and not is_token_directory(of):
            raise InputError(f"{found.path} has no palette to read images with; give {of} as tokens of its palette")
        return open_tokens(of, found.palette, out / name, size=found.model.config.size, **images, **more)

    dataset: TokenDataset | JoinedTokens = tokens(data, "tokens")
    if test:
        dataset = JoinedTokens(dataset, tokens(Path(test), "test-tokens"))
        options["test_fraction"] = 0.0
    if not resume:
        say(f"beginning with the weights of {described(found)}")
        tested = dataset if not test else dataset.test
        held_out = tested.split("all") if test else tested.split("val", options["test_fraction"])
        command = {"data": str(data), "init": init, "images": images, "seen": seen_among(found, tested, held_out)}
        command |= {"test": str(test)} if test else {}
    command |= {"resume": again}
    return None if resume else found.model, dataset, {"resume": resume, "command": command, **options}


def _again(model: Path, data: Path, out: Path, test: Path | None) -> str:
    """What goes on with a run."""
    words = ["igpt-fast", "finetune", str(model), str(data), "--out", str(out), "--resume"]
    return shlex.join([*words, *(["--test", str(test)] if test else [])])


def _report(result: FinetuneResult, dataset: TokenDataset | JoinedTokens, data: Path, seen: int | None) -> None:
    """Writes what the test has found, says how it ended, where everything is, and what to try next."""
    run, chosen_ = result.run, result.chosen
    places = [("checkpoint", result.checkpoint), ("loss curve", run / CURVE)]
    if result.val_accuracy is not None:
        accuracy = f"accuracy {100 * result.val_accuracy:.1f} % on {result.val:,} images"
        say(f"validation likes step {result.step} of {result.last_step} best: {accuracy}")
        places.append(("validation", run / ACCURACY))
    if result.test is not None:
        t = result.test
        interval = f"95 % interval {100 * t.low:.1f} – {100 * t.high:.1f} %"
        images = number(len(result.answers.indices))
        say(f"test: accuracy {100 * t.accuracy:.1f} % ({interval}) on {images} images, by which nothing was chosen")
        labels = chosen_.labels[chosen_.test]
        title = f"{t.accuracy:.1%} of {images} test images are right, step {result.step} of {run.name}"
        write_atomically(run / TABLE, table_png(result.answers.table(labels), result.answers.classes, title))
        write_atomically(run / ANSWERS, answers_csv(result.answers, dataset.names, labels))
        places += [("confusion", run / TABLE), ("answers", run / ANSWERS)]
    else:
        say("no test: no image was kept for it")
    if seen:
        say(f"the model itself had learned from {seen:,} of the test images, without their labels")
    if chosen_.unlabelled:
        say(f"left out {chosen_.unlabelled:,} images without a label")
    if chosen_.left_out:
        few = ", ".join(f"{name} ({count})" for name, count in chosen_.left_out.items())
        say(f"left out classes with too few images to learn from: {few}")
    say(f"{result.train:,} images to learn from; {duration(result.seconds)} in all")
    for name, path in places:
        say(f"  {name:<12}{path}")
    quoted = shlex.quote(str(run))
    say(f"try next:\n  igpt-fast classify {quoted} {shlex.quote(str(data))}\n  igpt-fast convert {quoted} classifier/")
