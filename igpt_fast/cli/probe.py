"""`igpt-fast probe`: what a model has learned, measured."""

import re
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from igpt_fast.atomic import write_atomically
from igpt_fast.cli.inputs import (
    PREPROCESSING,
    LabelledArgument,
    LimitOption,
    ModelArgument,
    PrecisionOption,
    ReadAs,
    SideBySideOption,
    TestOption,
    called,
    check_place,
    open_to_measure,
    refuse_preprocessing,
    tokens_for,
)
from igpt_fast.cli.options import DeviceOption, JsonOption, Precision, SeedOption, expanded, print_json
from igpt_fast.cli.seen import say_seen, seen_in_test
from igpt_fast.console import answer, counted, few_of, naming_stdout, say
from igpt_fast.errors import InputError
from igpt_fast.joined import JoinedTokens
from igpt_fast.probe import LBFGS, SOLVERS, ProbeResult, answers_csv, check_options, figure_png
from igpt_fast.probe import probe as probe_model
from igpt_fast.processes import together
from igpt_fast.regression import Score, load_sklearn
from igpt_fast.sgd import EPOCHS
from igpt_fast.tokens import is_token_directory

Solver = Enum("Solver", {name: name for name in SOLVERS}, type=str)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("probe")(expanded(probe))


def probe(
    model: ModelArgument,
    data: LabelledArgument,
    *,
    layers: Annotated[str, typer.Option("--layers", metavar="L", help="all, or some as 3,5 or 2-6.")] = "all",
    joined: Annotated[
        bool, typer.Option("--joined", help="Also one regression on all of these layers' features side by side.")
    ] = False,
    test_fraction: Annotated[
        float | None,
        typer.Option(
            "--test-fraction",
            metavar="F",
            show_default="0.2",
            help="Share of the images, by their names, that is tested on. Training with a --val-fraction of as much or "
            "more never saw them.",
        ),
    ] = None,
    test: TestOption = None,
    read_as: ReadAs,
    limit: LimitOption = None,
    per_class: Annotated[
        int | None,
        typer.Option("--per-class", min=2, metavar="N", show_default="all", help="Learn from N images of each class."),
    ] = None,
    solver: Annotated[
        Solver, typer.Option("--solver", help="lbfgs, or sgd for hundreds of thousands of images, as the paper has it.")
    ] = Solver.lbfgs,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, metavar="N", show_default=str(EPOCHS), help="Passes of sgd over the images."),
    ] = None,
    batch: SideBySideOption = None,
    precision: PrecisionOption = Precision.fp32,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.png", help="Accuracy by layer, as a picture.")
    ] = Path("probe.png"),
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            metavar="FILE.csv",
            show_default="none",
            help="What each layer's classifier says of each test image.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a logistic regression on each layer's features tells the classes of DATA apart.

    DATA needs labels: class folders, a metadata.csv, or an .npz with labels. Beside the layers stand the same
    classifier on raw pixels, and the share of the test's most frequent class. Needs scikit-learn, but for --solver sgd.

    Example: igpt-fast probe run/ photos/ --out probe.png
    """
    if test is not None and test_fraction is not None:
        raise InputError("--test-fraction changes nothing with --test, which is all that is tested on; leave one out")
    test_fraction = 0.2 if test_fraction is None else test_fraction
    if solver is Solver.lbfgs:
        if epochs is not None:
            raise InputError("--epochs is for --solver sgd: lbfgs goes on until it has converged; leave it out")
        load_sklearn()
    for path, suffix in ((out, ".png"), *([(answers, ".csv")] if answers else [])):
        check_place(path, suffix, data, *([test] if test else []))
    with ExitStack() as stack:
        processes = stack.enter_context(together(device))
        with processes.first_goes_ahead():
            paths = [data] if test is None else [data, test]
            checkpoint = open_to_measure(model, paths, processes)
            depth = checkpoint.model.config.layers
            chosen = parse_layers(layers, depth)
            check_options(depth, chosen, test_fraction, limit, per_class, batch)
            refuse_preprocessing(paths, read_as, PREPROCESSING)
            readings = {path: {} if is_token_directory(path) else read_as for path in paths}
            dataset = stack.enter_context(tokens_for(checkpoint, data, readings[data]))
            if test is not None:
                beside = dataset if is_token_directory(data) else None
                tests = stack.enter_context(tokens_for(checkpoint, test, readings[test], beside))
                dataset = JoinedTokens(dataset, tests)
        if test is not None:
            test_fraction = len(dataset.test) / len(dataset)
        options = {"test_fraction": test_fraction, "limit": limit, "per_class": per_class, "seed": seed, "batch": batch}
        how = {"amp": precision is Precision.bf16, "processes": processes}
        how |= {"solver": solver.value, "epochs": epochs or EPOCHS}
        result = probe_model(checkpoint.model, dataset, layers=chosen, joined=joined, **options, **how)
        if not processes.first:
            return
        seen, names = seen_in_test(checkpoint, dataset, result.chosen), dataset.names
    step = "" if checkpoint.step is None else f", step {checkpoint.step},"
    try:
        show(result, as_json)
        with_labels = "with their labels" if checkpoint.model.config.classes else "without their labels"
        say_seen(
            checkpoint,
            seen,
            f"the model itself had learned from {seen or 0:,} of the images held out here, {with_labels}",
        )
        if as_json:
            facts = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "seen": seen}
            print_json(figure=str(out), answers=answers and str(answers), **facts, **result.to_dict())
    finally:  # last, for a file that cannot be written must not take the figures along; nor they it
        title = f"Linear probe of {model.name or model}{step} on {called(test or data)}"
        files = {answers: answers_csv(result, names)} if answers else {}
        _write({**files, out: figure_png(result, title)})


def _write(files: dict[Path, bytes]) -> None:
    """Each file, also where another cannot be written. Raises OSError of the first that cannot."""
    failed = []
    for path, data in files.items():
        try:
            write_atomically(path, data)
            say(f"wrote {path}")
        except OSError as error:
            failed.append(error)
    for error in failed[1:]:
        say(f"error: {error.strerror}: {error.filename}")
    if failed:
        raise failed[0]


def show(result: ProbeResult, as_json: bool) -> None:
    """Prints the result as a table, with a line for everything that a reader must know beside it."""
    table = Table("", "accuracy", "95 % interval", "C" if result.solver == LBFGS else "rate", "balanced")
    for score in result.scores:
        if score is result.pixels:
            table.add_section()
        style = "bold" if score is result.best else None
        table.add_row(*_row(score, score is result.best), style=style)
    for column in table.columns[1:]:
        column.justify = "right"
    with naming_stdout():
        Console(stderr=as_json).print(table)
    chosen, count = result.chosen, len(result.classes)
    tested = count if chosen is None else len(set(chosen.labels[chosen.test].tolist()))
    lines = [
        f"{result.train:,} images to learn from, {result.test:,} to test on, {count} classes"
        f"{f', of which {tested} are tested on' if tested < count else ''}: {few_of(result.classes)}",
        f"{result.feature_bytes / 1e6:,.1f} MB of features, {result.seconds:.1f} s",
        f"* the layer that validation prefers ({100 * result.best.validation:.1f} % there); balanced: the mean over "
        "the classes, however many images each has",
    ]
    if result.test_groups is not None:
        lines.append(f"the images to test on are of {counted(result.test_groups, 'group')}: intervals are by groups")
    if result.per_class is not None:
        lines.append("intervals are for the choice of test images: the labels drawn, by --seed, are one choice more")
    if result.unlabelled:
        lines.append(f"left out {result.unlabelled:,} images without a label")
    if result.left_out:
        few = ", ".join(f"{name} ({of})" for name, of in result.left_out.items())
        lines.append(f"left out classes with too few images to learn from and test on: {few}")
    if slow := [score.name for score in result.scores if not score.converged]:
        names = ", ".join(slow)
        lines.append(
            f"L-BFGS had not converged when it was stopped for {names}: a little more may be in it"
            if result.solver == LBFGS
            else f"SGD became infinite for {names}, though not in validation: try more --epochs or another --seed"
        )
    for line in lines:
        answer(line, as_json)


def parse_layers(text: str, top: int) -> list[int]:
    """Reads `all`, `3,5` or `2-6` as layers. Raises InputError on anything else; whether they exist is not asked."""
    if text.strip() == "all":
        return list(range(top + 1))
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        if not match:
            raise InputError(f"--layers {text!r} is not understood; give all, or layers from 0 to {top} as 3,5 or 2-6")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _row(score: Score, best: bool) -> tuple[str, ...]:
    chosen = score.strength if score.rate is None else score.rate
    strength = "" if chosen is None else f"{chosen:g}{'' if score.converged else ' †'}"
    interval = f"{100 * score.low:.1f} – {100 * score.high:.1f} %"
    balanced = "" if score.balanced is None else f"{100 * score.balanced:.1f} %"
    return f"{score.name}{' *' if best else ''}", f"{100 * score.accuracy:.1f} %", interval, strength, balanced
