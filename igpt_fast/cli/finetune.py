"""`igpt-fast finetune`: a model learns the classes of images."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from igpt_fast.atomic import write_atomically
from igpt_fast.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from igpt_fast.cli.inputs import (
    PREPROCESSING,
    LabelledArgument,
    ModelArgument,
    ReadAs,
    TestOption,
    described,
    preprocessing_of,
    refuse_preprocessing,
    say_read_otherwise,
)
from igpt_fast.cli.learning import (
    FIELDS,
    AutoResumeOption,
    ResumeOption,
    RunDeviceOption,
    RunOption,
    RunWorkersOption,
    chosen,
    learning,
)
from igpt_fast.cli.options import Given, JsonOption, expanded, given_of, print_json
from igpt_fast.cli.seen import seen_in_test
from igpt_fast.console import duration, few_of, number, say
from igpt_fast.data import Source, open_tokens
from igpt_fast.errors import InputError
from igpt_fast.finetune import FinetuneResult
from igpt_fast.finetune import finetune as finetune_model
from igpt_fast.joined import JoinedTokens
from igpt_fast.labels import choose_labelled, without_classes
from igpt_fast.made import ACCURACY, CONFUSION, CURVE
from igpt_fast.model import ImageGPT
from igpt_fast.options import FinetuneOptions
from igpt_fast.pixels import as_source
from igpt_fast.predict import answers_csv, table_png
from igpt_fast.processes import together
from igpt_fast.run import IN_PYTHON, learns_classes, to_go_on_with
from igpt_fast.tokens import TokenDataset, is_token_directory
from igpt_fast.weights import open_model

STANDARD = FinetuneOptions()
USED = [name for name in FIELDS if name not in ("val_images", "sample_every")]
TEXTS = {
    "lr": ("Learning rate, the same to the end.", "3e-4 x 512 / width, less for batches below 128"),
    "val_fraction": ("Share of each class that validation keeps of the images to learn from.", None),
    "save_every": ("Steps between checkpoints, beside the best; 0: at the end.", None),
    "keep": ("Newest checkpoints to keep; the best stays, too.", None),
}
ANSWERS = "test.csv"  # of the images that are tested on, in RUN


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("finetune")(expanded(finetune))


def finetune(
    model: ModelArgument,
    data: LabelledArgument,
    *,
    out: RunOption,
    resume: ResumeOption = False,
    auto_resume: AutoResumeOption = False,
    test: TestOption = None,
    read_as: ReadAs,
    learning_options: Annotated[Given, learning(STANDARD, USED, **TEXTS)],
    device: RunDeviceOption = "auto",
    workers: RunWorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a model the classes of DATA: a linear head on its last layer, and all its weights with it.

    RUN keeps the weights that validation likes best, which classify, convert and others then take, and loss.png and
    accuracy.png; the test at the end gives confusion.png and test.csv. Ctrl-C saves first; --resume then goes on.

    Example: igpt-fast finetune openai/imagegpt-small scans/ --out run --steps 500 --flip
    """
    given = given_of(test=test, workers=workers) | read_as | learning_options
    with together(device) as processes:
        given["resume"] = resume or (auto_resume and processes.largest(len(list_checkpoints(out))) > 0)
        with processes.first_goes_ahead():
            start, dataset, options = _prepare(model, data, out, given)
        result = finetune_model(start, dataset, out, device=processes, **options)
        if not processes.first:
            return
    seen = options["command"].get("seen")
    _report(result, dataset, data, seen)
    if as_json:
        print_json(**result.to_dict(), seen=seen)


def _prepare(
    model: Path, data: Path, out: Path, given: dict[str, Any]
) -> tuple[ImageGPT | None, TokenDataset | JoinedTokens, dict[str, Any]]:
    """The model to begin with, None when resuming, the images as tokens, and what else finetune() is to be given."""
    resume = given["resume"]
    saved = to_go_on_with(out, resume)
    command = saved["command"]
    if resume and not learns_classes(saved):
        way = command.get("resume", "igpt-fast train --resume")
        raise InputError(f"{out} is a run of train; go on with: {way}, or fine-tune it into another --out")
    test = given.get("test", command.get("test"))
    options = chosen(STANDARD, saved["options"], given)  # finds mistakes before anything is read
    _refuse_idle(given, options, [data, *([Path(test)] if test else [])])
    init = command.get("init") if resume else str(model.absolute() if model.exists() else model)
    if init in (None, IN_PYTHON):
        say(f"{out} was begun in Python: with which model it does not say, so {model} is not compared with it")
    elif Path(init).resolve() != model.resolve():
        if not Path(init).is_absolute() or Path(init).exists() or Path(f"{init}.index").exists():
            raise InputError(f"--resume with another MODEL: {out} began with {init}; give that, or another --out")
        say(f"the model that {out} began with is gone from {init}, so {model} is not compared with it")
    sources = [_with_labels(data, 2), *([_with_labels(Path(test), 1)] if test else [])]
    found = load_checkpoint(out) if resume else open_model(model)
    noted = TokenDataset(data).preprocessing if is_token_directory(data) else {}  # --test is read as DATA was
    images = {**PREPROCESSING, **preprocessing_of(found), **noted, **command.get("images", {})}
    images |= {name: given[name] for name in images if name in given}
    parts = [
        _tokens(source, found, out / name, word, resume, given.get("workers"), images)
        for source, name, word in zip(sources, ("tokens", "test-tokens"), ("DATA", "--test"), strict=False)
    ]
    dataset = JoinedTokens(*parts) if test else parts[0]
    options["test_fraction"] = 0.0 if test else options["test_fraction"]
    if not resume:
        say(f"beginning with the weights of {described(found)}")
        command = {
            "data": str(data.absolute()),
            "from_tokens": is_token_directory(data),
            "init": init,
            "images": images,
        }
        command |= {"test": str(Path(test).absolute())} if test else {}
        command["seen"] = _seen(found, dataset, options)
    command = {**command, "resume": _again(model, data, out, given.get("test"))}
    return None if resume else found.model, dataset, {"resume": resume, "command": command, **options}


def _refuse_idle(given: dict[str, Any], options: dict[str, Any], data: list[Path]) -> None:
    """InputError for an option that would change nothing."""
    refuse_preprocessing(data, given, ("resize", "background", "value_range", "bands", "on_error", "workers"))
    if len(data) > 1 and "test_fraction" in given:
        raise InputError("--test-fraction changes nothing with --test, which is all that is tested on; leave one out")
    for name in ("val_fraction", "val_every"):
        if "patience" in given and not options[name]:
            raise InputError(f"--patience changes nothing with --{name.replace('_', '-')} 0; leave one of them out")


def _with_labels(path: Path, least: int) -> Path | Source:
    """The images, or tokens. InputError where images have too few classes, before anything is made of them."""
    source = path if is_token_directory(path) else as_source(path)
    if isinstance(source, Source) and len(source.classes or ()) < least:
        raise without_classes(path)
    return source


def _tokens(
    source: Path | Source, found: Checkpoint, cache: Path, word: str, resume: bool, workers: int | None, images: dict
) -> TokenDataset:
    """Images as tokens of the model, made at `cache` first. word: what the command calls them."""
    path = source.path if isinstance(source, Source) else source
    if found.palette is None and isinstance(source, Source):
        raise InputError(f"{found.path} has no palette to read images with; give {path} as tokens of its palette")
    as_they_are = f"give {cache} as {word} to go on with them as they are"
    remedy = as_they_are if resume else f"{as_they_are}, or delete that directory to make them anew"
    size = found.model.config.size
    tokens = open_tokens(source, found.palette, cache, size=size, workers=workers, remedy=remedy, **images)
    if not isinstance(source, Source):
        say_read_otherwise(path, tokens, preprocessing_of(found))
    tokens.origin = path
    return tokens


def _seen(found: Checkpoint, dataset: TokenDataset | JoinedTokens, options: dict[str, Any]) -> int | None:
    """How many of the images that will be tested on the model has learned from. InputError where --test has none."""
    by = {"per_class": options["per_class"], "seed": options["seed"], "tests": False}
    labelled = choose_labelled(dataset, options["test_fraction"], **by)
    if isinstance(dataset, JoinedTokens) and not labelled.test.any():
        raise InputError(f"{dataset.test.origin}: no image has a label of the classes of {dataset.origin}")
    return seen_in_test(found, dataset, labelled)


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
        images = number(len(result.answers.indices))
        say(f"test: accuracy {result.test} on {images} images, by which nothing was chosen")
        say(f"  balanced accuracy {100 * result.test.balanced:.1f} %: the mean over the classes, however many images")
        labels = chosen_.labels[chosen_.test]
        title = f"{result.test.accuracy:.1%} of {images} test images are right, step {result.step} of {run.name}"
        write_atomically(run / CONFUSION, table_png(result.answers.table(labels), result.answers.classes, title))
        write_atomically(run / ANSWERS, answers_csv(result.answers, dataset.names, labels))
        places += [("confusion", run / CONFUSION), ("answers", run / ANSWERS)]
    else:
        say("no test: no image was kept for it")
    if result.answers is not None:
        tested = np.bincount(labels, minlength=len(chosen_.classes))
        if idle := [name for name, count in zip(chosen_.classes, tested, strict=True) if not count]:
            say(f"not tested: {few_of(idle)}: no image of {'them' if len(idle) > 1 else 'it'} was kept for the test")
    if seen:
        say(f"the model that this began with had learned from {seen:,} of the test images")
    if chosen_.unlabelled:
        say(f"left out {chosen_.unlabelled:,} images without a label")
    if chosen_.left_out:
        few = ", ".join(f"{name} ({count})" for name, count in chosen_.left_out.items())
        say(f"left out classes with too few images to learn from: {few}")
    say(f"{result.train:,} images to learn from; {duration(result.seconds)} in all")
    for name, path in places:
        say(f"  {name:<12}{path}")
    quoted = shlex.quote(str(run))
    say(f"try next:\n  igpt-fast classify {quoted} {shlex.quote(str(data))}\n  igpt-fast convert {quoted} {quoted}-hf")
