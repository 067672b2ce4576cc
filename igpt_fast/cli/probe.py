"""`igpt-fast probe` and `igpt-fast demo`: what a model has learned, measured and shown."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from igpt_fast.batches import fingerprint
from igpt_fast.checkpoint import Checkpoint, load_checkpoint
from igpt_fast.classify import Score, load_sklearn
from igpt_fast.cli.options import JsonOption, SeedOption, print_json
from igpt_fast.console import say
from igpt_fast.data import open_tokens
from igpt_fast.demo import demo as run_demo
from igpt_fast.errors import InputError
from igpt_fast.pictures import write_atomically
from igpt_fast.pixels import as_source
from igpt_fast.probe import ProbeResult, check_options, figure_png
from igpt_fast.probe import probe as probe_model
from igpt_fast.run import OPTIONS, read_options
from igpt_fast.tokens import TokenDataset, is_token_directory
from igpt_fast.train import pick_device

READING = ("resize", "background", "on_error")  # of a run's images, as train.json has them


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("probe")(probe)
    app.command("demo")(demo)


def probe(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The --out of a training run, or one of its checkpoints.", show_default=False
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Images with labels (class folders, also in a .zip or .tar, or an .npz), or tokens of them.",
            show_default=False,
        ),
    ],
    layers: Annotated[str, typer.Option("--layers", metavar="L", help="all, or some as 3,5 or 2-6.")] = "all",
    test_fraction: Annotated[
        float,
        typer.Option(
            "--test-fraction",
            metavar="F",
            help="Share of the images, by their names, that is tested on. Training with a --val-fraction of as much or "
            "more never saw them.",
        ),
    ] = 0.2,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", show_default="all", help="At most N images, drawn by --seed."),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option("--per-class", min=2, metavar="N", show_default="all", help="Learn from N images of each class."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, metavar="B", show_default="by memory", help="Images side by side.")
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Features in bf16 autocast: faster, a little less exact.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.png", help="Accuracy by layer, as a picture.")
    ] = Path("probe.png"),
    as_json: JsonOption = False,
) -> None:
    """Measure how well a logistic regression on each layer's features tells the classes of DATA apart.

    DATA needs labels: class folders, or an .npz with labels. Images are read as the run read its own. Beside the layers
    stand the same classifier on raw pixels, and the share of the most frequent class. Needs scikit-learn.

    Example: igpt-fast probe run/ photos/ --out probe.png
    """
    load_sklearn()
    _check_place(out)
    checkpoint = load_checkpoint(run, pick_device(device))
    depth = checkpoint.model.config.layers
    chosen = parse_layers(layers, depth)
    check_options(depth, chosen, test_fraction, limit, per_class, batch)
    with _tokens(checkpoint, data) as dataset:
        options = {"test_fraction": test_fraction, "limit": limit, "per_class": per_class, "seed": seed, "batch": batch}
        result = probe_model(checkpoint.model, dataset, layers=chosen, **options, amp=bf16)
        seen = _seen(checkpoint, dataset, test_fraction)
    write_atomically(
        out, figure_png(result, f"Linear probe of {run.name or run}, step {checkpoint.step}, on {data.name}")
    )
    show(result)
    if seen:
        say(f"the model itself had learned from {seen:,} of the images held out here, without their labels")
    say(f"wrote {out}")
    if as_json:
        facts = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "seen_unlabelled": seen}
        print_json(figure=str(out), **facts, **result.to_dict())


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The directory to write.")] = Path("demo"),
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            metavar="S",
            help="Train for about S seconds of an ordinary core: a number of steps, the same on every machine.",
        ),
    ] = 60.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train, sample, complete and probe on 1,797 scans of handwritten digits, and write a page about it.

    The scans come with scikit-learn, so this needs no data and no network.

    Example: igpt-fast demo --out demo
    """
    result = run_demo(out, seconds=seconds, seed=seed)
    say(f"wrote {result.page}: open it in a browser")
    if as_json:
        print_json(page=str(result.page), **result.numbers)


def show(result: ProbeResult) -> None:
    """Prints the result as a table on stderr, with a line for everything that a reader must know beside it."""
    table = Table("", "accuracy", "95 % interval", "C")
    for score in (*result.layers, result.pixels, result.majority):
        if score is result.pixels:
            table.add_section()
        style = "bold" if score is result.best else None
        table.add_row(*_row(score, score is result.best), style=style)
    for column in table.columns[1:]:
        column.justify = "right"
    Console(stderr=True).print(table)
    say(f"{result.train:,} images to learn from, {result.test:,} to test on, {len(result.classes)} classes")
    say(f"{result.feature_bytes / 1e6:,.1f} MB of features, {result.seconds:.1f} s")
    say(f"* the layer that validation prefers ({100 * result.best.validation:.1f} % there)")
    if result.unlabelled:
        say(f"left out {result.unlabelled:,} images without a label")
    if result.left_out:
        few = ", ".join(f"{name} ({count})" for name, count in result.left_out.items())
        say(f"left out classes with too few images to learn from and test on: {few}")
    if slow := [score.name for score in (*result.layers, result.pixels) if not score.converged]:
        say(f"L-BFGS had not converged when it was stopped for {', '.join(slow)}: a little more may be in it")


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
    strength = "" if score.strength is None else f"{score.strength:g}{'' if score.converged else ' †'}"
    interval = f"{100 * score.low:.1f} – {100 * score.high:.1f} %"
    return f"{score.name}{' *' if best else ''}", f"{100 * score.accuracy:.1f} %", interval, strength


@contextmanager
def _tokens(checkpoint: Checkpoint, data: Path) -> Iterator[TokenDataset]:
    """DATA as tokens for the checkpoint's model: as they are, the run's own, or made for the time of the probe."""
    size, palette = checkpoint.model.config.size, checkpoint.palette
    if is_token_directory(data):
        yield open_tokens(data, palette, size=size)
        return
    if palette is None:
        raise InputError(f"{checkpoint.path} has no palette to read images with; give DATA as tokens of its palette")
    run, source = checkpoint.path.parent.parent, as_source(data)
    reading = read_options(run)["command"].get("images", {}) if (run / OPTIONS).is_file() else {}
    options = {name: reading[name] for name in READING if name in reading}
    own = run / "tokens"
    if is_token_directory(own) and TokenDataset(own).meta["source_stamp"] == source.stamp:
        yield open_tokens(source, palette, own, size=size, **options)
        return
    with tempfile.TemporaryDirectory(prefix="igpt-fast-") as folder:
        yield open_tokens(source, palette, Path(folder) / "tokens", size=size, **options)


def _seen(checkpoint: Checkpoint, dataset: TokenDataset, test_fraction: float) -> int | None:
    """How many images of the test share the model was trained on; None when that was, as far as known, other data."""
    run = checkpoint.path.parent.parent
    if not (run / OPTIONS).is_file():
        return None
    saved = read_options(run)
    if saved["data"] != fingerprint(dataset):
        return None
    held_out = dataset.split("val", saved["options"]["val_fraction"])
    return len(np.setdiff1d(dataset.split("val", test_fraction), held_out))


def _check_place(out: Path) -> None:
    """Finds out before the work that the picture can be written. Raises InputError."""
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"{out}: the figure is written as a PNG file; give a name ending in .png to --out")
    there = next(path for path in out.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written ({there} is no writable folder); choose another place")
