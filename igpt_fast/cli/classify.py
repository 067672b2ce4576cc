"""`igpt-fast classify`: the classes of images, by a model with a classifier head."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from igpt_fast.atomic import write_atomically
from igpt_fast.cli.inputs import (
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
from igpt_fast.cli.options import DataArgument, DeviceOption, JsonOption, Precision, expanded, print_json
from igpt_fast.cli.seen import say_seen, seen_among
from igpt_fast.console import answer, counted, printable, say
from igpt_fast.errors import InputError
from igpt_fast.labels import group_numbers
from igpt_fast.predict import Answers, answers_csv, class_names, predict, table_png
from igpt_fast.processes import together
from igpt_fast.regression import Score, score
from igpt_fast.tokens import TokenDataset

FEW = 10  # images whose answers are also said
LISTED = 20  # classes whose counts are


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("classify")(expanded(classify))


def classify(
    model: ModelArgument,
    data: DataArgument,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.csv", help="A line an image: name, answer, probability.")
    ] = Path("classes.csv"),
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the probability of every class into FILE.csv.")
    ] = False,
    confusion: Annotated[
        Path | None,
        typer.Option(
            "--confusion",
            metavar="FILE.png",
            show_default="none",
            help="Where DATA has labels: a picture of which class is taken for which.",
        ),
    ] = None,
    read_as: ReadAs,
    batch: SideBySideOption = None,
    precision: PrecisionOption = Precision.fp32,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Name the class of every image, by a model with a classifier head, as finetune makes one.

    Where DATA has labels, such as class folders, it is also said how many answers are right. DATA may also be tokens.

    Example: igpt-fast classify run/ new-scans/ -o classes.csv
    """
    check_place(out, ".csv", data)
    if confusion is not None:
        check_place(confusion, ".png", data)
    with ExitStack() as stack:
        processes = stack.enter_context(together(device))
        with processes.first_goes_ahead():
            checkpoint = open_to_measure(model, [data], processes)
            classes = class_names(checkpoint.model)
            dataset = stack.enter_context(tokens_for(checkpoint, data, read_as))
            labels = _labels(dataset, classes)
            if confusion is not None and (labels < 0).all():
                raise InputError(f"{data}: has no labels that the model knows: --confusion needs some")
        answers = predict(checkpoint.model, dataset, batch=batch, amp=precision is Precision.bf16, processes=processes)
        if not processes.first:
            return
        seen, names = seen_among(checkpoint, dataset, answers.indices), dataset.names
        known = labels >= 0
        of_known = Answers(answers.indices[known], answers.probabilities[known], classes)
        groups = group_numbers(dataset, np.flatnonzero(known))
    write_atomically(out, answers_csv(answers, names, labels if known.any() else None, probabilities))
    counts = np.bincount(answers.best, minlength=len(classes))
    found = score("classifier", (answers.best == labels)[known], groups, labels[known]) if known.any() else None
    images = f"{counted(len(names), 'image')} of {called(data)}"
    lines = f"{described(checkpoint)}, on {images}:", *_summary(answers, names, counts, found, int(known.sum()))
    try:
        for line in lines:
            answer(line, as_json)
    finally:  # whoever reads them may have gone
        if confusion is not None:
            table = of_known.table(labels[known])
            title = f"{found.accuracy:.1%} of {known.sum():,} images of {called(data)} are right"
            write_atomically(confusion, table_png(table, classes, title))
    less = "expect fewer right answers on others"
    say_seen(checkpoint, seen, f"the model had learned from {seen or 0:,} of these images: {less}")
    if confusion is not None:
        say(f"wrote {confusion}")
    say(f"wrote {out}")
    if as_json:
        facts: dict[str, Any] = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "out": str(out)}
        if found is not None:
            facts |= {"labelled": int(known.sum()), "accuracy": found.accuracy, "low": found.low, "high": found.high}
            facts |= {"balanced": found.balanced, "recall": of_known.recall(labels[known])}
        of_each = dict(zip(classes, counts.tolist(), strict=True))
        print_json(**facts, images=len(names), seen=seen, confusion=confusion and str(confusion), answers=of_each)


def _labels(dataset: TokenDataset, classes: tuple[str, ...]) -> np.ndarray:
    """The images' classes as the model numbers them, -1 where there is none or it knows none such: int64 [N]."""
    number_of = {name: row for row, name in enumerate(classes)}
    of_theirs = np.array([*(number_of.get(name, -1) for name in dataset.classes or []), -1])
    return of_theirs[dataset.labels]


def _summary(answers: Answers, names: list[str], counts: np.ndarray, found: Score | None, known: int) -> list[str]:
    """The answers as lines for a person."""
    lines, classes = [], [printable(name) for name in answers.classes]
    for name, row in zip(names, answers.probabilities, strict=True) if len(names) <= FEW else ():
        likeliest = np.argsort(-row, kind="stable")[:3]
        lines.append(f"  {printable(name)}: " + ", ".join(f"{classes[k]} {100 * row[k]:.1f} %" for k in likeliest))
    order = np.argsort(-counts, kind="stable")
    if not lines:
        lines = [f"  {counts[k]:>7,} {classes[k]}" for k in order[:LISTED] if counts[k]]
        rest = int((counts[order[LISTED:]] > 0).sum())
        lines += [f"  and {rest} more classes"] if rest else []
    if found is not None:
        of = f"{known:,} of them have a class that the model knows" if known < len(names) else "of all"
        lines.append(f"  right: {found}; {of}")
        lines.append(f"  balanced accuracy {100 * found.balanced:.1f} %: the mean over their classes")
    return lines
